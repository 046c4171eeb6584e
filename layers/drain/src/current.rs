//! On which connection a request came, for the layer that names it: set by the
//! server for as long as it runs the service, since a handle in the request
//! would be an allocation for each.

use std::{cell::Cell, sync::Arc};

use crate::guard::Connection;

thread_local! {
    static CURRENT: Cell<ConnectionId> = const { Cell::new(ConnectionId::NONE) };
}

/// Which connection it is, among those that are there; by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ConnectionId(usize);

impl ConnectionId {
    const NONE: Self = Self(0);

    pub(crate) fn of(connection: &Arc<Connection>) -> Self {
        Self(Arc::as_ptr(connection).addr())
    }

    /// `None` where no server said so.
    pub(crate) fn current() -> Option<Self> {
        let current = CURRENT.get();
        (current != Self::NONE).then_some(current)
    }
}

/// What runs until this is dropped is of this connection.
#[cfg(feature = "serve")]
pub(crate) struct Scope {
    before: ConnectionId,
}

#[cfg(feature = "serve")]
impl Scope {
    #[inline]
    pub(crate) fn of(connection: &Arc<Connection>) -> Self {
        let before = CURRENT.replace(ConnectionId::of(connection));
        Self { before }
    }
}

#[cfg(feature = "serve")]
impl Drop for Scope {
    #[inline]
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}
