//! The breaker in the hand: calls, permits, changes by hand, settings.

use std::{
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, Cause, Error, Event, Permit, Reason, ReopenBackoff, Rule, Settings, State,
    TransitionError, Window,
};
use buttress_core::{
    classify::Verdict::{Failure, Ignored, Success},
    clock,
    health::{Health, HealthSource},
};
use tokio::time::advance;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Opens at one failure, or one of two calls that is slow, from 2 s on.
fn touchy() -> Settings {
    Settings::new()
        .consecutive_failures(1)
        .slow_calls(secs(2), 0.5)
        .window(Window::Calls(2))
}

fn breaker(settings: Settings) -> Breaker {
    Breaker::builder("breaker")
        .settings(settings)
        .build()
        .unwrap()
}

fn half_open(settings: Settings) -> Breaker {
    let breaker = breaker(settings);
    breaker.trip(None).unwrap();
    breaker.half_open().unwrap();
    breaker
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_future_or_before_it_is_a_failure() {
    for before in [true, false] {
        let breaker = breaker(touchy());
        let caller = breaker.clone();
        let task = tokio::spawn(async move {
            let call = || {
                if before {
                    resume_unwind(Box::new("in the closure"));
                }
                async { resume_unwind(Box::new("in the future")) }
            };
            caller.call::<_, _, (), ()>(call).await
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!(breaker.state(), State::Open);
    }
}

#[tokio::test(start_paused = true)]
async fn a_panicking_probe_opens_it_and_frees_nothing_twice() {
    let breaker = half_open(touchy().half_open_probes(2).half_open_failures(1));
    let mut permit = breaker.try_acquire().unwrap();
    let step = || permit.during(|| resume_unwind(Box::new(())));
    assert!(catch_unwind(AssertUnwindSafe(step)).is_err());
    drop(permit);
    let status = breaker.status();
    assert_eq!((status.probes_in_flight, status.failures), (0, 1));
    // A step that does not panic says nothing.
    let mut permit = breaker.try_acquire().unwrap();
    assert_eq!(permit.during(|| 7), 7);
    permit.record(Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_call_given_up_on_counts_only_if_it_was_slow() {
    let breaker = breaker(touchy());
    let give_up_after = |span| {
        let breaker = &breaker;
        async move {
            let call = breaker.call(async || pending::<Result<(), ()>>().await);
            assert!(tokio::time::timeout(span, call).await.is_err());
        }
    };
    give_up_after(secs(1)).await;
    assert_eq!(breaker.status().calls, 0);
    breaker.try_acquire().unwrap().record(Success);
    give_up_after(secs(2)).await;
    // One of two was slow.
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_probe_given_up_on_decides_nothing_unless_asked_to() {
    for count in [false, true] {
        let breaker = half_open(touchy().count_dropped_probes(count));
        drop(breaker.try_acquire().unwrap());
        assert_eq!(breaker.state(), State::HalfOpen);
        let probe = breaker.try_acquire().unwrap();
        assert!(breaker.try_acquire().is_err());
        advance(secs(2)).await;
        drop(probe);
        let expected = if count { State::Open } else { State::HalfOpen };
        assert_eq!(breaker.state(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_until_the_head_counts_and_not_that_of_the_body() {
    let breaker = breaker(touchy());
    let mut permit = breaker.try_acquire().unwrap();
    permit.arrived();
    advance(secs(100)).await;
    permit.record(Success);
    assert_eq!(breaker.status().slow, 0);
    // Nor is a body given up on a slow call.
    let mut permit = breaker.try_acquire().unwrap();
    permit.arrived();
    advance(secs(100)).await;
    drop(permit);
    assert_eq!(breaker.status().calls, 1);
}

#[tokio::test(start_paused = true)]
async fn a_slow_probe_is_a_failed_one() {
    let breaker = half_open(touchy());
    let probe = breaker.try_acquire().unwrap();
    advance(secs(2)).await;
    probe.record(Success);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn holding_off_opens_whatever_the_verdict() {
    for verdict in [Success, Failure, Ignored] {
        // A call; then a probe.
        let breaker = breaker(Settings::new());
        let permit = breaker.try_acquire().unwrap();
        permit.record_holding_off(verdict, secs(45));
        assert_eq!(breaker.state(), State::Open);
        let open = breaker.try_acquire().unwrap_err();
        assert_eq!(open.retry_after(), Some(secs(45)));
        advance(secs(45)).await;
        let probe = breaker.try_acquire().unwrap();
        probe.record_holding_off(verdict, secs(100));
        let open = breaker.try_acquire().unwrap_err();
        assert_eq!(open.retry_after(), Some(secs(100)));
        // Not for less than it would be open by itself.
        advance(secs(100)).await;
        let probe = breaker.try_acquire().unwrap();
        probe.record_holding_off(verdict, secs(1));
        let open = breaker.try_acquire().unwrap_err();
        assert_eq!(open.retry_after(), Some(secs(30)));
    }
}

#[tokio::test(start_paused = true)]
async fn holding_off_for_no_time_is_not_asking() {
    let breaker = breaker(Settings::new());
    let permit = breaker.try_acquire().unwrap();
    permit.record_holding_off(Success, Duration::ZERO);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_wait_without_end_is_a_year() {
    let breaker = breaker(Settings::new());
    let permit = breaker.try_acquire().unwrap();
    permit.record_holding_off(Failure, Duration::MAX);
    let open = breaker.try_acquire().unwrap_err();
    assert_eq!(open.retry_after(), Some(secs(366 * 24 * 3600)));
    breaker.reset();
    breaker.trip(Duration::MAX).unwrap();
    let next = breaker.status().next_probe.unwrap();
    assert_eq!(next - clock::now(), secs(366 * 24 * 3600));
}

#[tokio::test(start_paused = true)]
async fn changes_by_hand_that_make_no_sense() {
    type Change = fn(&Breaker) -> Result<(), TransitionError>;
    type Case = (State, fn() -> Breaker, &'static [State]);
    let changes: [(State, Change); 3] = [
        (State::Open, |breaker| breaker.trip(None)),
        (State::HalfOpen, Breaker::half_open),
        (State::Closed, Breaker::close),
    ];
    let states: [Case; 6] = [
        (State::Closed, || breaker(touchy()), &[State::Open]),
        (
            State::Open,
            || {
                let breaker = breaker(touchy());
                breaker.trip(None).unwrap();
                breaker
            },
            &[State::HalfOpen, State::Closed],
        ),
        (
            State::HalfOpen,
            || half_open(touchy()),
            &[State::Open, State::Closed],
        ),
        (
            State::ForcedOpen,
            || {
                let breaker = breaker(touchy());
                breaker.force_open();
                breaker
            },
            &[],
        ),
        (
            State::ForcedClosed,
            || {
                let breaker = breaker(touchy());
                breaker.force_closed();
                breaker
            },
            &[],
        ),
        (
            State::MetricsOnly,
            || {
                let breaker = breaker(touchy());
                breaker.metrics_only();
                breaker
            },
            &[],
        ),
    ];
    for (from, make, sensible) in states {
        for (to, change) in changes {
            let breaker = make();
            assert_eq!(breaker.state(), from);
            let generation = breaker.status().generation;
            let result = change(&breaker);
            if sensible.contains(&to) {
                assert_eq!(result, Ok(()), "{from} to {to}");
                assert_eq!(breaker.state(), to);
            } else {
                assert_eq!(result, Err(TransitionError { from, to }));
                assert_eq!(breaker.status().generation, generation);
            }
            breaker.reset();
            assert_eq!(breaker.state(), State::Closed);
        }
    }
}

/// It was half-open still to who did it by hand, and open to who looked.
#[tokio::test(start_paused = true)]
async fn by_hand_half_open_that_is_overdue_is_open() {
    let overdue = || async {
        let breaker = half_open(touchy());
        advance(secs(31)).await;
        breaker
    };
    assert!(overdue().await.trip(None).is_err());
    assert_eq!(overdue().await.half_open(), Ok(()));
    let breaker = overdue().await;
    breaker.configure(touchy()).unwrap();
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(overdue().await.health(), Health::UNHEALTHY);
}

#[tokio::test(start_paused = true)]
async fn new_settings_count_anew_and_keep_the_state() {
    let breaker = breaker(Settings::new().consecutive_failures(3));
    let fail = || breaker.try_acquire().unwrap().record(Failure);
    let early = breaker.try_acquire().unwrap();
    fail();
    fail();
    breaker
        .configure(Settings::new().consecutive_failures(2))
        .unwrap();
    early.record(Failure);
    fail();
    assert_eq!(breaker.state(), State::Closed);
    fail();
    assert_eq!(breaker.state(), State::Open);
    // The wait that it has stays.
    let next = breaker.status().next_probe;
    breaker
        .configure(Settings::new().reset_timeout(secs(1)))
        .unwrap();
    assert_eq!(breaker.status().next_probe, next);
    let nonsense = Settings::new().failure_rate(7.0);
    assert!(breaker.configure(nonsense).is_err());
    assert_eq!(breaker.settings(), Settings::new().reset_timeout(secs(1)));
}

/// A call that was timed by settings that are gone was always slow.
#[tokio::test(start_paused = true)]
async fn without_a_rule_nothing_is_slow() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let breaker = Breaker::builder("breaker")
        .settings(touchy())
        .on_event(move |_, event| hears.lock().unwrap().push(*event))
        .build()
        .unwrap();
    let permit = breaker.try_acquire().unwrap();
    breaker.configure(Settings::new()).unwrap();
    permit.record(Success);
    assert_eq!(
        *heard.lock().unwrap(),
        [Event::Call, Event::Success { slow: false }]
    );
}

/// With a run as a rule and none under way it told the window's failures.
#[tokio::test(start_paused = true)]
async fn the_failures_of_a_run_are_those_of_the_run() {
    let breaker = breaker(Settings::new().consecutive_failures(5).failure_rate(0.9));
    for verdict in [Failure, Failure, Success] {
        breaker.try_acquire().unwrap().record(verdict);
    }
    let status = breaker.status();
    assert_eq!((status.failures, status.failed, status.calls), (0, 2, 3));
}

/// It was 0 as soon as they had opened it, and nobody could say what had.
#[tokio::test(start_paused = true)]
async fn what_opened_it_is_told_while_it_is_open() {
    let told = |breaker: &Breaker| {
        let status = breaker.status();
        (status.state, status.opened_by, status.failures)
    };
    let by = |rule| Some(Cause::Rule(rule));
    let runs = breaker(Settings::new().consecutive_failures(3));
    for _ in 0..3 {
        runs.try_acquire().unwrap().record(Failure);
    }
    let rule = by(Rule::ConsecutiveFailures);
    assert_eq!(told(&runs), (State::Open, rule, 3));
    advance(secs(30)).await;
    let probe = runs.try_acquire().unwrap();
    assert_eq!(told(&runs), (State::HalfOpen, rule, 0));
    probe.record(Failure);
    assert_eq!(told(&runs), (State::Open, Some(Cause::ProbeFailed), 1));
    runs.close().unwrap();
    assert_eq!(told(&runs), (State::Closed, None, 0));

    let rate = Settings::new().failure_rate(0.5).minimum_calls(4);
    let rates = breaker(rate.consecutive_failures(100));
    for verdict in [Failure, Failure, Success, Failure] {
        rates.try_acquire().unwrap().record(verdict);
    }
    assert_eq!(told(&rates), (State::Open, by(Rule::FailureRate), 3));
    rates.force_open();
    assert_eq!(told(&rates), (State::ForcedOpen, None, 0));
    rates.reset();
    rates.try_acquire().unwrap().record(Failure);
    rates.trip(None).unwrap();
    assert_eq!(told(&rates), (State::Open, Some(Cause::Manual), 1));
}

/// A day at the ceiling, and two hours of health, were not enough to forget it.
#[tokio::test(start_paused = true)]
async fn a_long_outage_is_forgotten_as_soon_as_one_that_reached_the_ceiling() {
    let settings = Settings::new()
        .consecutive_failures(1)
        .reset_timeout(secs(10))
        .reopen_backoff(ReopenBackoff::new(2.0).max(secs(80)));
    let breaker = breaker(settings);
    for _ in 0..1000 {
        breaker.try_acquire().unwrap().record(Failure);
        advance(breaker.status().next_probe.unwrap() - clock::now()).await;
    }
    breaker.try_acquire().unwrap().record(Success);
    advance(secs(30)).await;
    breaker.try_acquire().unwrap().record(Failure);
    let open = breaker.try_acquire().unwrap_err();
    assert_eq!(open.retry_after(), Some(secs(10)));
}

/// A listener may use the breaker: no lock is held, and the change is there.
#[tokio::test(start_paused = true)]
async fn a_listener_may_call_back() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    let handle = Arc::new(OnceLock::<Breaker>::new());
    let inside = Arc::clone(&handle);
    let breaker = Breaker::builder("breaker")
        .settings(touchy())
        .on_event(move |name, event| {
            let breaker = inside.get().unwrap();
            let status = breaker.status();
            if let Event::StateChange(change) = event {
                assert_eq!(name, "breaker");
                sees.lock().unwrap().push((change.to, status.state));
                if change.cause == Cause::Rule(Rule::ConsecutiveFailures) {
                    breaker.reset();
                }
            }
        })
        .build()
        .unwrap();
    handle.set(breaker.clone()).unwrap();
    breaker.try_acquire().unwrap().record(Failure);
    assert_eq!(
        *seen.lock().unwrap(),
        [(State::Open, State::Open), (State::Closed, State::Closed)]
    );
}

/// A listener that panics on admission, which it must not, took the probe's
/// place with it.
#[tokio::test(start_paused = true)]
async fn a_listener_that_panics_costs_no_place() {
    let of_the_call = |event: &Event| *event == Event::Call;
    let of_the_change =
        |event: &Event| matches!(event, Event::StateChange(change) if change.to == State::HalfOpen);
    let panics: [fn(&Event) -> bool; 2] = [of_the_call, of_the_change];
    for panics in panics {
        let breaker = Breaker::builder("breaker")
            .settings(touchy())
            .on_event(move |_, event| {
                if panics(event) {
                    resume_unwind(Box::new(()));
                }
            })
            .build()
            .unwrap();
        breaker.trip(secs(1)).unwrap();
        advance(secs(1)).await;
        let call = || breaker.try_acquire().map(drop);
        assert!(catch_unwind(AssertUnwindSafe(call)).is_err());
        assert_eq!(breaker.state(), State::HalfOpen);
        assert_eq!(breaker.status().probes_in_flight, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn what_outlives_its_breaker_is_of_no_other() {
    let first = breaker(touchy());
    let permit = first.try_acquire().unwrap();
    first.force_open();
    let refusal = first.try_acquire().unwrap_err();
    assert_eq!(refusal.name().as_deref(), Some("breaker"));
    drop(first);
    // One of these has the first one's place.
    let others: Vec<Breaker> = (0..100).map(|_| breaker(touchy())).collect();
    assert_eq!(refusal.name(), None);
    assert_eq!(refusal.to_string(), "the circuit breaker was open");
    permit.record(Failure);
    assert!(others.iter().all(|other| other.state() == State::Closed));
}

#[tokio::test(start_paused = true)]
async fn followed_changes_say_that_they_are() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let breaker = Breaker::builder("breaker")
        .on_event(move |_, event| {
            if let Event::StateChange(change) = event {
                hears
                    .lock()
                    .unwrap()
                    .push((change.to, change.cause, change.wait));
            }
        })
        .build()
        .unwrap();
    breaker.follow(State::Open, Some(secs(7))).unwrap();
    assert!(breaker.follow(State::Open, Some(secs(9))).is_err());
    breaker.follow(State::HalfOpen, None).unwrap();
    breaker.follow(State::Closed, None).unwrap();
    assert_eq!(
        *heard.lock().unwrap(),
        [
            (State::Open, Cause::Remote, Some(secs(7))),
            (State::HalfOpen, Cause::Remote, None),
            (State::Closed, Cause::Remote, None),
        ]
    );
}

/// An override that was followed here could only be ended here: the reset
/// there was refused as a change that makes no sense.
#[tokio::test(start_paused = true)]
async fn the_end_of_an_override_is_followed() {
    let settings = Settings::new()
        .consecutive_failures(1)
        .reopen_backoff(ReopenBackoff::new(2.0));
    for to in [State::ForcedOpen, State::ForcedClosed, State::MetricsOnly] {
        let breaker = breaker(settings.clone());
        breaker.try_acquire().unwrap().record(Failure);
        breaker.follow(to, None).unwrap();
        assert!(breaker.close().is_err());
        breaker.follow(State::Closed, None).unwrap();
        assert_eq!(breaker.state(), State::Closed);
        // As after a reset here, no opening is remembered.
        breaker.try_acquire().unwrap().record(Failure);
        let open = breaker.try_acquire().unwrap_err();
        assert_eq!(open.retry_after(), Some(secs(30)));
    }
    let breaker = breaker(settings);
    assert!(breaker.follow(State::Closed, None).is_err());
}

#[tokio::test(start_paused = true)]
async fn health_is_the_state() {
    let breaker = breaker(touchy());
    let expect = |health| assert_eq!(breaker.health(), health);
    expect(Health::HEALTHY);
    breaker.trip(None).unwrap();
    expect(Health::UNHEALTHY);
    breaker.half_open().unwrap();
    expect(Health::scored(0.5));
    breaker.force_open();
    expect(Health::UNHEALTHY);
    breaker.force_closed();
    expect(Health::DISABLED);
    breaker.metrics_only();
    expect(Health::HEALTHY);

    assert!(!HealthSource::critical(&breaker));
    let critical = Breaker::builder("critical").critical(true).build().unwrap();
    assert!(HealthSource::critical(&critical.clone()));
}

#[tokio::test(start_paused = true)]
async fn the_verdict_is_the_callers_to_give() {
    let breaker = breaker(touchy());
    let judge = |result: &Result<u32, u32>| match result {
        Ok(_) => Success,
        Err(404) => Ignored,
        Err(_) => Failure,
    };
    let call = |result| breaker.call_judged(judge, async move || result);
    assert!(matches!(call(Err(404)).await, Err(Error::Inner(404))));
    assert_eq!(breaker.state(), State::Closed);
    assert!(matches!(call(Err(500)).await, Err(Error::Inner(500))));
    let error = call(Ok(200)).await.unwrap_err();
    assert_eq!(error.open().unwrap().reason(), Reason::Open);
}

/// Fifty threads at one moment, and again with a place that was given back.
#[test]
fn one_probe_of_fifty_threads() {
    let breaker = half_open(touchy());
    for _ in 0..20 {
        let all = std::sync::Barrier::new(50);
        let permits: Vec<Permit> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..50)
                .map(|_| {
                    scope.spawn(|| {
                        all.wait();
                        breaker.try_acquire().ok()
                    })
                })
                .collect();
            let permits = threads.into_iter().filter_map(|t| t.join().unwrap());
            permits.collect()
        });
        assert_eq!(permits.len(), 1);
        assert_eq!(breaker.status().probes_in_flight, 1);
    }
}
