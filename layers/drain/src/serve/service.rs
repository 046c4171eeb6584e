//! Between hyper and the user's service: counts requests on the connection and
//! has HTTP/1 clients go elsewhere.

use std::{
    future::Future,
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use buttress_core::BoxError;
use bytes::{Buf, Bytes};
use http::{Method, Request, Response, StatusCode, header::CONTENT_LENGTH, response::Parts};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::StreamExecutor;
use crate::{
    Label, Phase,
    current::Scope,
    future::close,
    io::{Lane, Protocol},
};

/// What hyper calls for each request of a connection.
pub(super) struct OnConnection<S> {
    service: S,
    lane: Arc<Lane>,
}

impl<S> OnConnection<S> {
    pub(super) const fn new(service: S, lane: Arc<Lane>) -> Self {
        Self { service, lane }
    }
}

impl<S, B> hyper::service::Service<Request<Incoming>> for OnConnection<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: Body,
{
    type Response = Response<CountedBody<B>>;
    type Error = BoxError;
    type Future = CountedFuture<S, S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let connect = request.method() == Method::CONNECT;
        let head = request.method() == Method::HEAD;
        let traffic = &self.lane.record.traffic;
        if traffic.is_refusing() {
            return refused();
        }
        traffic.bare(request.body().is_end_stream());
        let open = Some(Open::new(&self.lane));
        let mut service = self.service.clone();
        let _scope = Scope::of(&self.lane.record);
        // Called at once if it can be: where the client goes away hyper may
        // never poll, and the service is to have heard of it.
        let mut cx = Context::from_waker(Waker::noop());
        let state = match service.poll_ready(&mut cx) {
            Poll::Ready(Ok(())) => State::Calling {
                call: service.call(request),
            },
            Poll::Ready(Err(error)) => State::Failed {
                error: Some(error.into()),
            },
            Poll::Pending => State::Waiting {
                service,
                request: Some(request),
            },
        };
        CountedFuture {
            connect,
            head,
            open,
            state,
        }
    }
}

/// Of a request that nothing was done for: its client may send it again.
#[cold]
fn refused<S, F>() -> CountedFuture<S, F> {
    let error = h2::Error::from(h2::Reason::REFUSED_STREAM);
    CountedFuture {
        connect: false,
        head: false,
        open: None,
        state: State::Failed {
            error: Some(error.into()),
        },
    }
}

/// A request that is open on its connection until this is dropped.
pub(super) struct Open(Arc<Lane>);

impl Open {
    fn new(lane: &Arc<Lane>) -> Self {
        lane.record.traffic.begin();
        Self(Arc::clone(lane))
    }

    fn scope(&self) -> Scope {
        Scope::of(&self.0.record)
    }

    /// The request has turned its connection, or its stream of one, into a
    /// tunnel, which ends when its socket does, or the stream's sending half.
    #[cold]
    fn upgraded(self, route: Option<Label>) {
        let record = &self.0.record;
        if record.traffic.protocol() == Protocol::Http2 {
            StreamExecutor::tunnel(Tunnel {
                open: self,
                route,
                key: None,
            });
            return;
        }
        record.traffic.speak(Protocol::Tunnel);
        record.upgraded(route);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.record.traffic.end();
    }
}

/// A stream that is a tunnel, until hyper has sent the last of it.
pub(super) struct Tunnel {
    open: Open,
    route: Option<Label>,
    /// None before hyper has made a tunnel of it.
    key: Option<usize>,
}

impl Tunnel {
    pub(super) fn begins(&mut self) {
        let key = self.open.0.record.tunnel_begins(self.route.take());
        self.key = Some(key);
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.open.0.record.tunnel_sent(key);
        }
    }
}

