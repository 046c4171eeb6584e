//! Requests and responses in one line each.

use ::http::{HeaderValue, Request, Response, StatusCode, header};
use bytes::Bytes;
use http_body::Body;
use http_body_util::{BodyExt, Full};

/// A GET of this target.
///
/// # Panics
///
/// If it is none.
#[must_use]
#[track_caller]
pub fn get(target: &str) -> Request<Full<Bytes>> {
    let mut request = post(target, Bytes::new());
    *request.method_mut() = ::http::Method::GET;
    request
}

/// A POST of this body to this target.
///
/// # Panics
///
/// If it is none.
#[must_use]
#[track_caller]
pub fn post(target: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body.into()));
    *request.method_mut() = ::http::Method::POST;
    *request.uri_mut() = match target.parse() {
        Ok(uri) => uri,
        Err(error) => panic!("{target:?} is no request target: {error}"),
    };
    request
}

/// The head of a gRPC call of this path, with an empty body.
///
/// # Panics
///
/// If it is none.
#[must_use]
#[track_caller]
pub fn grpc(path: &str) -> Request<Full<Bytes>> {
    let mut request = post(path, Bytes::new());
    let headers = request.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// A response of this status and body.
///
/// # Panics
///
/// Unless the status is one: 100 to 999.
#[must_use]
#[track_caller]
pub fn response(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = match StatusCode::from_u16(status) {
        Ok(status) => status,
        Err(_) => panic!("{status} is no status"),
    };
    response
}

/// The whole body as text.
///
/// # Panics
///
/// If the body breaks or is not UTF-8.
pub async fn text<B>(response: Response<B>) -> String
where
    B: Body<Error: std::fmt::Debug>,
{
    let whole = response.into_body().collect().await;
    let whole = whole.expect("the body ends well").to_bytes();
    String::from_utf8(whole.into()).expect("the body is text")
}
