//! What the hot paths cost: no allocation where the answer is there at once.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress_core::{clock, deadline::Deadline};
use buttress_timeout::TimeoutLayer;
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
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("pending"),
    }
}

fn answer(_: Request<()>) -> Ready<Result<Response<Full<Bytes>>, Infallible>> {
    ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
}

/// There is no runtime here, so that a timer would panic.
#[test]
fn an_answer_at_once_costs_no_allocation() {
    let layer = TimeoutLayer::any().limit(SECOND).build().unwrap();
    let mut service = layer.layer(service_fn(|fine: bool| {
        ready(if fine { Ok(()) } else { Err(()) })
    }));
    let cost = allocations(|| {
        for fine in [true, false, true] {
            assert_eq!(poll(service.call(fine)).is_ok(), fine);
        }
    });
    assert_eq!(cost, 0);

    let layer = TimeoutLayer::builder().limit(SECOND).build().unwrap();
    let mut service = layer.layer(service_fn(answer));
    let cost = allocations(|| {
        let response = poll(service.call(Request::new(()))).unwrap();
        assert_eq!(response.status(), 200);
    });
    assert_eq!(cost, 0);

    let layer = TimeoutLayer::builder().limit(SECOND).to_the_end();
    let mut service = layer.build().unwrap().layer(service_fn(answer));
    let cost = allocations(|| {
        let response = poll(service.call(Request::new(()))).unwrap();
        let mut body = std::pin::pin!(response.into_body());
        let frame = poll(body.frame()).unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "hello");
    });
    assert_eq!(cost, 0);
}

#[test]
fn a_deadline_that_is_there_is_brought_nearer_in_its_place() {
    let layer = TimeoutLayer::builder().limit(SECOND).errors();
    let mut service = layer.build().unwrap().layer(service_fn(answer));
    let far = Deadline::at(clock::now() + SECOND * 3600);
    let mut requests: Vec<_> = (0..2)
        .map(|_| Request::builder().extension(far).body(()).unwrap())
        .collect();
    let cost = allocations(|| {
        let request = requests.pop().unwrap();
        assert!(poll(service.call(request)).is_ok());
    });
    assert_eq!(cost, 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_and_fails_costs_no_allocation() {
    let layer = TimeoutLayer::any().limit(SECOND).build().unwrap();
    let mut service = layer.layer(service_fn(|(): ()| {
        std::future::pending::<Result<(), ()>>()
    }));
    // The runtime's own list of timers is there after the first.
    let call = service.call(());
    assert!(call.await.is_err());
    let mut call = std::pin::pin!(service.call(()));
    let mut cost = allocation_counter::measure(|| {
        let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
    })
    .count_total;
    tokio::time::advance(SECOND).await;
    cost += allocation_counter::measure(|| {
        let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(Err(error)) = polled else {
            panic!("not over");
        };
        assert_eq!(error.elapsed().unwrap().after(), SECOND);
    })
    .count_total;
    assert_eq!(cost, 0);
}
