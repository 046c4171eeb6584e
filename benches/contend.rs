//! What several callers cost one another: two pinned threads, and many tasks
//! on a runtime.
//!
//! The processor's time alone would hide a lock that puts its callers to
//! sleep, so that the wall's is told too.

use std::{
    future::poll_fn,
    hint::black_box,
    pin::pin,
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::{Builder, Handle, Runtime};
use tower::Service;

use crate::measure::{Run, cpu_time, median, pin_to, wall_time};

/// Nanoseconds a call.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of the processors.
    pub cpu: f64,
    /// Of the clock on the wall.
    pub wall: f64,
}

impl Cost {
    fn max(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.max(other.cpu),
            wall: self.wall.max(other.wall),
        }
    }
}

/// Times a run by both clocks, the processors' being `clock`.
#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
fn time(run: &mut Run, calls: u64, clock: fn() -> u64) -> Cost {
    let (cpu, wall) = (clock(), wall_time());
    run(calls);
    let (cpu, wall) = (clock() - cpu, wall_time() - wall);
    Cost {
        cpu: cpu as f64 / calls as f64,
        wall: wall as f64 / calls as f64,
    }
}

/// How many calls take as long as `turn` on the wall, in whole rounds of
/// [`TASKS`].
fn calibrated(run: &mut Run, turn: u64) -> u64 {
    let mut calls = 16 * TASKS;
    loop {
        // The first one wakes the workers, and anything may come between.
        let took = (0..3).map(|_| {
            let start = wall_time();
            run(calls);
            wall_time() - start
        });
        let took = took.min().expect("there are three");
        if took > turn / 4 {
            return (calls * turn / took / TASKS).max(16) * TASKS;
        }
        calls *= 2;
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Like [`measure::drive`](crate::measure::drive) for a service that may wait
/// for another thread: this one sleeps meanwhile.
///
/// # Panics
///
/// If the service is not ready.
#[inline]
pub fn drive_waiting<S, R>(
    waker: &Waker,
    service: &mut S,
    request: R,
) -> Result<S::Response, S::Error>
where
    S: Service<R>,
{
    let mut cx = Context::from_waker(waker);
    while service
        .poll_ready(&mut cx)
        .map(|ready| assert!(ready.is_ok()))
        .is_pending()
    {
        thread::park();
    }
    let mut future = pin!(service.call(request));
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(result) => return result,
            Poll::Pending => thread::park(),
        }
    }
}

/// A waker for the thread that asks.
#[must_use]
pub fn this_thread() -> Waker {
    Waker::from(Arc::new(Unpark(thread::current())))
}

/// Two costs, over many rounds: of one thread alone, and of the slower of two
/// at once; or of one run, and of another.
#[derive(Debug)]
pub struct Pairs {
    rounds: Vec<(Cost, Cost)>,
    /// Whether each thread had a processor to itself in all of these rounds.
    pub undisturbed: bool,
}

/// How many rounds are wanted, and how many are tried at most.
const PAIRS: (usize, usize) = (31, 62);
/// How long one of them is meant to be, and all of them may be.
const ALONE: u64 = 4_000_000;
const ALTOGETHER: u64 = 5_000_000_000;

impl Pairs {
    /// Lets the first of the two run alone, then both at once, each pinned to
    /// a processor, again and again.
    ///
    /// Where the machine took a processor away the threads did not meet, and
    /// cost one another too little: such rounds are left out. They are all
    /// there is where the runs themselves sleep.
    #[must_use]
    pub fn of([mut a, mut b]: [Run; 2]) -> Self {
        let start = wall_time();
        let calls = calibrated(&mut a, ALONE);
        let (mut good, mut all) = (Vec::new(), Vec::new());
        while good.len() < PAIRS.0 && all.len() < PAIRS.1 && wall_time() - start < ALTOGETHER {
            let [one] = at_once([&mut a], calls);
            let two = at_once([&mut a, &mut b], calls);
            let met = two.iter().all(|side| side.wall < 1.1 * side.cpu);
            let round = (one, two[0].max(two[1]));
            all.push(round);
            if met {
                good.push(round);
            }
        }
        Self::judged(good, all)
    }

