//! Verdicts: was this result a success, a failure, or neither?
//!
//! A breaker counts failures, a retry repeats them, a metric shows them. They
//! ask a [`Classify`], which sees a result twice: its head, as soon as there
//! is one, and its end, once the body is over. A failure in the head is final.
//! A success is provisional until the end, where a gRPC call first tells how
//! it went and a body may still break; unless [`expects`](Classify::expects)
//! says that the end has [`Nothing`](Expect::Nothing) to tell.
//!
//! ```text
//! Err(error) ───────────────▶ classify ─▶ Failure, for good
//! Ok(head) ─▶ classify ─┬───▶ Failure or Ignored, for good
//!                       └───▶ Success ─▶ expects ─┬─ Nothing ─▶ Success, for good
//!                                                 └─ anything else: so far
//!                                                      │ body
//!                                                      ├─ complete ─▶ classify_end(trailers)
//!                                                      ├─ error ────▶ Failure
//!                                                      └─ dropped ──▶ Ignored
//! ```
//!
//! `Nothing` is for what lasts: a connection that was upgraded (101 Switching
//! Protocols) and, where [`HttpClassifier::streaming`] names their types,
//! streams of events. They succeeded when they began, and a call that goes on
//! for hours must not keep a verdict waiting. What breaks off later is then no
//! failure. The 2xx answer to a CONNECT is such a case too, but no response
//! tells what it answers: who sends CONNECT wraps the classifier.
//!
//! | | for |
//! |---|---|
//! | [`HttpClassifier`] | any HTTP: gRPC by its own rules, the rest by status. The default. |
//! | [`StatusClassifier`] | HTTP by status |
//! | [`GrpcClassifier`] | gRPC only |
//! | `Fn(Result<&Res, &Err>) -> Verdict` | anything else, by its head alone |
//!
//! ```
//! use buttress_core::classify::{Classify, HttpClassifier, StatusClassifier, Verdict};
//! use http::{Response, StatusCode};
//!
//! // A missing feature is no outage: 501 does not count against the service.
//! let classifier = HttpClassifier::new().with_status(StatusClassifier::new().failures([
//!     StatusCode::INTERNAL_SERVER_ERROR,
//!     StatusCode::BAD_GATEWAY,
//!     StatusCode::SERVICE_UNAVAILABLE,
//!     StatusCode::GATEWAY_TIMEOUT,
//! ]));
//!
//! let mut response = Response::new(());
//! *response.status_mut() = StatusCode::NOT_IMPLEMENTED;
//! let result: Result<_, &std::io::Error> = Ok(&response);
//! assert_eq!(classifier.classify(result), Verdict::Success);
//! ```

use std::sync::Arc;

use http::{Extensions, HeaderMap, Response, StatusCode, header::CONTENT_TYPE};

use crate::{body::BodyEnd, respond::GRPC_STATUS};

mod intern;
mod status;
mod streaming;

pub use status::StatusClassifier;

use streaming::StreamingTypes;

/// What a result says about the service that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It did its work. A refusal that is the caller's own fault (a 404, say)
    /// is a success of the service.
    Success,
    /// It did not.
    Failure,
    /// It says nothing, and counts as nothing.
    Ignored,
}

/// What the end of a body must still tell before a success is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Expect {
    /// Nothing but that it comes.
    #[default]
    End,
    /// Trailers with a `grpc-status`.
    GrpcStatus,
    /// Nothing at all: the head was final, and what breaks off later is no
    /// failure. Who holds a verdict back for the end of the body gives it now.
    Nothing,
}

/// Judges results.
///
/// Called on the hot path, outside every lock. Implemented for closures over
/// the head, and for [`Arc`]s of classifiers.
pub trait Classify<Res, Err> {
    /// The verdict on the head, or on the error. [`Verdict::Success`] is
    /// provisional, everything else is final.
    fn classify(&self, result: Result<&Res, &Err>) -> Verdict;

    /// What the end of this response's body must tell. Asked when the head was
    /// a success, because the response itself is gone by its end.
    ///
    /// Default: [`Expect::End`].
    fn expects(&self, response: &Res) -> Expect {
        let _ = response;
        Expect::End
    }

