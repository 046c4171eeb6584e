//! Between hyper and the user's service: counts requests on the connection and
//! has HTTP/1 clients go elsewhere.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    Label, Phase,
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
    B: Body,
{
    type Response = Response<CountedBody<B>>;
    type Error = S::Error;
    type Future = CountedFuture<S, S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        CountedFuture {
            connect: request.method() == Method::CONNECT,
            open: Some(Open::new(&self.lane)),
            state: State::Waiting {
                service: self.service.clone(),
                request: Some(request),
            },
        }
    }
}

/// A request that is open on its connection until this is dropped.
struct Open(Arc<Lane>);

impl Open {
    fn new(lane: &Arc<Lane>) -> Self {
        lane.record.traffic.begin();
        Self(Arc::clone(lane))
    }

    /// The request has turned its connection, or its stream of one, into a
    /// tunnel, which ends when its socket does.
    #[cold]
    fn upgraded(self, route: Option<Label>) {
        let record = &self.0.record;
        if record.traffic.protocol() == Protocol::Http2 {
            // Counted for as long as the connection is there.
            record.traffic.begin();
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

pin_project! {
    pub(super) struct CountedFuture<S, F> {
        #[pin]
        state: State<S, F>,
        // None once the body has it.
        open: Option<Open>,
        connect: bool,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F> {
        Waiting { service: S, request: Option<Request<Incoming>> },
        Calling { #[pin] call: F },
    }
}

impl<S, B> Future for CountedFuture<S, S::Future>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    B: Body,
{
    type Output = Result<Response<CountedBody<B>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Waiting { service, request } => {
                    ready!(service.poll_ready(cx))?;
                    let request = request.take().expect("polled after completion");
                    let call = service.call(request);
                    this.state.set(State::Calling { call });
                }
                StateProj::Calling { call } => {
                    let (mut head, body) = ready!(call.poll(cx))?.into_parts();
                    let mut open = this.open.take();
                    let tunnel = match head.status {
                        StatusCode::SWITCHING_PROTOCOLS => true,
                        status => *this.connect && status.is_success(),
                    };
                    if let Some(request) = &open {
                        let lane = &*request.0;
                        if tunnel {
                            let route = head.extensions.remove::<Label>();
                            if let Some(open) = open.take() {
                                open.upgraded(route);
                            }
                        } else if leaves(lane) {
                            close(&mut head);
                        }
                    }
                    let body = CountedBody { body, _open: open };
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
            }
        }
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
    /// A response's body, whose request is open until hyper drops it.
    pub(super) struct CountedBody<B> {
        #[pin]
        body: B,
        _open: Option<Open>,
    }
}

impl<B: Body> Body for CountedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
