//! What is measured of the drain: the layer over a bare HTTP service, with all
//! that may be asked of it.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use buttress_drain::{DrainLayer, RefuseLayer, Shutdown};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use tower::{Layer, Service, service_fn};

use crate::{measure::Run, scenarios::Named};

/// A body of one frame, or none.
#[derive(Debug)]
pub struct One(Option<Bytes>);

impl Body for One {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, |data| data.len() as u64))
    }
}

type Answer = Ready<Result<Response<One>, Infallible>>;

/// Answers at once, with so much of a body.
fn bare(
    data: &'static [u8],
) -> impl Service<Request<()>, Response = Response<One>, Error = Infallible, Future = Answer>
+ Clone
+ Send {
    service_fn(move |_: Request<()>| {
        let body = One((!data.is_empty()).then(|| Bytes::from_static(data)));
        ready(Ok(Response::new(body)))
    })
}

/// Requests, one after the other, each to the end of its response's body.
pub fn requests<S, B>(mut service: S) -> Run
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible> + Send + 'static,
    B: Body<Data = Bytes, Error = Infallible>,
{
    Box::new(move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..calls {
            assert!(service.poll_ready(&mut cx).is_ready());
            let call = pin!(service.call(black_box(Request::new(()))));
            let Poll::Ready(Ok(response)) = call.poll(&mut cx) else {
                panic!("it is ready, and has no error");
            };
            let mut body = pin!(response.into_body());
            while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
                black_box(frame);
                if body.is_end_stream() {
                    break;
                }
            }
        }
    })
}

fn shutdown() -> Shutdown {
    Shutdown::builder().build().expect("sound settings")
}

/// Two runs on clones of one service.
#[must_use]
pub fn shared() -> [Run; 2] {
    let service = DrainLayer::new(&shutdown()).layer(bare(b"hello"));
    [requests(service.clone()), requests(service)]
}

/// Two runs on a service each, of a shutdown each.
#[must_use]
pub fn apart() -> [Run; 2] {
    [(); 2].map(|()| requests(DrainLayer::new(&shutdown()).layer(bare(b"hello"))))
}

/// All that can be counted.
pub const ALL: &[Named] = &[
    ("bare", || requests(bare(b"hello"))),
    ("bare, empty", || requests(bare(b""))),
    ("counted, empty", || {
        requests(DrainLayer::new(&shutdown()).layer(bare(b"")))
    }),
    ("counted", || {
        requests(DrainLayer::new(&shutdown()).layer(bare(b"hello")))
    }),
    ("tracked", || {
        requests(
            DrainLayer::new(&shutdown())
                .route("/")
                .layer(bare(b"hello")),
        )
    }),
    ("streams", || {
        let layer = DrainLayer::new(&shutdown()).end_streams(["text/event-stream"]);
        requests(layer.layer(bare(b"hello")))
    }),
    ("signal", || {
        requests(DrainLayer::new(&shutdown()).signal().layer(bare(b"hello")))
    }),
    ("refuse", || {
        requests(RefuseLayer::new(&shutdown()).layer(bare(b"hello")))
    }),
];

/// The run of that name.
#[must_use]
pub fn named(name: &str) -> Option<Run> {
    let (_, make) = ALL.iter().find(|(known, _)| *known == name)?;
    Some(make())
}
