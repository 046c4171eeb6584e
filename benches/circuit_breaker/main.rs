//! The circuit breaker beside failsafe and tower-resilience.
//!
//! `cargo bench -p buttress-benches -- breaker`; with a longer name only the
//! sections whose name begins so: breaker-closed, breaker-shared, breaker-refused,
//! breaker-window, breaker-threads, breaker-tasks, breaker-counts.

use std::env;

use buttress_benches::{
    breaker::{
        self as runs, Rule,
        ours::Ours,
        peers::{self, Resilience},
    },
    contend::{Cost, Pairs, Turns, tasks, two_workers},
    counts::{Counts, counted, instructions},
    measure::{Run, interleave, wall_time},
    table::{Row, Table, number},
};
use buttress_redis::Redis;
use tokio::runtime::Handle;

fn main() {
    let mut args = env::args().skip(1).filter(|arg| arg != "--bench");
    match args.next() {
        // This program, run under valgrind by itself.
        Some(word) if word == "--calls" => {
            let name = args.next().expect("a run's name");
            let calls = args.next().and_then(|calls| calls.parse().ok());
            let mut run = runs::named(&name).expect("a run's name");
            // What is made once, and windows that have yet to be full.
            run(200);
            counted(&mut run, calls.expect("how many calls"));
        }
        only => tell(&only.unwrap_or_default()),
    }
}

type Section = (&'static str, fn(&mut Table));

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]
fn tell(only: &str) {
    let sections: [Section; 7] = [
        ("breaker-closed", closed),
        ("breaker-shared", shared),
        ("breaker-refused", refused),
        ("breaker-window", window),
        ("breaker-threads", threads),
        ("breaker-tasks", on_tasks),
        ("breaker-counts", counts),
    ];
    let mut table = Table::default();
    let mut told = false;
    for (name, section) in sections {
        if name.starts_with(only) {
            let start = wall_time();
            section(&mut table);
            eprintln!("{name}: {} s", (wall_time() - start) / 1_000_000_000);
            told = true;
        }
    }
    if told {
        println!("{}", table.render());
        println!(
            "figure: ours over the peer's, or what the goal bounds; times: the processors' own, \
             a call.\n(*) The threads did not all run at once: the machine was busy, or they slept; no verdict."
        );
    }
}

fn nanos(cost: f64) -> String {
    format!("{} ns", number(cost))
}

const OURS: [(Rule, &str); 3] = [
    (Rule::Consecutive, "consecutive"),
    (Rule::Count, "count window"),
    (Rule::Time, "time window"),
];

/// Ours over the peer's by instructions, each over the bare service.
fn instruction_ratio(ours: &str, peer: &str) -> Option<f64> {
    let bare = instructions("bare")?;
    Some((instructions(ours)? - bare) / (instructions(peer)? - bare))
}

fn closed(table: &mut Table) {
    let mut all = [
        runs::healthy(runs::bare()),
        runs::healthy(Ours::new(Rule::Consecutive).service()),
        runs::healthy(Ours::new(Rule::Count).service()),
        runs::healthy(Ours::new(Rule::Time).service()),
        runs::healthy(peers::failsafe_consecutive()),
        runs::healthy(peers::failsafe_default()),
        peers::failsafe_plain(),
        runs::healthy(Resilience::new(Rule::Consecutive).service()),
        runs::healthy(Resilience::new(Rule::Count).service()),
        runs::resilience_window(0),
    ];
    let rounds = interleave(&mut all, 200);
    let over = |at: usize| rounds.median(|round| round[at] - round[0]);
    // Which of ours, beside which peer.
    for (ours, what, peer, of, goal) in [
        (1, "consecutive", 4, "failsafe", Some(0.25)),
        (1, "consecutive", 6, "failsafe (plain)", None),
        (1, "consecutive", 7, "tower-resilience", None),
        (2, "count window", 4, "failsafe (consecutive)", Some(0.333)),
        (2, "count window", 8, "tower-resilience (its default)", None),
        (3, "time window", 4, "failsafe (consecutive)", Some(0.4)),
        (3, "time window", 5, "failsafe (its default)", None),
        (
            3,
            "time window",
            8,
            "tower-resilience (its default)",
            Some(1.0 / 15.0),
        ),
        (
            3,
            "time window",
            9,
            "tower-resilience (100 calls in it)",
            Some(1.0 / 15.0),
        ),
    ] {
        let named = match peer {
            4 => Some("closed, failsafe"),
            5 => Some("closed, failsafe's default"),
            8 => Some("closed, tower-resilience"),
            _ => None,
        };
        table.push(Row {
            what: format!("closed, {what}, over {of}"),
            ours: nanos(over(ours)),
            peer: nanos(over(peer)),
            figure: rounds.median(|round| (round[ours] - round[0]) / (round[peer] - round[0])),
            instructions: named
                .and_then(|peer| instruction_ratio(&format!("closed, {what}"), peer)),
            goal,
        });
    }
    table.push(Row {
        what: "the bare service itself".into(),
        ours: nanos(rounds.cost(0)),
        peer: String::new(),
        figure: 1.0,
        instructions: None,
        goal: None,
    });
}

