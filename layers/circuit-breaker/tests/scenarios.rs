//! What users of other breakers hold theirs to, and what theirs got wrong:
//! one scenario a test, on a paused clock.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, BreakerBuilder, Cause, Event, Permit, Reason, ReopenBackoff, Rule, Settings, State,
    Window,
};
use buttress_core::{classify::Verdict, clock};
use tokio::time::advance;

use Verdict::{Failure, Ignored, Success};

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A window of 20 s, from 5 calls, 50 %, open for 5 s, 4 probes, slow from 4 s.
fn state_machine() -> Settings {
    Settings::new()
        .window(Window::Time(secs(20)))
        .minimum_calls(5)
        .failure_rate(0.5)
        .slow_calls(secs(4), 0.5)
        .reset_timeout(secs(5))
        .half_open_probes(4)
        .half_open_timeout(secs(1))
}

fn breaker(settings: Settings) -> Breaker {
    Breaker::builder("scenario")
        .settings(settings)
        .build()
        .unwrap()
}

type Heard = Arc<Mutex<Vec<Event>>>;

fn listening(settings: Settings) -> (Breaker, Heard) {
    let heard = Heard::default();
    let hears = Arc::clone(&heard);
    let builder: BreakerBuilder = Breaker::builder("scenario").settings(settings);
    let breaker = builder
        .on_event(move |_, event| hears.lock().unwrap().push(*event))
        .build()
        .unwrap();
    (breaker, heard)
}

fn call(breaker: &Breaker) -> Permit {
    breaker.try_acquire().unwrap()
}

fn calls(breaker: &Breaker, verdicts: &[Verdict]) {
    for &verdict in verdicts {
        call(breaker).record(verdict);
    }
}

fn refused(breaker: &Breaker) -> (Reason, Option<Duration>) {
    let open = breaker.try_acquire().unwrap_err();
    (open.reason(), open.retry_after())
}

