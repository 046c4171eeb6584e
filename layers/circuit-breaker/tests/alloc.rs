//! What the hot paths cost: no allocation, closed or refused as an error.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll, Waker},
};

use buttress_circuit_breaker::{CircuitBreakerLayer, Settings, Window};
use buttress_core::body::GuardedBody;
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

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
}

#[test]
fn closed_costs_no_allocation() {
    for settings in [
        Settings::new(),
        Settings::new().failure_rate(0.5),
        Settings::new()
            .failure_rate(0.5)
            .slow_calls(std::time::Duration::from_secs(1), 0.5)
            .window(Window::Time(std::time::Duration::from_secs(10))),
    ] {
        let layer = CircuitBreakerLayer::any()
            .settings(settings.clone())
            .build()
            .unwrap();
        let mut service = layer.layer(service_fn(|fine: bool| {
            ready(if fine { Ok(()) } else { Err(()) })
        }));
        let cost = allocations(|| {
            for fine in [true, true, false, true] {
                assert_eq!(poll(service.call(fine)).is_ok(), fine);
            }
        });
        assert_eq!(cost, 0, "{settings:?}");

        let layer = CircuitBreakerLayer::builder()
            .settings(settings)
            .build()
            .unwrap();
        let mut service = layer.layer(service_fn(answer));
        let cost = allocations(|| {
            let response = poll(service.call(Request::new(()))).unwrap();
            let mut body = std::pin::pin!(response.into_body());
            let frame = poll(body.frame()).unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), "hello");
        });
        assert_eq!(cost, 0);
    }
}

#[test]
fn a_refusal_as_an_error_costs_no_allocation() {
    let layer = CircuitBreakerLayer::any().build().unwrap();
    let mut service = layer.layer(service_fn(|_: ()| ready(Ok::<_, Infallible>(()))));
    layer.breaker().trip(None).unwrap();
    let cost = allocations(|| {
        for _ in 0..10 {
            let error = poll(service.call(())).unwrap_err();
            assert!(error.open().unwrap().retry_after().is_some());
        }
    });
    assert_eq!(cost, 0);

    let layer = CircuitBreakerLayer::builder().errors().build().unwrap();
    let mut service = layer.layer(service_fn(answer));
    layer.breaker().force_open();
    let cost = allocations(|| {
        let result: Result<Response<GuardedBody<_, _>>, _> = poll(service.call(Request::new(())));
        assert!(result.unwrap_err().open().is_some());
    });
    assert_eq!(cost, 0);
}

/// As a response: the name for the logs, the body in its box, and what a header
/// map needs.
#[test]
fn a_refusal_as_a_response_costs_little() {
    let layer = CircuitBreakerLayer::builder().build().unwrap();
    let mut service = layer.layer(service_fn(answer));
    layer.breaker().trip(None).unwrap();
    let cost = allocations(|| {
        let response = poll(service.call(Request::new(()))).unwrap();
        assert_eq!(response.status(), 503);
    });
    assert!(cost <= 4, "{cost}");
}