/// One of a fleet's beside one that is not: no call knows the difference.
fn shared(table: &mut Table) {
    let runtime = two_workers();
    let _here = runtime.enter();
    // The task in the background finds nobody, and tries on.
    let redis = Redis::from_url("redis://127.0.0.1:1").expect("a sound URL");
    for (rule, what) in OURS {
        let mut all = [
            runs::healthy(Ours::shared(rule, &redis).service()),
            runs::healthy(Ours::new(rule).service()),
        ];
        let rounds = interleave(&mut all, 200);
        table.push(Row {
            what: format!("closed, {what}, shared over not"),
            ours: nanos(rounds.cost(0)),
            peer: nanos(rounds.cost(1)),
            figure: rounds.median(|round| round[0] / round[1]),
            instructions: None,
            goal: Some(1.1),
        });
    }
}

fn refused(table: &mut Table) {
    let mut all = [
        runs::healthy(runs::bare()),
        runs::refused(Ours::new(Rule::Consecutive).service()),
        runs::refused(peers::failsafe_consecutive()),
        runs::refused(Resilience::new(Rule::Count).service()),
    ];
    let rounds = interleave(&mut all, 200);
    let over = |at: usize| rounds.median(|round| round[at] - round[0]);
    table.push(Row {
        what: "refused as error, ns over bare".into(),
        ours: nanos(over(1)),
        peer: String::new(),
        figure: over(1),
        instructions: None,
        goal: Some(10.0),
    });
    for (peer, of, named) in [
        (2, "failsafe", "refused, failsafe"),
        (3, "tower-resilience", "refused, tower-resilience"),
    ] {
        table.push(Row {
            what: format!("refused as error, over {of}"),
            ours: nanos(over(1)),
            peer: nanos(over(peer)),
            figure: rounds.median(|round| (round[1] - round[0]) / (round[peer] - round[0])),
            instructions: instruction_ratio("refused", named),
            goal: None,
        });
    }
}

fn window(table: &mut Table) {
    const MANY: u64 = 50_000;
    type Make = fn(u64) -> Run;
    for (what, make, goal) in [
        (
            "50000 calls in the time window, over 100",
            runs::our_window as Make,
            Some(1.1),
        ),
        (
            "the same by tower-resilience",
            runs::resilience_window,
            None,
        ),
    ] {
        let mut all = [runs::healthy(runs::bare()), make(0), make(MANY)];
        let rounds = interleave(&mut all, 100);
        table.push(Row {
            what: what.into(),
            ours: nanos(rounds.median(|round| round[2] - round[0])),
            peer: nanos(rounds.median(|round| round[1] - round[0])),
            figure: rounds.median(|round| (round[2] - round[0]) / (round[1] - round[0])),
            instructions: None,
            goal,
        });
    }
}

/// Both clocks', since who sleeps takes no processor.
fn both(median: impl Fn(fn(Cost) -> f64) -> f64) -> String {
    let (cpu, wall) = (median(|cost| cost.cpu), median(|cost| cost.wall));
    format!("{} (wall {}) ns", number(cpu), number(wall))
}

fn note(pairs: &Pairs) -> &'static str {
    if pairs.undisturbed { "" } else { " (*)" }
}