    /// The verdict on a body that ended whole, after a head that was a
    /// success: `expected` is what [`expects`](Self::expects) gave for it.
    ///
    /// Default: [`Verdict::Success`].
    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        let _ = (expected, trailers);
        Verdict::Success
    }

    /// The verdict on a body however it ended. An error in its stream is a
    /// failure. One that was dropped early decides nothing: its reader lost
    /// interest, and that is no news of the service. Where
    /// [`Nothing`](Expect::Nothing) was expected, the head's success stands
    /// whatever the end.
    fn classify_body(&self, expected: Expect, end: BodyEnd<'_>) -> Verdict {
        match (expected, end) {
            (Expect::Nothing, _) => Verdict::Success,
            (_, BodyEnd::Complete { trailers }) => self.classify_end(expected, trailers),
            (_, BodyEnd::Failed) => Verdict::Failure,
            (_, BodyEnd::Dropped) => Verdict::Ignored,
        }
    }
}

impl<F, Res, Err> Classify<Res, Err> for F
where
    F: Fn(Result<&Res, &Err>) -> Verdict,
{
    fn classify(&self, result: Result<&Res, &Err>) -> Verdict {
        self(result)
    }
}

impl<C, Res, Err> Classify<Res, Err> for Arc<C>
where
    C: Classify<Res, Err> + ?Sized,
{
    fn classify(&self, result: Result<&Res, &Err>) -> Verdict {
        (**self).classify(result)
    }

    fn expects(&self, response: &Res) -> Expect {
        (**self).expects(response)
    }

    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        (**self).classify_end(expected, trailers)
    }

    fn classify_body(&self, expected: Expect, end: BodyEnd<'_>) -> Verdict {
        (**self).classify_body(expected, end)
    }
}

/// The gRPC status codes, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named and numbered by the gRPC specification")]
#[repr(u8)]
pub enum GrpcCode {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl GrpcCode {
    const ALL: [Self; 17] = [
        Self::Ok,
        Self::Cancelled,
        Self::Unknown,
        Self::InvalidArgument,
        Self::DeadlineExceeded,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Aborted,
        Self::OutOfRange,
        Self::Unimplemented,
        Self::Internal,
        Self::Unavailable,
        Self::DataLoss,
        Self::Unauthenticated,
    ];

    /// The `grpc-status` of these headers or trailers, if they have one. One
    /// that is no known code is [`Unknown`](Self::Unknown).
    #[must_use]
    pub fn of(fields: &HeaderMap) -> Option<Self> {
        let value = fields.get(GRPC_STATUS)?;
        Some(
            std::str::from_utf8(value.as_bytes())
                .ok()
                .and_then(|text| text.parse::<usize>().ok())
                .and_then(|number| Self::ALL.get(number).copied())
                .unwrap_or(Self::Unknown),
        )
    }