    fn judged(good: Vec<(Cost, Cost)>, all: Vec<(Cost, Cost)>) -> Self {
        let undisturbed = good.len() >= PAIRS.0 / 3;
        Self {
            rounds: if undisturbed { good } else { all },
            undisturbed,
        }
    }

    /// The median over the rounds of what `of` makes of one and of two.
    pub fn median(&self, of: impl Fn(Cost, Cost) -> f64) -> f64 {
        median(
            self.rounds
                .iter()
                .map(|(one, two)| of(*one, *two))
                .collect(),
        )
    }
}

fn at_once<const N: usize>(runs: [&mut Run; N], calls: u64) -> [Cost; N] {
    let barrier = Barrier::new(N);
    let mut cpu = 0;
    thread::scope(|scope| {
        runs.map(|run| {
            let (barrier, at) = (&barrier, cpu);
            cpu += 1;
            scope.spawn(move || {
                pin_to(at);
                run(calls / 10);
                barrier.wait();
                let cost = time(run, calls, cpu_time);
                // Who is done first still meets the other.
                barrier.wait();
                cost
            })
        })
        .map(|thread| thread.join().expect("it does not panic"))
    })
}

/// How many tasks share the runtime.
pub const TASKS: u64 = 64;

/// Calls from [`TASKS`] tasks, each with a clone of its own of `service`. A
/// task lets the others run after each call, as it would on a socket.
pub fn tasks<S>(runtime: &Handle, service: S, refused: bool) -> Run
where
    S: Service<u64> + Clone + Send + 'static,
    S::Response: Send,
    S::Error: Send,
    S::Future: Send,
{
    let runtime = runtime.clone();
    Box::new(move |calls| {
        let tasks: Vec<_> = (0..TASKS)
            .map(|_| {
                let mut service = service.clone();
                runtime.spawn(async move {
                    for _ in 0..calls / TASKS {
                        let ready = poll_fn(|cx| service.poll_ready(cx)).await;
                        assert!(ready.is_ok());
                        let result = service.call(black_box(1)).await;
                        assert!(result.is_err() == refused);
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        runtime.block_on(async {
            for task in tasks {
                task.await.expect("it does not panic");
            }
        });
    })
}

/// A runtime of two workers, each on a processor of its own.
///
/// # Panics
///
/// If there are no threads to be had.
#[must_use]
pub fn two_workers() -> Runtime {
    let started = AtomicUsize::new(0);
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .on_thread_start(move || pin_to(started.fetch_add(1, Ordering::Relaxed) % 2))
        .build()
        .expect("there are threads")
}

/// The costs of [`tasks`] that took turns.
#[derive(Debug)]
pub struct Turns(Vec<Vec<Cost>>);

/// How long a turn is meant to be, on the wall.
const TURN: u64 = 8_000_000;

/// The time that all threads of this process have had.
fn process_time() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let (secs, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    secs * 1_000_000_000 + nanos
}

impl Turns {
    /// Lets `runs` take turns, in `rounds` rounds.
    pub fn of(runs: &mut [Run], rounds: usize) -> Self {
        let calls = runs.iter_mut().map(|run| calibrated(run, TURN));
        let calls: Vec<u64> = calls.collect();
        let turns = (0..rounds).map(|round| {
            let mut costs = vec![
                Cost {
                    cpu: 0.0,
                    wall: 0.0
                };
                runs.len()
            ];
            for step in 0..runs.len() {
                let at = (step + round) % runs.len();
                costs[at] = time(&mut runs[at], calls[at], process_time);
            }
            costs
        });
        Self(turns.collect())
    }

    /// The turns of two of them, side by side; those alone in which both
    /// workers had a processor each, unless there are too few: either the
    /// machine was busy, or the run sleeps.
    #[must_use]
    pub fn beside(&self, at: usize, other: usize) -> Pairs {
        let all = self.0.iter().map(|round| (round[other], round[at]));
        let parallel = |cost: Cost| cost.wall < 0.6 * cost.cpu;
        let good = all
            .clone()
            .filter(|(other, one)| parallel(*other) && parallel(*one));
        let good: Vec<_> = good.collect();
        Pairs::judged(good, all.collect())
    }
}