#[tokio::test(start_paused = true)]
async fn a_success_that_completes_the_minimum_opens() {
    let breaker = breaker(state_machine());
    calls(&breaker, &[Failure, Failure, Failure, Success]);
    assert_eq!(breaker.state(), State::Closed);
    let status = breaker.status();
    assert_eq!((status.calls, status.failed), (4, 3));
    call(&breaker).record(Success);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn open_refuses_until_the_wait_is_over_and_half_open_counts_from_zero() {
    let breaker = breaker(state_machine());
    calls(&breaker, &[Failure; 5]);
    assert_eq!(refused(&breaker), (Reason::Open, Some(secs(5))));
    advance(secs(3)).await;
    assert_eq!(refused(&breaker), (Reason::Open, Some(secs(2))));
    // At the very moment, and not only after it.
    advance(secs(2)).await;
    let probe = call(&breaker);
    assert!(probe.is_probe());
    let status = breaker.status();
    assert_eq!(status.state, State::HalfOpen);
    assert_eq!(
        (status.calls, status.failures, status.probes_in_flight),
        (0, 0, 1)
    );
    probe.record(Success);
}

#[tokio::test(start_paused = true)]
async fn three_of_four_probes_fail_and_it_opens_again() {
    // resilience4j judges the four together; so do we where two may fail.
    let breaker = breaker(state_machine().half_open_failures(1));
    calls(&breaker, &[Failure; 5]);
    advance(secs(5)).await;
    calls(&breaker, &[Failure, Success]);
    assert_eq!(breaker.state(), State::HalfOpen);
    call(&breaker).record(Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn an_ignored_call_neither_counts_nor_completes_the_minimum() {
    let breaker = breaker(state_machine());
    calls(&breaker, &[Success, Success, Success, Ignored, Failure]);
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(breaker.status().calls, 4);
    // Nor is a run of failures ended by one.
    let runs = breaker_of_runs(2);
    calls(&runs, &[Failure, Ignored, Failure]);
    assert_eq!(runs.state(), State::Open);
}

fn breaker_of_runs(failures: u32) -> Breaker {
    breaker(Settings::new().consecutive_failures(failures))
}

#[tokio::test(start_paused = true)]
async fn forced_open_refuses_when_every_wait_is_over() {
    let breaker = breaker(state_machine());
    breaker.force_open();
    advance(secs(6)).await;
    assert_eq!(refused(&breaker), (Reason::ForcedOpen, None));
    breaker.reset();
    assert!(!call(&breaker).is_probe());
}

#[tokio::test(start_paused = true)]
async fn metrics_only_tells_once_and_refuses_nobody() {
    let (breaker, heard) = listening(state_machine());
    breaker.metrics_only();
    calls(&breaker, &[Failure; 50]);
    assert_eq!(breaker.state(), State::MetricsOnly);
    assert_eq!(breaker.status().failed, 50);
    let heard = heard.lock().unwrap();
    let would_open = heard
        .iter()
        .filter(|event| matches!(event, Event::WouldOpen(_)));
    assert_eq!(
        would_open.collect::<Vec<_>>(),
        [&Event::WouldOpen(Rule::FailureRate)]
    );
    assert!(!heard.iter().any(|e| matches!(e, Event::Rejected(_))));
}

#[tokio::test(start_paused = true)]
async fn half_open_for_a_second_without_four_verdicts_is_open() {
    let (breaker, heard) = listening(state_machine());
    calls(&breaker, &[Failure; 5]);
    advance(secs(5)).await;
    calls(&breaker, &[Success; 3]);
    assert_eq!(breaker.state(), State::HalfOpen);
    let due = clock::now() + secs(1);
    advance(ms(1500)).await;
    assert_eq!(breaker.state(), State::Open);
    let last = heard.lock().unwrap().last().copied();
    let Some(Event::StateChange(change)) = last else {
        panic!("{last:?}")
    };
    // Since its time was up, whenever that is noticed.
    assert_eq!((change.cause, change.at), (Cause::ProbesOverdue, due));
    assert_eq!(breaker.status().next_probe, Some(due + secs(5)));
}

#[tokio::test(start_paused = true)]
async fn one_success_ends_a_run() {
    let breaker = breaker_of_runs(5);
    calls(&breaker, &[Failure; 4]);
    calls(&breaker, &[Success]);
    assert_eq!(breaker.status().failures, 0);
    calls(&breaker, &[Failure; 4]);
    assert_eq!(breaker.state(), State::Closed);
    call(&breaker).record(Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn probes_that_are_done_still_have_their_places() {
    let settings = Settings::new().consecutive_failures(1).half_open_probes(3);
    let breaker = breaker(settings);
    calls(&breaker, &[Failure]);
    advance(secs(30)).await;
    calls(&breaker, &[Success, Success]);
    let running = call(&breaker);
    assert_eq!(refused(&breaker), (Reason::HalfOpen, Some(secs(1))));
    running.record(Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn nothing_below_the_minimum_and_a_tenth_at_it() {
    let breaker = breaker(Settings::new().failure_rate(0.1).minimum_calls(10));
    calls(&breaker, &[Failure; 9]);
    assert_eq!(breaker.state(), State::Closed);
    breaker.reset();
    calls(&breaker, &[Success; 9]);
    call(&breaker).record(Failure);
    assert_eq!(breaker.state(), State::Open);
}

fn fails_again(breaker: &Breaker) -> u64 {
    call(breaker).record(Failure);
    let wait = breaker.status().next_probe.unwrap() - clock::now();
    wait.as_secs()
}

#[tokio::test(start_paused = true)]
async fn the_wait_grows_with_each_attempt_and_closing_forgets_with_a_decay_of_zero() {
    let backoff = ReopenBackoff::new(2.0).decay(Duration::ZERO);
    let settings = Settings::new()
        .consecutive_failures(1)
        .reset_timeout(secs(10))
        .reopen_backoff(backoff);
    let breaker = breaker(settings);
    for attempt in [0, 1, 2, 3, 4] {
        assert_eq!(fails_again(&breaker), 10 << attempt);
        advance(secs(10 << attempt)).await;
    }
    calls(&breaker, &[Success]);
    assert_eq!(breaker.state(), State::Closed);
    for attempt in [0, 1, 2] {
        assert_eq!(fails_again(&breaker), 10 << attempt);
        advance(secs(10 << attempt)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_forgets_one_opening_for_each_healthy_while() {
    let backoff = ReopenBackoff::new(2.0).decay(secs(60));
    let settings = Settings::new()
        .consecutive_failures(1)
        .reset_timeout(secs(10))
        .reopen_backoff(backoff);
    let breaker = breaker(settings);
    for attempt in [0, 1, 2, 3] {
        assert_eq!(fails_again(&breaker), 10 << attempt);
        advance(secs(10 << attempt)).await;
    }
    calls(&breaker, &[Success]);
    // Four to remember; two are forgotten.
    advance(secs(125)).await;
    assert_eq!(fails_again(&breaker), 10 << 2);
    // It flaps: nothing is forgotten, one more is remembered.
    advance(secs(40)).await;
    calls(&breaker, &[Success]);
    assert_eq!(fails_again(&breaker), 10 << 3);
}

#[tokio::test(start_paused = true)]
async fn five_failures_trip_in_a_millisecond_as_in_four_seconds() {
    let rules = [
        Settings::new().consecutive_failures(5),
        Settings::new().failure_rate(0.5).minimum_calls(5),
        state_machine(),
    ];
    for settings in rules {
        for pause in [Duration::ZERO, Duration::from_micros(200), ms(800)] {
            let breaker = breaker(settings.clone());
            for nth in 1..=5 {
                assert_eq!(breaker.state(), State::Closed, "before {nth}, {pause:?}");
                call(&breaker).record(Failure);
                advance(pause).await;
            }
            assert_eq!(breaker.state(), State::Open);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn too_many_requests_fails_a_probe_and_is_no_failure_in_a_row() {
    // What the layer's classifier says of a 429 where that is wished: nothing
    // for a call; and with its Retry-After it opens, probe or not.
    let breaker = breaker_of_runs(3);
    calls(&breaker, &[Failure, Failure, Ignored]);
    assert_eq!(breaker.state(), State::Closed);
    calls(&breaker, &[Failure]);
    advance(secs(30)).await;
    call(&breaker).record_holding_off(Ignored, secs(45));
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(refused(&breaker), (Reason::Open, Some(secs(45))));
}

#[tokio::test(start_paused = true)]
async fn a_call_from_before_it_opened_says_nothing_to_half_open() {
    let breaker = breaker_of_runs(1);
    let [good, bad, hung, failing] = [(); 4].map(|()| call(&breaker));
    failing.record(Failure);
    advance(secs(30)).await;
    let probe = call(&breaker);
    let before = breaker.status();
    good.record(Success);
    bad.record(Failure);
    drop(hung);
    assert_eq!(breaker.status(), before);
    probe.record(Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn one_probe_of_fifty_callers() {
    let breaker = breaker_of_runs(1);
    calls(&breaker, &[Failure]);
    advance(secs(30)).await;
    let callers = (0..50).map(|_| {
        let breaker = breaker.clone();
        tokio::spawn(async move {
            breaker
                .call(async || pending::<Result<(), ()>>().await)
                .await
        })
    });
    let callers: Vec<_> = callers.collect();
    tokio::task::yield_now().await;
    let waiting = callers.iter().filter(|caller| !caller.is_finished());
    assert_eq!(waiting.count(), 1);
    assert_eq!(breaker.status().probes_in_flight, 1);
    // It is given up on: the next one has its place.
    for caller in callers {
        caller.abort();
    }
    tokio::task::yield_now().await;
    assert_eq!(breaker.status().probes_in_flight, 0);
    breaker.call(async || Ok::<_, ()>(())).await.unwrap();
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_million_successes_and_the_window_still_slides() {
    for window in [Window::Calls(100), Window::Time(secs(10))] {
        let settings = Settings::new()
            .failure_rate(0.5)
            .window(window)
            .minimum_calls(100);
        let breaker = breaker(settings);
        for _ in 0..1_000_000 / 20_000 {
            calls(&breaker, &[Success; 20_000]);
            advance(secs(1)).await;
        }
        if window != Window::Calls(100) {
            // The last ten seconds are what counts: let a hundred be there.
            advance(secs(10)).await;
            calls(&breaker, &[Success; 50]);
        }
        calls(&breaker, &[Failure; 49]);
        assert_eq!(breaker.state(), State::Closed, "{window:?}");
        call(&breaker).record(Failure);
        assert_eq!(breaker.state(), State::Open, "{window:?}");
    }
}

/// Twenty days of a callee that is down for an hour every day.
#[tokio::test(start_paused = true)]
async fn a_long_run() {
    let settings = Settings::new()
        .failure_rate(0.5)
        .window(Window::Time(secs(60)))
        .minimum_calls(5)
        .reset_timeout(secs(30))
        .reopen_backoff(ReopenBackoff::new(2.0).max(secs(300)));
    let (breaker, heard) = listening(settings);
    for _day in 0..20 {
        for second in 0..24 * 360 {
            if let Ok(permit) = breaker.try_acquire() {
                permit.record(if second < 360 { Failure } else { Success });
            }
            advance(secs(10)).await;
        }
        assert_eq!(breaker.state(), State::Closed);
    }
    let heard = heard.lock().unwrap();
    let changes = |from, to| {
        let is = |event: &&Event| matches!(event, Event::StateChange(change) if (change.from, change.to) == (from, to));
        heard.iter().filter(is).count()
    };
    assert_eq!(changes(State::Closed, State::Open), 20);
    assert_eq!(changes(State::HalfOpen, State::Closed), 20);
    // 30, 60, 120, 240 s, then 300 s at a time: no more than fifteen in an hour.
    let probed = changes(State::HalfOpen, State::Open);
    assert!(probed <= 20 * 15, "{probed}");
}

/// One call every twenty seconds, three probes to be good within thirty: it
/// goes round through open, but it never stops asking. With time enough it
/// closes.
#[tokio::test(start_paused = true)]
async fn sparse_traffic_never_wedges_half_open() {
    let settings = Settings::new().consecutive_failures(1).half_open_probes(3);
    let breaker = breaker(settings.clone());
    calls(&breaker, &[Failure]);
    let mut passed = 0;
    for _ in 0..100 {
        advance(secs(20)).await;
        if let Ok(probe) = breaker.try_acquire() {
            probe.record(Success);
            passed += 1;
        }
    }
    assert!(passed > 30, "{passed}");
    breaker
        .configure(settings.half_open_timeout(secs(120)))
        .unwrap();
    for _ in 0..10 {
        advance(secs(20)).await;
        if let Ok(probe) = breaker.try_acquire() {
            probe.record(Success);
        }
    }
    assert_eq!(breaker.state(), State::Closed);
}

/// A probe that never comes back does not keep the breaker half-open: nor does
/// what it says at last count.
#[tokio::test(start_paused = true)]
async fn a_probe_that_hangs_is_not_waited_for() {
    let breaker = breaker_of_runs(1);
    calls(&breaker, &[Failure]);
    advance(secs(30)).await;
    let hung = call(&breaker);
    advance(secs(30)).await;
    assert_eq!(refused(&breaker), (Reason::Open, Some(secs(30))));
    advance(secs(30)).await;
    let next = call(&breaker);
    hung.record(Success);
    assert_eq!(breaker.state(), State::HalfOpen);
    next.record(Success);
    assert_eq!(breaker.state(), State::Closed);
}

/// Nobody called for a day: half-open was open again since its time was up,
/// and that wait is over as well, so that the next call is a probe.
#[tokio::test(start_paused = true)]
async fn a_forgotten_half_open_probes_at_the_next_call() {
    let (breaker, heard) = listening(Settings::new().consecutive_failures(1).half_open_probes(2));
    calls(&breaker, &[Failure]);
    advance(secs(30)).await;
    calls(&breaker, &[Success]);
    advance(secs(24 * 3600)).await;
    assert!(breaker.would_pass());
    assert!(call(&breaker).is_probe());
    let heard = heard.lock().unwrap();
    let causes = heard.iter().filter_map(|event| match event {
        Event::StateChange(change) => Some(change.cause),
        _ => None,
    });
    assert_eq!(
        causes.collect::<Vec<_>>(),
        [
            Cause::Rule(Rule::ConsecutiveFailures),
            Cause::WaitOver,
            Cause::ProbesOverdue,
            Cause::WaitOver
        ]
    );
}

/// The clock of another runtime may stand before the one at which the breaker
/// opened. Nothing panics or wraps; the wait is over when that clock says so.
#[test]
fn the_clock_jumps_back() {
    let breaker = breaker(state_machine().consecutive_failures(1));
    let paused = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };
    let due = paused().block_on(async {
        advance(secs(3600)).await;
        calls(&breaker, &[Failure]);
        breaker.status().next_probe.unwrap()
    });
    paused().block_on(async {
        let (reason, wait) = refused(&breaker);
        assert_eq!(reason, Reason::Open);
        // Told in whole microseconds, rounded up.
        let (wait, left) = (wait.unwrap(), due - clock::now());
        assert!(wait >= left && wait < left + Duration::from_micros(1));
        assert!(wait > secs(3500));
        assert!(!breaker.would_pass());
        // Who cannot wait can do it by hand.
        breaker.reset();
        let slow = call(&breaker);
        advance(secs(10)).await;
        assert!(clock::now() < due);
        slow.record(Success);
        assert_eq!(breaker.status().slow, 1);
        calls(&breaker, &[Failure]);
        assert_eq!(refused(&breaker), (Reason::Open, Some(secs(5))));
        advance(secs(5)).await;
        assert!(call(&breaker).is_probe());
    });
}