    /// What an HTTP status means to a gRPC client that was told no
    /// `grpc-status`: the table of gRPC's `http-grpc-status-mapping.md`.
    #[must_use]
    pub fn from_http(status: StatusCode) -> Self {
        match status.as_u16() {
            400 => Self::Internal,
            401 => Self::Unauthenticated,
            403 => Self::PermissionDenied,
            404 => Self::Unimplemented,
            429 | 502 | 503 | 504 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

/// The trailers of a response that has nothing else, known before its body was
/// read: an extension of the response, attached by a layer that looked ahead
/// (the retry's `PeekLayer`). To a [`GrpcClassifier`] the status in them is as
/// good as one in the headers.
#[derive(Clone, Debug)]
pub struct Trailers(HeaderMap);

impl Trailers {
    /// Tells them.
    pub fn attach(fields: HeaderMap, extensions: &mut Extensions) {
        extensions.insert(Self(fields));
    }

    /// Those that were told.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// Their fields.
    #[must_use]
    pub const fn fields(&self) -> &HeaderMap {
        &self.0
    }

    /// Where the status of a gRPC response stands: in these headers, or in the
    /// trailers that these extensions tell of. The headers if it is in neither.
    #[must_use]
    pub fn or_headers<'a>(headers: &'a HeaderMap, extensions: &'a Extensions) -> &'a HeaderMap {
        if headers.contains_key(GRPC_STATUS) {
            return headers;
        }
        Self::of(extensions).map_or(headers, Self::fields)
    }
}

/// gRPC by its status, wherever it stands.
///
/// In the headers (trailers-only) it is final at the head, otherwise it comes
/// in the trailers, and a body that ends without them was cut short: a failure.
/// An HTTP status other than 200 without a `grpc-status` is read by gRPC's own
/// table. gRPC-Web hides its trailers in the body, where only the end of the
/// body is seen.
///
/// By default UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE and DATA_LOSS
/// are failures: what OpenTelemetry's conventions hold to be a server's error,
/// without UNIMPLEMENTED, which is a wrong call and no illness.
/// RESOURCE_EXHAUSTED is not one, as 429 is not over HTTP. CANCELLED is ignored:
/// the caller left. Errors are failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcClassifier {
    failures: u32,
    ignored: u32,
}

impl GrpcClassifier {
    /// The defaults above.
    #[must_use]
    pub fn new() -> Self {
        Self {
            failures: 0,
            ignored: 0,
        }
        .failures([
            GrpcCode::Unknown,
            GrpcCode::DeadlineExceeded,
            GrpcCode::Internal,
            GrpcCode::Unavailable,
            GrpcCode::DataLoss,
        ])
        .ignored([GrpcCode::Cancelled])
    }

    /// Replaces the codes that are failures.
    #[must_use]
    pub fn failures(mut self, codes: impl IntoIterator<Item = GrpcCode>) -> Self {
        self.failures = bits(codes);
        self
    }

    /// Replaces the codes that count as nothing, even if they are among the
    /// failures.
    #[must_use]
    pub fn ignored(mut self, codes: impl IntoIterator<Item = GrpcCode>) -> Self {
        self.ignored = bits(codes);
        self
    }

    fn code(self, code: GrpcCode) -> Verdict {
        let bit = bits([code]);
        if self.ignored & bit != 0 {
            Verdict::Ignored
        } else if self.failures & bit != 0 {
            Verdict::Failure
        } else {
            Verdict::Success
        }
    }

    fn head<B>(self, response: &Response<B>) -> Verdict {
        match GrpcCode::of(told(response)) {
            Some(code) => self.code(code),
            None if response.status() == StatusCode::OK => Verdict::Success,
            None => self.code(GrpcCode::from_http(response.status())),
        }
    }

    fn tail<B>(response: &Response<B>, content: Content) -> Expect {
        let told = told(response).contains_key(GRPC_STATUS)
            || response.status() != StatusCode::OK
            || content == Content::GrpcWeb;
        if told {
            Expect::End
        } else {
            Expect::GrpcStatus
        }
    }

    fn end(self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        match (trailers.and_then(GrpcCode::of), expected) {
            (_, Expect::Nothing) | (None, Expect::End) => Verdict::Success,
            (None, Expect::GrpcStatus) => Verdict::Failure,
            (Some(code), _) => self.code(code),
        }
    }
}

impl Default for GrpcClassifier {
    fn default() -> Self {
        Self::new()
    }
}

impl<B, E> Classify<Response<B>, E> for GrpcClassifier {
    fn classify(&self, result: Result<&Response<B>, &E>) -> Verdict {
        match result {
            Ok(response) => self.head(response),
            Err(_) => Verdict::Failure,
        }
    }

    fn expects(&self, response: &Response<B>) -> Expect {
        if upgraded(response) {
            return Expect::Nothing;
        }
        Self::tail(response, content(content_type(response)))
    }

    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        self.end(expected, trailers)
    }
}

fn told<B>(response: &Response<B>) -> &HeaderMap {
    Trailers::or_headers(response.headers(), response.extensions())
}

fn bits(codes: impl IntoIterator<Item = GrpcCode>) -> u32 {
    codes.into_iter().fold(0, |set, code| set | 1 << code as u8)
}

/// Any HTTP: [`GrpcClassifier`] where the response's content-type says gRPC,
/// [`StatusClassifier`] elsewhere. What layers use unless told otherwise.
///
/// The response's content-type and not the request's: a gateway's HTML 502 in
/// answer to a gRPC call is judged by its status.
///
/// Three words: as cheap to copy into every call as a reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HttpClassifier {
    status: StatusClassifier,
    grpc: GrpcClassifier,
    streaming: StreamingTypes,
}

impl HttpClassifier {
    /// The defaults of both.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the rule for statuses.
    #[must_use]
    pub fn with_status(mut self, status: StatusClassifier) -> Self {
        self.status = status;
        self
    }

