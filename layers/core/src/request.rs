//! What a layer sees of a request, whatever its body type.
//!
//! A key extractor, a cost or a bypass rule should not depend on the body
//! type of the stack it happens to stand in, or the layer's own type would.
//! So on HTTP they are given a [`Head`]: borrowed parts of the request, cheap
//! to make and to copy. A layer over services that do not speak HTTP shows
//! its callbacks the request itself. [`View`] is what lets one layer do both.

use std::{fmt, marker::PhantomData};

use http::{Extensions, HeaderMap, Method, Request, Uri, Version, request::Parts};

/// A borrowed request without its body.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The method.
    pub method: &'a Method,
    /// The request target.
    pub uri: &'a Uri,
    /// The protocol version.
    pub version: Version,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// What earlier layers and the server attached.
    pub extensions: &'a Extensions,
}

impl Head<'_> {
    /// Whether the request is gRPC: its content-type begins with
    /// `application/grpc`.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        self.headers
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| {
                value
                    .as_bytes()
                    .get(..16)
                    .is_some_and(|start| start.eq_ignore_ascii_case(b"application/grpc"))
            })
    }
}

impl<'a, B> From<&'a Request<B>> for Head<'a> {
    fn from(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
            headers: request.headers(),
            extensions: request.extensions(),
        }
    }
}

impl<'a> From<&'a Parts> for Head<'a> {
    fn from(parts: &'a Parts) -> Self {
        Self {
            method: &parts.method,
            uri: &parts.uri,
            version: parts.version,
            headers: &parts.headers,
            extensions: &parts.extensions,
        }
    }
}

/// What callbacks are shown of a request: a [`Head`] on HTTP ([`Http`]), the
/// request itself elsewhere ([`Any`]).
pub trait View: 'static {
    /// The borrowed form.
    type Ref<'a>: Copy;
}

/// A view that can be had of requests of type `Req`.
pub trait Sees<Req>: View {
    /// Looks at `request`.
    fn see(request: &Req) -> Self::Ref<'_>;

    /// What is attached to `request`, where it is of a kind that can have
    /// things attached.
    fn extensions(request: &Req) -> Option<&Extensions> {
        let _ = request;
        None
    }
}

/// HTTP requests, seen as a [`Head`].
#[derive(Clone, Copy, Debug)]
pub enum Http {}

impl View for Http {
    type Ref<'a> = Head<'a>;
}

impl<B> Sees<Request<B>> for Http {
    fn see(request: &Request<B>) -> Head<'_> {
        Head::from(request)
    }

    fn extensions(request: &Request<B>) -> Option<&Extensions> {
        Some(request.extensions())
    }
}

/// Requests of any one type, seen as they are.
pub struct Any<Req>(PhantomData<fn(&Req)>);

impl<Req> fmt::Debug for Any<Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Any")
    }
}

impl<Req: 'static> View for Any<Req> {
    type Ref<'a> = &'a Req;
}

impl<Req: 'static> Sees<Req> for Any<Req> {
    fn see(request: &Req) -> &Req {
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grpc(content_type: &str) -> bool {
        let request = Request::builder()
            .header("content-type", content_type)
            .body(())
            .unwrap();
        Head::from(&request).is_grpc()
    }

    #[test]
    fn grpc_is_told_by_the_content_type() {
        assert!(grpc("application/grpc"));
        assert!(grpc("application/grpc+proto"));
        assert!(grpc("Application/gRPC-web"));
        assert!(!grpc("application/json"));
        assert!(!grpc("application/grp"));
        assert!(!Head::from(&Request::new(())).is_grpc());
    }
}
