//! What is measured of circuit breakers: ours and the peers' over one bare
//! service, each as a closure that makes as many calls as it is told.

pub mod ours;
pub mod peers;

use std::{
    fmt,
    future::{Ready, ready},
    hint::black_box,
    time::Duration,
};

use tower::{Service, service_fn};

use self::{ours::Ours, peers::Resilience};
use crate::{
    contend::{drive_waiting, this_thread},
    measure::{Run, drive},
    scenarios::Named,
};

/// A number that the bare service fails on; all others are healthy.
pub const FAILING: u64 = u64::MAX;

/// What the bare service fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed")
    }
}

impl std::error::Error for Failed {}

type Answer = Ready<Result<u64, Failed>>;

/// The service that all are put over: always ready, answers at once.
#[must_use]
pub fn bare()
-> impl Service<u64, Response = u64, Error = Failed, Future = Answer> + Clone + Send + Sync + 'static
{
    service_fn(|n: u64| ready(if n == FAILING { Err(Failed) } else { Ok(n) }))
}

/// When to open: each peer's nearest is in [`peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Five failures in a row.
    Consecutive,
    /// Half of the last 100 calls.
    Count,
    /// Half of the calls of ten seconds, from 100 calls on.
    Time,
}

/// Healthy calls, one after the other.
pub fn healthy<S>(mut service: S) -> Run
where
    S: Service<u64> + Send + 'static,
{
    Box::new(move |calls| {
        for _ in 0..calls {
            let result = drive(&mut service, black_box(1));
            assert!(black_box(result).is_ok());
        }
    })
}

/// Every tenth call fails, which opens nothing.
pub fn mixed<S>(mut service: S) -> Run
where
    S: Service<u64> + Send + 'static,
{
    Box::new(move |calls| {
        let mut left = 10;
        for _ in 0..calls {
            left -= 1;
            let request = if left == 0 { FAILING } else { 1 };
            let result = drive(&mut service, black_box(request));
            assert!(black_box(result).is_err() == (left == 0));
            if left == 0 {
                left = 10;
            }
        }
    })
}

/// Calls that are refused, since enough have failed before.
pub fn refused<S>(service: S) -> Run
where
    S: Service<u64> + Send + 'static,
{
    let mut service = opened(service);
    Box::new(move |calls| {
        for _ in 0..calls {
            let result = drive(&mut service, black_box(1));
            assert!(black_box(result).is_err());
        }
    })
}

/// The service after as many failures as open any of them.
///
/// # Panics
///
/// If it is still closed.
pub fn opened<S: Service<u64>>(mut service: S) -> S {
    for _ in 0..200 {
        let _ = drive(&mut service, FAILING);
    }
    assert!(drive(&mut service, 1).is_err(), "it is open");
    service
}

/// How many failures in a row it takes to open, after so many successes.
///
/// # Panics
///
/// If it opens before, or does not open after as many failures and 1000 more.
pub fn failures_to_open<S: Service<u64>>(
    mut service: S,
    successes: u64,
    is_open: impl Fn() -> bool,
) -> u64 {
    for _ in 0..successes {
        assert!(drive(&mut service, 1).is_ok());
    }
    for failures in 1..=successes + 1000 {
        let _ = drive(&mut service, FAILING);
        if is_open() {
            return failures;
        }
    }
    panic!("it never opens");
}

/// Two threads' runs, each with its clone.
pub fn pair<S, F>(service: S, run: F) -> [Run; 2]
where
    S: Clone,
    F: Fn(S) -> Run,
{
    [run(service.clone()), run(service)]
}

/// Like [`healthy`], for a service whose callers may have to wait for one
/// another.
pub fn healthy_waiting<S>(mut service: S) -> Run
where
    S: Service<u64> + Send + 'static,
{
    Box::new(move |calls| {
        let waker = this_thread();
        for _ in 0..calls {
            let result = drive_waiting(&waker, &mut service, black_box(1));
            assert!(black_box(result).is_ok());
        }
    })
}

/// How many calls are made before a small window is emptied: it has half as
/// many in it on the average.
const SMALL: u64 = 200;

/// Longer than any bench lasts.
const HOUR: Duration = Duration::from_secs(3600);

/// Healthy calls that a window of an hour has about 100 of in it, or more than
/// `prefill`: it is emptied every now and then, or another one is.
#[must_use]
pub fn our_window(prefill: u64) -> Run {
    let ours = Ours::with_window(HOUR);
    let spare = Ours::with_window(HOUR);
    let mut service = ours.service();
    healthy_calls(&mut service, prefill);
    Box::new(move |calls| {
        let mut left = calls;
        while left > 0 {
            let some = left.min(SMALL);
            healthy_calls(&mut service, some);
            left -= some;
            if prefill == 0 { &ours } else { &spare }.reset();
        }
    })
}

/// The same by tower-resilience, whose window is emptied by making another.
#[must_use]
pub fn resilience_window(prefill: u64) -> Run {
    let make = || Resilience::with_window(HOUR).service();
    let mut service = make();
    healthy_calls(&mut service, prefill);
    Box::new(move |calls| {
        let mut left = calls;
        while left > 0 {
            let some = left.min(SMALL);
            healthy_calls(&mut service, some);
            left -= some;
            let fresh = black_box(make());
            if prefill == 0 {
                service = fresh;
            }
        }
    })
}

fn healthy_calls<S: Service<u64>>(service: &mut S, calls: u64) {
    for _ in 0..calls {
        let result = drive(service, black_box(1));
        assert!(black_box(result).is_ok());
    }
}

/// All that can be counted.
pub const ALL: &[Named] = &[
    ("bare", || healthy(bare())),
    ("closed, consecutive", || {
        healthy(Ours::new(Rule::Consecutive).service())
    }),
    ("closed, count window", || {
        healthy(Ours::new(Rule::Count).service())
    }),
    ("closed, time window", || {
        healthy(Ours::new(Rule::Time).service())
    }),
    ("mixed, count window", || {
        mixed(Ours::new(Rule::Count).service())
    }),
    ("mixed, time window", || {
        mixed(Ours::new(Rule::Time).service())
    }),
    ("refused", || {
        refused(Ours::new(Rule::Consecutive).service())
    }),
    (
        "closed, failsafe",
        || healthy(peers::failsafe_consecutive()),
    ),
    ("closed, failsafe's default", || {
        healthy(peers::failsafe_default())
    }),
    ("refused, failsafe", || {
        refused(peers::failsafe_consecutive())
    }),
    ("closed, tower-resilience", || {
        healthy(Resilience::new(Rule::Count).service())
    }),
    ("refused, tower-resilience", || {
        refused(Resilience::new(Rule::Count).service())
    }),
];

/// The run of that name.
#[must_use]
pub fn named(name: &str) -> Option<Run> {
    let (_, make) = ALL.iter().find(|(known, _)| *known == name)?;
    Some(make())
}
