//! What is measured of retries: ours and the peers' over one bare service, and
//! bodies that are remembered as they stream.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress_core::Any;
use buttress_retry::{AnyError, Errors, ReplayBody, RetryLayer, Settings};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use tower::{
    Layer, Service,
    retry::{Policy, Retry},
    service_fn,
};
use tower_resilience_retry::RetryLayer as Resilience;

use crate::{
    breaker::{Failed, bare, healthy},
    measure::Run,
    scenarios::Named,
};

fn ours(settings: Settings) -> RetryLayer<Any<u64>, Errors<AnyError>> {
    let layer = RetryLayer::any().settings(settings).build();
    layer.expect("sound settings")
}

/// Three attempts and no end, as the peers have it.
fn plain() -> Settings {
    Settings::standard().total_timeout(None)
}

/// tower's own, with the least that a policy can be.
#[derive(Clone, Debug)]
struct Thrice(u32);

impl Policy<u64, u64, Failed> for Thrice {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut u64, result: &mut Result<u64, Failed>) -> Option<Ready<()>> {
        if result.is_ok() || self.0 == 0 {
            return None;
        }
        self.0 -= 1;
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &u64) -> Option<u64> {
        Some(*request)
    }
}

/// What every request over HTTP has.
fn request<B>(body: B) -> Request<B> {
    Request::post("http://127.0.0.1/orders?new")
        .header("content-type", "application/json")
        .header("accept", "application/json")
        .header("idempotency-key", "1f2e")
        .body(body)
        .expect("sound parts")
}

/// A body of so many frames of one piece of memory.
#[derive(Debug)]
pub struct Frames {
    frame: Bytes,
    left: usize,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(self.frame.clone()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact((self.frame.len() * self.left) as u64)
    }
}

/// One body of a kibibyte.
const SMALL: &[u8] = &[7; 1024];
/// Ten mebibytes, in frames as hyper reads them.
const FRAMES: usize = 640;
const FRAME: &[u8] = &[7; 16 * 1024];

fn small() -> Frames {
    Frames {
        frame: Bytes::from_static(SMALL),
        left: 1,
    }
}

fn large() -> Frames {
    Frames {
        frame: Bytes::from_static(FRAME),
        left: FRAMES,
    }
}

/// Reads a body to its end, as a connection would: every byte of it is looked
/// at once, which is less than to copy it to a socket.
fn swallow<B: Body<Data = Bytes>>(request: Request<B>) -> u64 {
    let mut cx = Context::from_waker(Waker::noop());
    let (parts, body) = request.into_parts();
    black_box(parts);
    let mut body = pin!(body);
    let mut sum = 0_u64;
    while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
        let data = frame.into_data().unwrap_or_default();
        sum += data.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    }
    sum
}

type Answer = Ready<Result<Response<()>, Infallible>>;

fn sink<B: Body<Data = Bytes>>(
    bytes: u64,
) -> impl Service<Request<B>, Response = Response<()>, Error = Infallible, Future = Answer> + Clone + Send
{
    service_fn(move |request: Request<B>| {
        assert_eq!(swallow(request), 7 * bytes);
        ready(Ok(Response::new(())))
    })
}

fn sent<S>(mut service: S, body: fn() -> Frames) -> Run
where
    S: Service<Request<Frames>, Error = Infallible> + Send + 'static,
{
    Box::new(move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..calls {
            assert!(service.poll_ready(&mut cx).is_ready());
            let future = pin!(service.call(request(body())));
            assert!(future.poll(&mut cx).is_ready());
        }
    })
}

/// The same, with a copy of the request's head beside it: what any retry needs.
fn sent_with_a_copy(body: fn() -> Frames, bytes: u64) -> Run {
    let mut service = sink::<Frames>(bytes);
    Box::new(move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..calls {
            let (parts, body) = request(body()).into_parts();
            let copy = parts.clone();
            let future = pin!(service.call(Request::from_parts(parts, body)));
            assert!(future.poll(&mut cx).is_ready());
            black_box(copy);
        }
    })
}

fn http() -> RetryLayer {
    let layer = RetryLayer::builder().settings(plain()).build();
    layer.expect("sound settings")
}

const KIBIBYTE: u64 = SMALL.len() as u64;
const TEN_MEBIBYTES: u64 = (FRAME.len() * FRAMES) as u64;

/// All that can be counted.
pub const ALL: &[Named] = &[
    ("bare", || healthy(bare())),
    ("ours", || healthy(ours(plain()).layer(bare()))),
    ("ours, 30 s in all", || {
        healthy(ours(Settings::standard()).layer(bare()))
    }),
    ("tower", || healthy(Retry::new(Thrice(2), bare()))),
    ("tower-resilience", || {
        let layer = Resilience::<u64, u64, Failed>::builder()
            .max_attempts(3)
            .fixed_backoff(Duration::from_secs(1))
            .build();
        healthy(layer.layer(bare()))
    }),
    ("http, 1 KiB, bare", || sent(sink(KIBIBYTE), small)),
    ("http, 1 KiB, a copy of the head", || {
        sent_with_a_copy(small, KIBIBYTE)
    }),
    ("http, 1 KiB, ours", || {
        sent(http().layer(sink::<ReplayBody<Frames>>(KIBIBYTE)), small)
    }),
    ("http, 10 MiB, bare", || sent(sink(TEN_MEBIBYTES), large)),
    ("http, 10 MiB, ours", || {
        sent(
            http().layer(sink::<ReplayBody<Frames>>(TEN_MEBIBYTES)),
            large,
        )
    }),
];

/// The run of that name.
#[must_use]
pub fn named(name: &str) -> Option<Run> {
    let (_, make) = ALL.iter().find(|(known, _)| *known == name)?;
    Some(make())
}
