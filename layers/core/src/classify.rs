//! Verdicts: was this result a success, a failure, or neither?
//!
//! A breaker counts failures, a retry repeats them, a metric shows them. They
//! ask a [`Classify`], which sees a result twice: its head, as soon as there
//! is one, and its end, once the body is over. A failure in the head is final.
//! A success is provisional until the end, where a gRPC call first tells how
//! it went and a body may still break.
//!
//! ```text
//! Err(error) ───────────────▶ classify ─▶ Failure, for good
//! Ok(head) ─▶ classify ─┬───▶ Failure or Ignored, for good
//!                       └───▶ Success, so far
//!                                │ body
//!                                ├─ complete ─▶ classify_end(trailers)
//!                                ├─ error ────▶ Failure
//!                                └─ dropped ──▶ Ignored
//! ```
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

use http::{HeaderMap, Response, StatusCode, header::CONTENT_TYPE};

use crate::{body::BodyEnd, respond::GRPC_STATUS};

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
    /// interest, and that is no news of the service.
    fn classify_body(&self, expected: Expect, end: BodyEnd<'_>) -> Verdict {
        match end {
            BodyEnd::Complete { trailers } => self.classify_end(expected, trailers),
            BodyEnd::Failed => Verdict::Failure,
            BodyEnd::Dropped => Verdict::Ignored,
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

/// HTTP by its status: 5xx are failures, unless told otherwise.
///
/// Errors are failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusClassifier {
    failures: StatusSet,
    ignored: StatusSet,
}

impl StatusClassifier {
    /// 500 to 599 are failures, nothing is ignored.
    #[must_use]
    pub fn new() -> Self {
        Self {
            failures: (500..600)
                .filter_map(|status| StatusCode::from_u16(status).ok())
                .collect(),
            ignored: StatusSet::default(),
        }
    }

    /// Replaces the statuses that are failures.
    #[must_use]
    pub fn failures(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.failures = statuses.into_iter().collect();
        self
    }

    /// Replaces the statuses that count as nothing, even if they are among the
    /// failures.
    #[must_use]
    pub fn ignored(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.ignored = statuses.into_iter().collect();
        self
    }

    fn status(&self, status: StatusCode) -> Verdict {
        if self.ignored.contains(status) {
            Verdict::Ignored
        } else if self.failures.contains(status) {
            Verdict::Failure
        } else {
            Verdict::Success
        }
    }
}

impl Default for StatusClassifier {
    fn default() -> Self {
        Self::new()
    }
}

impl<B, E> Classify<Response<B>, E> for StatusClassifier {
    fn classify(&self, result: Result<&Response<B>, &E>) -> Verdict {
        match result {
            Ok(response) => self.status(response.status()),
            Err(_) => Verdict::Failure,
        }
    }
}

/// One bit for each of 100 to 999, which is all that a status can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct StatusSet([u64; 15]);

impl StatusSet {
    fn place(status: StatusCode) -> (usize, u64) {
        let index = usize::from(status.as_u16() - 100);
        (index / 64, 1 << (index % 64))
    }

    fn contains(&self, status: StatusCode) -> bool {
        let (word, bit) = Self::place(status);
        self.0[word] & bit != 0
    }
}

impl FromIterator<StatusCode> for StatusSet {
    fn from_iter<I: IntoIterator<Item = StatusCode>>(statuses: I) -> Self {
        let mut set = Self::default();
        for status in statuses {
            let (word, bit) = Self::place(status);
            set.0[word] |= bit;
        }
        set
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
        match GrpcCode::of(response.headers()) {
            Some(code) => self.code(code),
            None if response.status() == StatusCode::OK => Verdict::Success,
            None => self.code(GrpcCode::from_http(response.status())),
        }
    }

    fn tail<B>(response: &Response<B>) -> Expect {
        let told = response.headers().contains_key(GRPC_STATUS)
            || response.status() != StatusCode::OK
            || content(response) == Content::GrpcWeb;
        if told {
            Expect::End
        } else {
            Expect::GrpcStatus
        }
    }

    fn end(self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        match (trailers.and_then(GrpcCode::of), expected) {
            (Some(code), _) => self.code(code),
            (None, Expect::GrpcStatus) => Verdict::Failure,
            (None, Expect::End) => Verdict::Success,
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
        Self::tail(response)
    }

    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        self.end(expected, trailers)
    }
}

fn bits(codes: impl IntoIterator<Item = GrpcCode>) -> u32 {
    codes.into_iter().fold(0, |set, code| set | 1 << code as u8)
}

/// Any HTTP: [`GrpcClassifier`] where the response's content-type says gRPC,
/// [`StatusClassifier`] elsewhere. What layers use unless told otherwise.
///
/// The response's content-type and not the request's: a gateway's HTML 502 in
/// answer to a gRPC call is judged by its status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HttpClassifier {
    status: StatusClassifier,
    grpc: GrpcClassifier,
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
}

