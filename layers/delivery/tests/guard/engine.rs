//! Deliveries over the guarded client.

use std::time::Duration;

use buttress_delivery::{
    Cause, DeadLetter, Event, RegisterError, Registration, Webhooks,
    client::ClientBuilder,
    guard::{Guard, Rule},
};
use serde_json::json;

use crate::{Answers, Trap, client::trusting};

fn registration(host: &str, port: u16) -> Registration {
    Registration::new(format!("http://{host}:{port}/hooks"))
        .events(["*"])
        .retry_delay(Duration::from_millis(1))
}

/// What becomes of one event to `registration`, whose transport's guard and
/// resolver are these.
async fn dead(guard: Guard, answers: Answers, registration: Registration) -> DeadLetter {
    let client = ClientBuilder::new(guard, trusting(&[]))
        .resolver(answers)
        .build();
    let webhooks = Webhooks::builder().build(client).unwrap();
    webhooks.register(registration).unwrap();
    let worker = webhooks.start().unwrap();
    let event = Event::new("request.completed", json!({}));
    assert_eq!(webhooks.emit(event).await.unwrap(), 1);
    for _ in 0..1000 {
        if let Some(letter) = webhooks.dead_letters().pop() {
            worker.stop(Duration::from_secs(1)).await;
            return letter;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it is neither delivered nor dead");
}

#[tokio::test]
async fn what_may_not_be_dialled_is_dead_at_once() {
    let trap = Trap::set().await;
    let inside = Answers::new([&["127.0.0.1"]]);
    for host in ["hooks.example.com", "127.0.0.1", "[::1]", "localhost"] {
        let guard = Guard::new().allow_http();
        let letter = dead(guard, inside.clone(), registration(host, trap.port())).await;
        assert_eq!(letter.record.attempts, 1, "{host}");
        let Cause::Denied(denied) = letter.cause else {
            panic!("{host}: {:?}", letter.cause);
        };
        assert_eq!(denied.rule(), Rule::Address);
    }
    trap.assert_untouched().await;
}

#[tokio::test]
async fn a_url_that_says_it_is_refused_when_it_is_registered() {
    let guard = Guard::new().allow_http();
    let client = ClientBuilder::new(guard.clone(), trusting(&[])).build();
    let webhooks = Webhooks::builder().guard(guard).build(client).unwrap();
    for host in ["127.0.0.1", "[::ffff:10.0.0.1]", "localhost", "2130706433"] {
        let refused = webhooks.register(registration(host, 80)).unwrap_err();
        assert!(matches!(refused, RegisterError::Denied(_)), "{host}");
    }
    assert!(webhooks.list().is_empty());
    // What a name means is seen when it is dialled.
    webhooks
        .register(registration("hooks.example.com", 80))
        .unwrap();
}