    /// Replaces the rule for gRPC.
    #[must_use]
    pub fn with_grpc(mut self, grpc: GrpcClassifier) -> Self {
        self.grpc = grpc;
        self
    }

    /// Replaces the content types whose bodies are final at the head:
    /// `text/event-stream`, say. Default: none.
    ///
    /// They are compared without regard to case, and without what follows a
    /// `;` on either side. For these responses a success is one as soon as
    /// its head is there ([`Expect::Nothing`]): a stream that breaks off later
    /// is then no failure. A gRPC type named here hides the status in its
    /// trailers.
    ///
    /// Each distinct set of types is kept for the life of the process, once.
    ///
    /// ```
    /// # use buttress_core::classify::{Classify, Expect, HttpClassifier};
    /// # use http::Response;
    /// let classifier = HttpClassifier::new().streaming(["text/event-stream"]);
    /// let response = Response::builder()
    ///     .header("content-type", "text/event-stream; charset=utf-8")
    ///     .body(())
    ///     .unwrap();
    /// let expected = Classify::<_, ()>::expects(&classifier, &response);
    /// assert_eq!(expected, Expect::Nothing);
    /// ```
    #[must_use]
    pub fn streaming(mut self, types: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.streaming = StreamingTypes::new(types);
        self
    }
}

impl<B, E> Classify<Response<B>, E> for HttpClassifier {
    fn classify(&self, result: Result<&Response<B>, &E>) -> Verdict {
        match result {
            Ok(response) if content(content_type(response)) == Content::Other => {
                self.status.status(response.status())
            }
            Ok(response) => self.grpc.head(response),
            Err(_) => Verdict::Failure,
        }
    }

    fn expects(&self, response: &Response<B>) -> Expect {
        let content_type = content_type(response);
        if upgraded(response) || self.streaming.has(content_type) {
            return Expect::Nothing;
        }
        match content(content_type) {
            Content::Other => Expect::End,
            grpc => GrpcClassifier::tail(response, grpc),
        }
    }

    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        match expected {
            Expect::GrpcStatus => self.grpc.end(expected, trailers),
            Expect::End | Expect::Nothing => Verdict::Success,
        }
    }
}

/// Whether HTTP is over on this connection: what follows is another protocol's.
fn upgraded<B>(response: &Response<B>) -> bool {
    response.status() == StatusCode::SWITCHING_PROTOCOLS
}

fn content_type<B>(response: &Response<B>) -> Option<&[u8]> {
    let value = response.headers().get(CONTENT_TYPE)?;
    Some(value.as_bytes())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Grpc,
    GrpcWeb,
    Other,
}

/// By the content-type: `application/grpc`, then nothing, `+` or `;`. What
/// goes on with `-web` keeps its trailers in the body.
fn content(content_type: Option<&[u8]>) -> Content {
    let Some((start, rest)) = content_type.and_then(|value| value.split_at_checked(16)) else {
        return Content::Other;
    };
    if !start.eq_ignore_ascii_case(b"application/grpc") {
        return Content::Other;
    }
    match rest.first() {
        None | Some(b'+' | b';' | b' ' | b'\t') => Content::Grpc,
        Some(b'-') => Content::GrpcWeb,
        Some(_) => Content::Other,
    }
}

#[cfg(test)]
mod tests;
