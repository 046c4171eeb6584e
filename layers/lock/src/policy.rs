//! What users choose, and whom they tell.

use buttress_core::{Any, Http, Sees, View};
use http::{Extensions, Request};

/// What happens to a request that has no key: the header that the key is made
/// of is not there, say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MissingKey {
    /// Refused, 400 or gRPC's INVALID_ARGUMENT. The default: it would run
    /// beside one that has the lock, or after all others that have no key.
    #[default]
    Refuse,
    /// It passes without a lock.
    Skip,
    /// All such requests share one key, [`Key::global`].
    ///
    /// [`Key::global`]: buttress_core::key::Key::global
    Share,
}

/// What happens to a request when Redis cannot be asked.
#[cfg(feature = "redis")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnStoreError {
    /// Refused, 503 or gRPC's UNAVAILABLE. The default.
    #[default]
    Deny,
    /// It passes without a lock and without a [`Fence`](crate::Fence), by
    /// which whoever serves it can see that.
    Allow,
}

/// A view of requests that can be told of their [`Fence`](crate::Fence).
/// Implemented for [`Http`] and [`Any`], and for no other.
pub trait Target: View + sealed::Sealed {
    /// What is changed to tell it: the extensions over HTTP, the request
    /// itself elsewhere.
    type Mut<'a>;
}

/// A [`Target`] that can be had of requests of type `Req`.
pub trait Reaches<Req>: Target + Sees<Req> {
    /// Reaches into `request`.
    fn reach(request: &mut Req) -> Self::Mut<'_>;
}

impl Target for Http {
    type Mut<'a> = &'a mut Extensions;
}

impl<B> Reaches<Request<B>> for Http {
    fn reach(request: &mut Request<B>) -> &mut Extensions {
        request.extensions_mut()
    }
}

impl<Req: 'static> Target for Any<Req> {
    type Mut<'a> = &'a mut Req;
}

impl<Req: 'static> Reaches<Req> for Any<Req> {
    fn reach(request: &mut Req) -> &mut Req {
        request
    }
}

mod sealed {
    use buttress_core::{Any, Http};

    pub trait Sealed {}
    impl Sealed for Http {}
    impl<Req> Sealed for Any<Req> {}
}
