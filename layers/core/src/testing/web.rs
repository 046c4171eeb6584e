//! Requests and responses in one line each, and bodies that follow a script.

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use tokio::time::{Sleep, sleep};

use crate::BoxError;

/// A GET of this target.
///
/// # Panics
///
/// If it is none.
#[must_use]
#[track_caller]
pub fn get(target: &str) -> Request<Full<Bytes>> {
    let mut request = post(target, Bytes::new());
    *request.method_mut() = http::Method::GET;
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
    *request.method_mut() = http::Method::POST;
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

/// A body that follows a script, and tells by its [`BodyWatch`] how it ended:
/// for what must hold until the last byte, and what must be let go when a body
/// breaks or is dropped.
///
/// It is empty until it is told otherwise, and never says beforehand that it is
/// at its end or how long it will be.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::testing::{elapsed, web::{BodyFate, ScriptedBody}};
/// use http_body_util::BodyExt;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let body = ScriptedBody::new()
///     .data("first ")
///     .wait(Duration::from_secs(2))
///     .data("second");
/// let watch = body.watch();
/// assert_eq!(watch.fate(), BodyFate::Open);
///
/// let (took, whole) = elapsed(body.collect()).await;
/// assert_eq!(took, Duration::from_secs(2));
/// assert_eq!(whole.unwrap().to_bytes(), "first second");
/// assert_eq!(watch.fate(), BodyFate::Complete);
/// # }
/// ```
pub struct ScriptedBody {
    parts: VecDeque<Part>,
    sleep: Option<Pin<Box<Sleep>>>,
    watch: BodyWatch,
}

enum Part {
    Frame(Frame<Bytes>),
    Wait(Duration),
    Fail(BoxError),
    Hang,
}

impl ScriptedBody {
    /// An empty body.
    #[must_use]
    pub fn new() -> Self {
        Self {
            parts: VecDeque::new(),
            sleep: None,
            watch: BodyWatch(Arc::new(AtomicU8::new(BodyFate::Open as u8))),
        }
    }

    /// Goes on with this data.
    #[must_use]
    pub fn data(self, data: impl Into<Bytes>) -> Self {
        self.part(Part::Frame(Frame::data(data.into())))
    }

    /// Goes on with these trailers.
    #[must_use]
    pub fn trailers(self, trailers: HeaderMap) -> Self {
        self.part(Part::Frame(Frame::trailers(trailers)))
    }

    /// Goes on after this long, on tokio's clock.
    #[must_use]
    pub fn wait(self, span: Duration) -> Self {
        self.part(Part::Wait(span))
    }

    /// Breaks with this error.
    #[must_use]
    pub fn fail(self, error: impl Into<BoxError>) -> Self {
        self.part(Part::Fail(error.into()))
    }

    /// Never goes on.
    #[must_use]
    pub fn hang(self) -> Self {
        self.part(Part::Hang)
    }

    /// What tells how it ended.
    #[must_use]
    pub fn watch(&self) -> BodyWatch {
        self.watch.clone()
    }

    fn part(mut self, part: Part) -> Self {
        self.parts.push_back(part);
        self
    }
}

impl Default for ScriptedBody {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ScriptedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedBody")
            .field("parts", &self.parts.len())
            .field("fate", &self.watch.fate())
            .finish_non_exhaustive()
    }
}

impl Body for ScriptedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            match self.parts.pop_front() {
                None => {
                    self.watch.end(BodyFate::Complete);
                    return Poll::Ready(None);
                }
                Some(Part::Frame(frame)) => return Poll::Ready(Some(Ok(frame))),
                Some(Part::Wait(span)) => self.sleep = Some(Box::pin(sleep(span))),
                Some(Part::Fail(error)) => {
                    // Nothing comes after it.
                    self.parts.clear();
                    self.watch.end(BodyFate::Failed);
                    return Poll::Ready(Some(Err(error)));
                }
                Some(Part::Hang) => {
                    self.parts.push_front(Part::Hang);
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for ScriptedBody {
    fn drop(&mut self) {
        self.watch.end(BodyFate::Dropped);
    }
}

/// Tells how a [`ScriptedBody`] ended, when it is long gone.
#[derive(Clone)]
pub struct BodyWatch(Arc<AtomicU8>);

/// What became of a [`ScriptedBody`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BodyFate {
    /// It has not ended.
    Open,
    /// It was read to its end.
    Complete,
    /// It broke, as it was told to.
    Failed,
    /// It was dropped before its end.
    Dropped,
}

impl BodyWatch {
    /// What became of it so far.
    #[must_use]
    pub fn fate(&self) -> BodyFate {
        const FATES: [BodyFate; 4] = [
            BodyFate::Open,
            BodyFate::Complete,
            BodyFate::Failed,
            BodyFate::Dropped,
        ];
        FATES[usize::from(self.0.load(Ordering::Acquire))]
    }

    /// The first end counts.
    fn end(&self, fate: BodyFate) {
        let _ = self.0.compare_exchange(
            BodyFate::Open as u8,
            fate as u8,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }
}

impl fmt::Debug for BodyWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BodyWatch").field(&self.fate()).finish()
    }
}
