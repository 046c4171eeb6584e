//! What the hot paths cost: no allocation, unless something was asked for.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll, Waker},
};

use buttress_drain::{DrainLayer, RefuseLayer, Shutdown};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, service_fn};

/// Runs it twice, for what is made once, and counts the second.
fn allocations(mut work: impl FnMut()) -> u64 {
    work();
    allocation_counter::measure(work).count_total
}

fn poll<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    match future.as_mut().poll(&mut cx) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("pending"),
    }
}

fn answer(_: Request<()>) -> Ready<Result<Response<Full<Bytes>>, Infallible>> {
    ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
}

/// There is no runtime here.
fn cost(layer: &impl Layer<tower::util::ServiceFn<Answer>, Service = impl Ask>) -> u64 {
    let mut service = layer.layer(service_fn(answer as Answer));
    allocations(|| service.ask())
}

type Answer = fn(Request<()>) -> Ready<Result<Response<Full<Bytes>>, Infallible>>;

trait Ask {
    fn ask(&mut self);
}

impl<S, B> Ask for S
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: http_body::Body<Data = Bytes, Error = Infallible>,
{
    fn ask(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(self.poll_ready(&mut cx).is_ready());
        let response = poll(self.call(Request::new(()))).unwrap();
        let mut body = std::pin::pin!(response.into_body());
        let frame = poll(body.frame()).unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "hello");
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
}

#[test]
fn a_request_costs_no_allocation() {
    let shutdown = Shutdown::builder().build().unwrap();
    assert_eq!(cost(&DrainLayer::new(&shutdown)), 0);
    let streams = DrainLayer::new(&shutdown).end_streams(["text/event-stream"]);
    assert_eq!(cost(&streams), 1);
    assert_eq!(cost(&RefuseLayer::new(&shutdown)), 0);
    // Its place in the list is used again.
    assert_eq!(cost(&DrainLayer::new(&shutdown).route("/")), 1);
    // The first extension of a request.
    assert!(cost(&DrainLayer::new(&shutdown).signal()) > 0);
}

#[test]
fn a_guard_costs_no_allocation() {
    let shutdown = Shutdown::builder().build().unwrap();
    assert_eq!(allocations(|| drop(shutdown.guard("job"))), 0);
    assert_eq!(allocations(|| drop(shutdown.try_guard("job"))), 0);
}