pin_project! {
    pub(super) struct CountedFuture<S, F> {
        #[pin]
        state: State<S, F>,
        // None once the body has it.
        open: Option<Open>,
        connect: bool,
        head: bool,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F> {
        Waiting { service: S, request: Option<Request<Incoming>> },
        Calling { #[pin] call: F },
        Failed { error: Option<BoxError> },
    }
}

impl<S, B> Future for CountedFuture<S, S::Future>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body,
{
    type Output = Result<Response<CountedBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let _scope = this.open.as_ref().map(Open::scope);
        loop {
            match this.state.as_mut().project() {
                StateProj::Waiting { service, request } => {
                    ready!(service.poll_ready(cx)).map_err(Into::into)?;
                    let request = request.take().expect("polled after completion");
                    let call = service.call(request);
                    this.state.set(State::Calling { call });
                }
                StateProj::Failed { error } => {
                    return Poll::Ready(Err(error.take().expect("polled after completion")));
                }
                StateProj::Calling { call } => {
                    let response = ready!(call.poll(cx)).map_err(Into::into)?;
                    let (mut head, body) = response.into_parts();
                    let mut open = this.open.take();
                    let mut body = Some(body);
                    if let Some(request) = &open {
                        let lane = &*request.0;
                        let is_http2 = lane.record.traffic.protocol() == Protocol::Http2;
                        if is_http2 && (*this.head || is_bare(head.status)) {
                            leave_out(&mut body, &mut head);
                        }
                        let tunnel = match head.status {
                            // There is none over HTTP/2.
                            StatusCode::SWITCHING_PROTOCOLS => !is_http2,
                            status => *this.connect && status.is_success(),
                        };
                        if tunnel {
                            let route = head.extensions.remove::<Label>();
                            if let Some(open) = open.take() {
                                open.upgraded(route);
                            }
                        } else if leaves(lane) {
                            close(&mut head);
                        }
                    }
                    let body = CountedBody {
                        body,
                        waits: open.as_ref().and_then(Waits::new),
                        open,
                    };
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
            }
        }
    }
}

/// Whether such an answer has no body, whatever was asked.
const fn is_bare(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// Drops a body that is not to be sent (RFC 9110, 6.4.1), which hyper does over
/// HTTP/1 only: over HTTP/2 a client resets the stream, or reads for as long as
/// there is something. Its length is told as it would be to a GET.
#[cold]
fn leave_out<B: Body>(body: &mut Option<B>, head: &mut Parts) {
    let body = body.take().filter(|body| !body.is_end_stream());
    let length = body.and_then(|body| body.size_hint().exact());
    if let Some(length) = length
        && head.status != StatusCode::NO_CONTENT
        && !head.headers.contains_key(CONTENT_LENGTH)
    {
        head.headers.insert(CONTENT_LENGTH, length.into());
    }
}

/// Whether the next request on this connection is better sent elsewhere, and
/// an answer can say so.
#[inline]
fn leaves(lane: &Lane) -> bool {
    let asked = lane.shutdown.phase() != Phase::Serving || lane.record.traffic.is_leaving();
    asked && lane.record.traffic.protocol() == Protocol::Http1
}

pin_project! {
    /// A response's body, whose request is open until hyper drops it, and
    /// whose bytes are held until hyper has written them: it drops a body as
    /// soon as it has the last of it.
    pub(super) struct CountedBody<B> {
        // None where it is not to be sent.
        #[pin]
        body: Option<B>,
        // While it has, or may have, something to take.
        waits: Option<Waits>,
        open: Option<Open>,
    }
}

impl<B: Body> Body for CountedBody<B> {
    type Data = Unsent<B::Data>;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, B::Error>>> {
        let this = self.project();
        let Some(body) = this.body.as_pin_mut() else {
            return Poll::Ready(None);
        };
        let polled = body.poll_frame(cx);
        if polled.is_pending() {
            *this.waits = None;
        } else if this.waits.is_none() {
            *this.waits = this.open.as_ref().and_then(Waits::new);
        }
        let lane = this.open.as_ref().map(|open| &open.0);
        polled.map_ok(|frame| {
            frame.map_data(|data| Unsent {
                data,
                held: lane.map(Held::new),
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.body.as_ref();
        body.map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// A body over HTTP/2 that hyper does not ask for more, since there is no room
/// for it in the client's windows.
struct Waits(Arc<Lane>);

impl Waits {
    #[inline]
    fn new(open: &Open) -> Option<Self> {
        let traffic = &open.0.record.traffic;
        if traffic.protocol() != Protocol::Http2 {
            return None;
        }
        traffic.wait();
        Some(Self(Arc::clone(&open.0)))
    }
}

impl Drop for Waits {
    #[inline]
    fn drop(&mut self) {
        self.0.record.traffic.wait_no_more();
    }
}

/// Bytes of a body that are not written yet.
pub(super) struct Unsent<D> {
    data: D,
    held: Option<Held>,
}

struct Held(Arc<Lane>);

impl Held {
    #[inline]
    fn new(lane: &Arc<Lane>) -> Self {
        lane.record.traffic.hold();
        Self(Arc::clone(lane))
    }
}

impl Drop for Held {
    #[inline]
    fn drop(&mut self) {
        self.0.record.traffic.release();
    }
}

impl<D: Buf> Buf for Unsent<D> {
    #[inline]
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    #[inline]
    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn chunks_vectored<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        self.data.chunks_vectored(to)
    }

    #[inline]
    fn advance(&mut self, bytes: usize) {
        self.data.advance(bytes);
        if let Some(Held(lane)) = &self.held {
            lane.record.traffic.take();
        }
    }

    fn copy_to_bytes(&mut self, bytes: usize) -> Bytes {
        self.data.copy_to_bytes(bytes)
    }
}