fn threads(table: &mut Table) {
    let mut row = |what: String, pair, goal: Option<f64>| {
        let pairs = Pairs::of(pair);
        table.push(Row {
            what: format!("two threads, {what}, over one{}", note(&pairs)),
            ours: both(|of| pairs.median(|_, two| of(two))),
            peer: both(|of| pairs.median(|one, _| of(one))),
            figure: pairs.median(|one, two| two.cpu / one.cpu),
            instructions: None,
            // Who has not met the other tells nothing.
            goal: goal.filter(|_| pairs.undisturbed),
        });
    };
    let bare = runs::pair(runs::bare(), runs::healthy);
    row("bare (the machine's)".into(), bare, None);
    for (rule, name) in OURS {
        let pair = runs::pair(Ours::new(rule).service(), runs::healthy);
        row(name.into(), pair, Some(1.1));
    }
    for (rule, name) in OURS {
        let pair = runs::pair(Ours::new(rule).service(), runs::mixed);
        row(format!("{name}, 10 % failures"), pair, None);
    }
    let pair = runs::pair(peers::failsafe_consecutive(), runs::healthy);
    row("failsafe (consecutive)".into(), pair, None);
    let pair = runs::pair(peers::failsafe_consecutive(), runs::mixed);
    row("failsafe, 10 % failures".into(), pair, None);
    let pair = runs::pair(peers::failsafe_default(), runs::healthy);
    row("failsafe (its default)".into(), pair, None);
    let peer = Resilience::new(Rule::Count);
    let pair = runs::pair(peer.service(), runs::healthy_waiting);
    row("tower-resilience".into(), pair, None);
}

fn on_tasks(table: &mut Table) {
    let runtime = two_workers();
    let on: &Handle = runtime.handle();
    let closed = |rule| tasks(on, Ours::new(rule).service(), false);
    let mut all = [
        tasks(on, runs::bare(), false),
        closed(Rule::Consecutive),
        closed(Rule::Count),
        closed(Rule::Time),
        tasks(
            on,
            runs::opened(Ours::new(Rule::Consecutive).service()),
            true,
        ),
        tasks(on, peers::failsafe_consecutive(), false),
        tasks(on, peers::failsafe_default(), false),
        tasks(on, Resilience::new(Rule::Count).service(), false),
        tasks(on, runs::opened(peers::failsafe_consecutive()), true),
        tasks(
            on,
            runs::opened(Resilience::new(Rule::Count).service()),
            true,
        ),
    ];
    let turns = Turns::of(&mut all, 100);
    for (at, what, goal) in [
        (1, "closed, consecutive", Some(1.15)),
        (2, "closed, count window", Some(1.15)),
        (3, "closed, time window", Some(1.15)),
        (4, "refused", Some(1.15)),
        (5, "closed, failsafe (consecutive)", None),
        (6, "closed, failsafe (its default)", None),
        (7, "closed, tower-resilience", None),
        (8, "refused, failsafe", None),
        (9, "refused, tower-resilience", None),
    ] {
        let pairs = turns.beside(at, 0);
        table.push(Row {
            what: format!("64 tasks, {what}, over bare{}", note(&pairs)),
            ours: both(|of| pairs.median(|_, ours| of(ours))),
            peer: both(|of| pairs.median(|bare, _| of(bare))),
            figure: pairs.median(|bare, ours| ours.cpu / bare.cpu),
            instructions: None,
            goal: goal.filter(|_| pairs.undisturbed),
        });
    }
}

fn counts(table: &mut Table) {
    let counts = Counts::take(env!("CARGO_BIN_EXE_count"), "breaker");
    for (name, peer, goal) in [
        ("closed, consecutive", "closed, failsafe", Some(0.0)),
        (
            "closed, count window",
            "closed, tower-resilience",
            Some(0.0),
        ),
        ("closed, time window", "closed, tower-resilience", Some(0.0)),
        ("mixed, count window", "", None),
        ("mixed, time window", "", None),
        ("refused", "refused, tower-resilience", Some(0.0)),
    ] {
        let ours = counts.allocations(name);
        table.push(Row {
            what: format!("allocations, {name}"),
            ours: number(ours),
            peer: match peer {
                "" => String::new(),
                peer => number(counts.allocations(peer)),
            },
            figure: ours,
            instructions: None,
            goal,
        });
    }
    let ours = Ours::new(Rule::Count);
    let peer = Resilience::new(Rule::Count);
    let failures = |failures: u64| u32::try_from(failures).map_or(f64::INFINITY, f64::from);
    let ours = failures(runs::failures_to_open(ours.service(), 1_000_000, || {
        ours.is_open()
    }));
    let peer = failures(runs::failures_to_open(peer.service(), 1_000_000, || {
        peer.is_open()
    }));
    table.push(Row {
        what: "failures to open after 10^6 successes (window 100, 50 %)".into(),
        ours: number(ours),
        peer: number(peer),
        figure: ours,
        instructions: None,
        goal: Some(50.0),
    });
}
