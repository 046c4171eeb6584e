//! What is measured of the delivery: what `emit` costs, whoever else has
//! registered.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::pin,
    task::{Context, Poll, Waker},
};

use buttress_delivery::{Event, Registration, Webhooks};
use buttress_webhook::WholeBody;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tower::service_fn;

use crate::measure::Run;

/// Never asked: what is emitted stays in the queue.
fn transport(_: Request<WholeBody>) -> Ready<Result<Response<Empty<Bytes>>, Infallible>> {
    ready(Ok(Response::new(Empty::new())))
}

/// Emits an event to 10 of those who have registered, among so many others.
///
/// # Panics
///
/// If the settings are not sound, or the queue is full: it has room for 100 000
/// calls.
#[must_use]
pub fn emit(others: usize) -> Run {
    let webhooks = Webhooks::builder()
        .capacity(1_000_000)
        .build(service_fn(transport))
        .expect("sound settings");
    let register = |number: usize, pattern: String| {
        let registration = Registration::new(format!("https://example.com/{number}"));
        let registered = webhooks.register(registration.events([pattern]));
        registered.expect("a sound registration");
    };
    for number in 0..10 {
        register(number, ["order.paid", "order.*"][number % 2].into());
    }
    for number in 0..others {
        register(number, format!("order.{number}.*"));
    }
    let data = serde_json::json!({ "order": 17, "amount": 1200, "currency": "EUR" });
    Box::new(move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..calls {
            let emitted = pin!(webhooks.emit(Event::new("order.paid", data.clone())));
            let Poll::Ready(count) = emitted.poll(&mut cx) else {
                panic!("the memory store does not wait");
            };
            assert_eq!(count.expect("there is room"), 10);
        }
    })
}
