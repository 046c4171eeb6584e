//! Nodes of a fleet in one process: each with a Redis handle of its own.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::time::Duration;

use buttress_circuit_breaker::{Breaker, Settings, Sharing, State};
use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
};
use buttress_redis::{Cmd, FromRedisValue, Redis, testing::Server};

/// Within which something must have happened that takes milliseconds.
pub(crate) const SOON: Duration = Duration::from_secs(1);

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Opens at the second failure, for so long.
pub(crate) fn opens_for(wait: Duration) -> Settings {
    Settings::new()
        .consecutive_failures(2)
        .reset_timeout(wait)
        .half_open_timeout(ms(30_000))
}

pub(crate) fn node_of(sharing: Sharing, name: &str, settings: Settings) -> Breaker {
    Breaker::builder(name)
        .settings(settings)
        .redis(sharing)
        .build()
        .unwrap()
}

/// One that has joined.
pub(crate) async fn node(server: &Server, name: &str, settings: Settings) -> Breaker {
    joined(node_of((&server.redis()).into(), name, settings)).await
}

pub(crate) async fn joined(breaker: Breaker) -> Breaker {
    within(5 * SOON, "join", || breaker.fleet().unwrap().up).await;
    breaker
}

pub(crate) async fn nodes(server: &Server, count: usize, settings: &Settings) -> Vec<Breaker> {
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push(node(server, "shared", settings.clone()).await);
    }
    nodes
}

/// How long it took.
pub(crate) async fn within(limit: Duration, what: &str, is: impl Fn() -> bool) -> Duration {
    let began = clock::now();
    while !is() {
        let passed = clock::now() - began;
        assert!(passed < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(ms(1)).await;
    }
    clock::now() - began
}

pub(crate) fn fail(breaker: &Breaker) {
    if let Ok(permit) = breaker.try_acquire() {
        permit.record(Verdict::Failure);
    }
}

pub(crate) fn trip(breaker: &Breaker) {
    fail(breaker);
    fail(breaker);
    assert_eq!(breaker.state(), State::Open);
}

pub(crate) fn all(nodes: &[Breaker], state: State) -> bool {
    nodes.iter().all(|node| node.state() == state)
}

/// A call that succeeds; whether it was let through.
pub(crate) fn succeed(breaker: &Breaker) -> bool {
    let passed = breaker.try_acquire();
    passed.is_ok_and(|permit| {
        permit.record(Verdict::Success);
        true
    })
}

pub(crate) fn left(breaker: &Breaker) -> Duration {
    let now: Instant = clock::now();
    breaker.status().next_probe.expect("it is open") - now
}

pub(crate) async fn run<T: FromRedisValue>(redis: &Redis, words: &[&str]) -> T {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(*word);
    }
    redis.run("test", &cmd).await.unwrap()
}