impl<B, E> Classify<Response<B>, E> for HttpClassifier {
    fn classify(&self, result: Result<&Response<B>, &E>) -> Verdict {
        match result {
            Ok(response) if content(response) == Content::Other => {
                self.status.status(response.status())
            }
            Ok(response) => self.grpc.head(response),
            Err(_) => Verdict::Failure,
        }
    }

    fn expects(&self, response: &Response<B>) -> Expect {
        match content(response) {
            Content::Other => Expect::End,
            _ => GrpcClassifier::tail(response),
        }
    }

    fn classify_end(&self, expected: Expect, trailers: Option<&HeaderMap>) -> Verdict {
        match expected {
            Expect::GrpcStatus => self.grpc.end(expected, trailers),
            Expect::End => Verdict::Success,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Grpc,
    GrpcWeb,
    Other,
}

/// By the content-type: `application/grpc`, then nothing, `+` or `;`. What
/// goes on with `-web` keeps its trailers in the body.
fn content<B>(response: &Response<B>) -> Content {
    let Some((start, rest)) = response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().split_at_checked(16))
    else {
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
mod tests {
    use std::convert::Infallible;

    use super::*;
    use Verdict::{Failure, Ignored, Success};

    type Head = Result<Response<()>, &'static str>;

    fn http(status: u16) -> Head {
        Ok(Response::builder().status(status).body(()).unwrap())
    }

    fn grpc(content_type: &str, status: Option<&str>) -> Head {
        let mut response = Response::builder().header("content-type", content_type);
        if let Some(status) = status {
            response = response.header("grpc-status", status);
        }
        Ok(response.body(()).unwrap())
    }

    fn trailers(status: &str) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        trailers.insert(GRPC_STATUS, status.parse().unwrap());
        trailers
    }

    /// The head's verdict, and if it was a success, that of an end with these
    /// trailers.
    fn judge(
        classifier: &impl Classify<Response<()>, &'static str>,
        head: &Head,
        trailers: Option<&HeaderMap>,
    ) -> (Verdict, Option<Verdict>) {
        let verdict = classifier.classify(head.as_ref());
        let end = (verdict == Success)
            .then(|| classifier.expects(head.as_ref().unwrap()))
            .map(|expected| classifier.classify_body(expected, BodyEnd::Complete { trailers }));
        (verdict, end)
    }

    #[test]
    fn server_errors_are_failures_and_every_status_has_its_bit() {
        let classifier = StatusClassifier::new();
        for status in 100..1000 {
            let expected = if (500..600).contains(&status) {
                Failure
            } else {
                Success
            };
            let verdict = classifier.classify(http(status).as_ref());
            assert_eq!(verdict, expected, "{status}");
        }
        assert_eq!(classifier.classify(Err::<&Response<()>, _>(&"io")), Failure);
    }

    #[test]
    fn statuses_are_configured() {
        let classifier = StatusClassifier::new()
            .failures([StatusCode::BAD_GATEWAY, StatusCode::TOO_MANY_REQUESTS])
            .ignored([StatusCode::BAD_GATEWAY]);
        assert_eq!(judge(&classifier, &http(429), None).0, Failure);
        assert_eq!(judge(&classifier, &http(500), None).0, Success);
        assert_eq!(judge(&classifier, &http(502), None).0, Ignored);
    }

    #[test]
    fn grpc_codes_and_their_defaults() {
        let failures = [2, 4, 13, 14, 15];
        for (number, code) in GrpcCode::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, number);
            let expected = match number {
                1 => Ignored,
                n if failures.contains(&n) => Failure,
                _ => Success,
            };
            let text = number.to_string();
            let head = grpc("application/grpc", Some(&text));
            let verdict = judge(&HttpClassifier::new(), &head, None);
            assert_eq!(verdict.0, expected, "{number} in the headers");
            let head = grpc("application/grpc+proto", None);
            let verdict = judge(&HttpClassifier::new(), &head, Some(&trailers(&text)));
            assert_eq!(verdict, (Success, Some(expected)), "{number} in trailers");
        }
    }

