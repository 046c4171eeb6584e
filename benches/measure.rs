//! Measuring on a machine that has other things to do: turns are short and
//! interleaved, time is the thread's own processor time, and what is told is
//! the median of the ratios of neighbouring turns.

use std::{
    pin::pin,
    sync::{Arc, Barrier},
    task::{Context, Poll, Waker},
    thread,
};

use buttress_core::clock;
use rustix::{
    thread::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
};
use tower::Service;

/// Something that makes as many calls as it is told.
pub type Run = Box<dyn FnMut(u64) + Send>;

/// The processor time this thread has had, in nanoseconds: what others on the
/// machine do meanwhile is not in it.
#[must_use]
pub fn cpu_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let (secs, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    secs * 1_000_000_000 + nanos
}

/// Wall time in nanoseconds.
#[must_use]
pub fn wall_time() -> u64 {
    clock::now().as_nanos()
}

/// Ties this thread to a processor, where that is allowed.
pub fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    let _ = sched_setaffinity(None, &set);
}

/// Calls a service as a server does, without a runtime: ready, call, poll.
///
/// # Panics
///
/// If the service is not ready at once, or its response.
// Always, and so for each side: whoever is too large for it would be charged a
// copy of the request that is the measurement's.
#[inline(always)]
pub fn drive<S, R>(service: &mut S, request: R) -> Result<S::Response, S::Error>
where
    S: Service<R>,
{
    let mut cx = Context::from_waker(Waker::noop());
    assert!(matches!(service.poll_ready(&mut cx), Poll::Ready(Ok(()))));
    let future = pin!(service.call(request));
    match future.poll(&mut cx) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("a ready service does not wait"),
    }
}

/// Processor nanoseconds a call, for each round and each of those measured.
#[derive(Debug)]
pub struct Rounds(Vec<Vec<f64>>);

/// How long a turn is meant to be.
const TURN: u64 = 2_000_000;

/// Lets `runs` take turns, in `rounds` rounds.
pub fn interleave(runs: &mut [Run], rounds: usize) -> Rounds {
    let calls: Vec<u64> = runs
        .iter_mut()
        .map(|run| {
            let mut calls = 100;
            loop {
                let took = time(run, calls);
                if took > TURN / 4 {
                    break (calls * TURN / took).max(1);
                }
                calls *= 2;
            }
        })
        .collect();
    let turns = (0..rounds).map(|round| {
        let mut costs = vec![0.0; runs.len()];
        // Who comes first changes: nobody always finds the other's caches.
        for step in 0..runs.len() {
            let at = (step + round) % runs.len();
            costs[at] = per_call(time(&mut runs[at], calls[at]), calls[at]);
        }
        costs
    });
    Rounds(turns.collect())
}

fn time(run: &mut Run, calls: u64) -> u64 {
    let start = cpu_time();
    run(calls);
    cpu_time() - start
}

#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
fn per_call(nanos: u64, calls: u64) -> f64 {
    nanos as f64 / calls as f64
}

impl Rounds {
    /// The median over the rounds of what `of` makes of one.
    pub fn median(&self, of: impl Fn(&[f64]) -> f64) -> f64 {
        median(self.0.iter().map(|round| of(round)).collect())
    }

    /// The median cost of one of those measured, in nanoseconds a call.
    #[must_use]
    pub fn cost(&self, at: usize) -> f64 {
        self.median(|round| round[at])
    }
}

/// The middle one.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds a call of the slower of two threads that run at once, one on
/// each of two processors.
pub fn both(runs: [&mut Run; 2], calls: u64) -> f64 {
    let barrier = Arc::new(Barrier::new(2));
    let costs = thread::scope(|scope| {
        let threads = runs.into_iter().enumerate().map(|(cpu, run)| {
            let barrier = Arc::clone(&barrier);
            scope.spawn(move || {
                pin_to(cpu);
                run(calls / 10);
                barrier.wait();
                per_call(time(run, calls), calls)
            })
        });
        let threads: Vec<_> = threads.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("it does not panic"))
            .collect::<Vec<_>>()
    });
    costs.into_iter().fold(0.0, f64::max)
}

/// The same of one thread alone.
pub fn alone(run: &mut Run, calls: u64) -> f64 {
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            pin_to(0);
            run(calls / 10);
            per_call(time(run, calls), calls)
        });
        thread.join().expect("it does not panic")
    })
}

/// The worst single call of many, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Worst {
    /// By the thread's own time: what the machine did to it is not in it.
    pub cpu: u64,
    /// By the clock on the wall.
    pub wall: u64,
}

impl Worst {
    /// Nothing measured yet.
    pub const NONE: Self = Self {
        cpu: u64::MAX,
        wall: u64::MAX,
    };

    /// The lesser of both: a pause that is ours is in every run.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.min(other.cpu),
            wall: self.wall.min(other.wall),
        }
    }

    /// Calls `each` with 0, 1, 2, … and times every call.
    pub fn of(calls: u64, mut each: impl FnMut(u64)) -> Self {
        let mut worst = Self { cpu: 0, wall: 0 };
        for call in 0..calls {
            let (cpu, wall) = (cpu_time(), wall_time());
            each(call);
            worst.wall = worst.wall.max(wall_time() - wall);
            worst.cpu = worst.cpu.max(cpu_time() - cpu);
        }
        worst
    }
}
