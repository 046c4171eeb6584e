//! A sender under a paused clock, and a receiver that follows a script.
#![allow(dead_code, unreachable_pub)]

use std::{sync::Arc, time::Duration};

use buttress_core::{
    clock,
    testing::{Script, ScriptHandle, Scripted, Step, web::ScriptedBody},
};
use buttress_delivery::{
    Cause, DeliveryResult, Event, Registration, Status, Webhooks, WebhooksBuilder,
};
use buttress_webhook::{Scheme, Secret, Verifier, WholeBody};
use http::{Request, Response, StatusCode};
use serde_json::json;

pub type Sent = Request<WholeBody>;
pub type Answer = Step<Response<ScriptedBody>, &'static str>;
pub type Transport = Scripted<Sent, Response<ScriptedBody>, &'static str>;
pub type Receiver = ScriptHandle<Sent, Response<ScriptedBody>, &'static str>;

pub const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// The Unix time at which a test's first second begins.
pub const EPOCH: u64 = 1_700_000_000;

pub const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub fn secret() -> Secret {
    Secret::new(SECRET).unwrap()
}

pub fn with(status: u16, headers: &[(&'static str, &str)], body: ScriptedBody) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for (name, value) in headers {
        response.headers_mut().insert(*name, value.parse().unwrap());
    }
    Step::ok(response)
}

pub fn status(status: u16) -> Answer {
    with(status, &[], ScriptedBody::new())
}

/// Answers each request as it is told.
pub fn receiver(answer: impl Fn(&Sent) -> Answer + Send + Sync + 'static) -> (Transport, Receiver) {
    Script::new().pending_first().otherwise(answer).build()
}

/// Without jitter: each retry waits for the whole of its delay. And a time of
/// day that goes with the paused clock.
pub fn builder() -> WebhooksBuilder {
    let began = clock::now();
    Webhooks::builder()
        .random(|| u64::MAX)
        .wall_clock(move || secs(EPOCH) + (clock::now() - began))
}

pub fn hook(url: &str) -> Registration {
    Registration::new(url).events(["*"])
}

pub fn only(url: &str, patterns: &[&str]) -> Registration {
    Registration::new(url).events(patterns.iter().copied())
}

pub fn event(name: &str) -> Event {
    Event::new(name, json!({"text": "hello"}))
}

/// How the newest deliveries stand, the oldest of them first.
pub fn standings(webhooks: &Webhooks) -> Vec<(Status, u32, Option<Cause>)> {
    let results = webhooks.results(None, None);
    let mut standings: Vec<_> = results
        .iter()
        .map(|result| (result.status, result.attempt, result.error.clone()))
        .collect();
    standings.reverse();
    standings
}

pub fn newest(webhooks: &Webhooks) -> Arc<DeliveryResult> {
    webhooks.results(None, 1).remove(0)
}

pub fn failing(code: u16) -> Option<Cause> {
    Some(Cause::Status(StatusCode::from_u16(code).unwrap()))
}

/// Whether a request is what the scheme signs, at this time.
pub fn is_signed(scheme: impl Scheme, request: &Sent, unix: Duration) -> bool {
    let verifier = Verifier::new(scheme, [secret()]).unwrap();
    let verified = verifier.verify(request.into(), request.body().bytes(), unix);
    verified.is_ok()
}