    #[test]
    fn nonsense_for_a_status_is_unknown() {
        for text in ["", "x", "17", "-1", "99999999999999999999999"] {
            assert_eq!(
                GrpcCode::of(&trailers(text)),
                Some(GrpcCode::Unknown),
                "{text}"
            );
        }
        assert_eq!(GrpcCode::of(&HeaderMap::new()), None);
    }

    #[test]
    fn trailers_only_is_final_at_the_head() {
        // What said OK in its head has no trailers to miss.
        let head = grpc("application/grpc", Some("0"));
        assert_eq!(
            judge(&HttpClassifier::new(), &head, None),
            (Success, Some(Success))
        );
        assert_eq!(
            judge(&GrpcClassifier::new(), &head, None),
            (Success, Some(Success))
        );
    }

    #[test]
    fn grpc_without_its_trailers_was_cut_short() {
        let empty = HeaderMap::new();
        for content_type in ["application/grpc", "application/grpc;x=1"] {
            let head = grpc(content_type, None);
            for trailers in [None, Some(&empty)] {
                let verdict = judge(&HttpClassifier::new(), &head, trailers);
                assert_eq!(verdict, (Success, Some(Failure)));
            }
        }
        // Without the content-type only the gRPC classifier expects trailers.
        assert_eq!(
            judge(&GrpcClassifier::new(), &http(200), None).1,
            Some(Failure)
        );
        assert_eq!(
            judge(&HttpClassifier::new(), &http(200), None).1,
            Some(Success)
        );
    }

    #[test]
    fn grpc_web_has_its_trailers_in_the_body() {
        let head = grpc("application/grpc-web+proto", None);
        assert_eq!(judge(&HttpClassifier::new(), &head, None).1, Some(Success));
        assert_eq!(judge(&GrpcClassifier::new(), &head, None).1, Some(Success));
        let head = grpc("application/grpc-web", Some("14"));
        assert_eq!(judge(&HttpClassifier::new(), &head, None).0, Failure);
    }

    #[test]
    fn plain_http_may_have_any_trailers() {
        for content_type in ["text/plain", "application/grpcx"] {
            let head = grpc(content_type, None);
            let verdict = judge(&HttpClassifier::new(), &head, Some(&trailers("14")));
            assert_eq!(verdict, (Success, Some(Success)));
        }
    }

    #[test]
    fn an_http_status_stands_in_for_a_missing_grpc_one() {
        let classifier = GrpcClassifier::new();
        for (status, expected) in [
            (400, Failure),
            (401, Success),
            (404, Success),
            (429, Failure),
            (503, Failure),
            (500, Failure),
        ] {
            assert_eq!(judge(&classifier, &http(status), None).0, expected);
        }
        // And then there are no trailers to wait for.
        assert_eq!(
            judge(&classifier, &http(404), None),
            (Success, Some(Success))
        );
    }

    #[test]
    fn bodies_that_break_fail_and_those_that_are_dropped_say_nothing() {
        let classifier = |result: Result<&Response<()>, &Infallible>| match result {
            Ok(_) => Success,
            Err(never) => match *never {},
        };
        let end = |end| Classify::classify_body(&classifier, Expect::End, end);
        assert_eq!(end(BodyEnd::Complete { trailers: None }), Success);
        assert_eq!(end(BodyEnd::Failed), Failure);
        assert_eq!(end(BodyEnd::Dropped), Ignored);
    }

    #[test]
    fn closures_and_shared_ones_judge_too() {
        let over_two = |result: Result<&u32, &()>| match result {
            Ok(0..=2) => Success,
            Ok(_) => Failure,
            Err(()) => Ignored,
        };
        let shared: Arc<dyn Classify<u32, ()>> = Arc::new(over_two);
        assert_eq!(shared.classify(Ok(&2)), Success);
        assert_eq!(shared.classify(Ok(&3)), Failure);
        assert_eq!(shared.classify(Err(&())), Ignored);

        let shared = Arc::new(GrpcClassifier::new());
        let head = grpc("application/grpc", None);
        assert_eq!(judge(&shared, &head, None), (Success, Some(Failure)));
    }
}
