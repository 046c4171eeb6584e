//! The rate limiter beside governor, `tower_governor` and tower-rate-tier.
//!
//! `cargo bench -p buttress-benches`; with `-- NAME`, only the sections whose
//! name begins so: decision, http, memory, pauses, threads.

use std::env;

use buttress_benches::{
    counts::{Counts, counted, instructions},
    measure::{self, Rounds, Run, Worst, drive, interleave, wall_time},
    scenarios::{self as runs, governor_by_key, ours_by_key},
    table::{Row, Table, number},
};
use buttress_rate_limit::Quota;

fn main() {
    let mut args = env::args().skip(1).filter(|arg| arg != "--bench");
    match args.next() {
        // This program, run under valgrind by itself.
        Some(word) if word == "--calls" => {
            let name = args.next().expect("a run's name");
            let calls = args.next().and_then(|calls| calls.parse().ok());
            let mut run = runs::named(&name).expect("a run's name");
            // What is made once: clocks are calibrated for as long as it takes.
            run(10);
            counted(&mut run, calls.expect("how many calls"));
        }
        only => tell(&only.unwrap_or_default()),
    }
}

type Section = (&'static str, fn(&mut Table, &Counts));

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]
fn tell(only: &str) {
    let sections: [Section; 5] = [
        ("decision", decision),
        ("http", http),
        ("memory", memory),
        ("pauses", pauses),
        ("threads", threads),
    ];
    // Another bench's section.
    if !sections.iter().any(|(name, _)| name.starts_with(only)) {
        return;
    }
    let counts = Counts::take(env!("CARGO_BIN_EXE_count"), "");
    let mut table = Table::default();
    for (name, section) in sections {
        if name.starts_with(only) {
            let start = wall_time();
            section(&mut table, &counts);
            eprintln!("{name}: {} s", (wall_time() - start) / 1_000_000_000);
        }
    }
    println!("{}", table.render());
    println!(
        "figure: ours over the peer's, or what the goal bounds; times: the thread's own, a call."
    );
}

/// Ours over the peer's, each over what there is without it.
fn instruction_ratio([our_bare, ours, bare, peer]: [&str; 4]) -> Option<f64> {
    let over = |name, bare| Some(instructions(name)? - instructions(bare)?);
    Some(over(ours, our_bare)? / over(peer, bare)?)
}

fn nanos(cost: f64) -> String {
    format!("{} ns", number(cost))
}

fn decision(table: &mut Table, _: &Counts) {
    type Make = fn(u64) -> Run;
    let numbers: (Make, Make) = (runs::our_decisions::<u64>, runs::governor_decisions::<u64>);
    let addresses: (Make, Make) = (
        runs::our_decisions::<std::net::IpAddr>,
        runs::governor_decisions::<std::net::IpAddr>,
    );
    for ((ours, peer), kind, count, name) in [
        (numbers, "u64", 1, "decision, 1 key"),
        (numbers, "u64", 10_000, "decision, 10^4 keys"),
        (numbers, "u64", 1_000_000, ""),
        (addresses, "IpAddr", 10_000, "decision, 10^4 addresses"),
        (addresses, "IpAddr", 1_000_000, ""),
    ] {
        let mut all = [ours(count), runs::the_loop(), peer(count)];
        let rounds = interleave(&mut all, 200);
        let peer = format!("{name}, governor");
        table.push(Row {
            what: format!("keyed decision, {count} keys ({kind}), over governor's"),
            ours: nanos(rounds.median(|round| round[0] - round[1])),
            peer: nanos(rounds.median(|round| round[2] - round[1])),
            figure: rounds.median(|round| (round[0] - round[1]) / (round[2] - round[1])),
            instructions: (!name.is_empty())
                .then(|| instruction_ratio(["loop", name, "loop", &peer]))
                .flatten(),
            goal: Some(0.6),
        });
    }
    for (count, name) in [(1, "1 key"), (10_000, "10^4 keys")] {
        let mut all = [
            runs::no_decisions(),
            runs::our_service_decisions::<u64>(count),
            runs::the_loop(),
            runs::governor_decisions::<u64>(count),
        ];
        let rounds = interleave(&mut all, 200);
        let names = [
            "no decision",
            &format!("service, {name}"),
            "loop",
            &format!("decision, {name}, governor"),
        ];
        table.push(Row {
            what: format!("– as a service over any request, {count} keys (u64)"),
            ours: nanos(rounds.median(|round| round[1] - round[0])),
            peer: nanos(rounds.median(|round| round[3] - round[2])),
            figure: rounds.median(|round| (round[1] - round[0]) / (round[3] - round[2])),
            instructions: instruction_ratio(names),
            goal: None,
        });
    }
}

fn http(table: &mut Table, counts: &Counts) {
    let mut versus = |what: &str, name: &str, peer: &str, goal, [bare, ours, theirs]: [Run; 3]| {
        let rounds: Rounds = interleave(&mut [bare, ours, theirs], 200);
        let bare = if name.contains("clients") {
            "http, clients, bare"
        } else {
            "http, bare"
        };
        let peer_name = format!("{name}, {peer}");
        table.push(Row {
            what: format!("{what}, over {peer}'s"),
            ours: nanos(rounds.median(|round| round[1] - round[0])),
            peer: nanos(rounds.median(|round| round[2] - round[0])),
            figure: rounds.median(|round| (round[1] - round[0]) / (round[2] - round[0])),
            instructions: instruction_ratio([bare, name, bare, &peer_name]),
            goal,
        });
    };
    versus(
        "layer, allowed, no headers",
        "http",
        "tower_governor",
        Some(0.8),
        [runs::http_bare(), runs::http_ours(), runs::http_peer()],
    );
    versus(
        "layer, allowed, X- headers",
        "http, headers",
        "tower_governor",
        Some(1.0),
        [
            runs::http_bare(),
            runs::http_ours_headers(),
            runs::http_peer_headers(),
        ],
    );
    versus(
        "the same, a burst of a million",
        "http, many digits",
        "tower_governor",
        None,
        [
            runs::http_bare(),
            runs::http_ours_digits(),
            runs::http_peer_digits(),
        ],
    );
    versus(
        "the same, 10000 clients by socket",
        "http, clients",
        "tower_governor",
        None,
        [
            runs::http_bare_clients(),
            runs::http_ours_clients(),
            runs::http_peer_clients(),
        ],
    );
    versus(
        "layer, refused (429)",
        "http, refused",
        "tower_governor",
        Some(1.0 / 8.0),
        [
            runs::http_bare(),
            runs::http_ours_refused(),
            runs::http_peer_refused(),
        ],
    );
    let tier = |refusing| runs::http_tier(refusing);
    let mut beside = |what: &str, ours: Run, refusing| {
        let rounds = interleave(&mut [runs::http_bare(), ours, tier(refusing)], 60);
        table.push(Row {
            what: format!("{what}, over tower-rate-tier's"),
            ours: nanos(rounds.median(|round| round[1] - round[0])),
            peer: nanos(rounds.median(|round| round[2] - round[0])),
            figure: rounds.median(|round| (round[1] - round[0]) / (round[2] - round[0])),
            instructions: None,
            goal: None,
        });
    };
    beside(
        "layer, allowed, X- headers",
        runs::http_ours_headers(),
        false,
    );
    beside("layer, refused (429)", runs::http_ours_refused(), true);

    let mut allocations = |name: &str, peer: &str, goal| {
        let (ours, theirs) = (counts.allocations(name), counts.allocations(peer));
        table.push(Row {
            what: format!("allocations, {name}"),
            ours: number(ours),
            peer: number(theirs),
            figure: ours,
            instructions: None,
            goal,
        });
    };
    allocations(
        "decision, 10^4 keys",
        "decision, 10^4 keys, governor",
        Some(0.0),
    );
    allocations("http", "http, tower_governor", Some(0.0));
    // Two for the header map, one for each number above 999.
    allocations("http, headers", "http, headers, tower_governor", Some(3.0));
    allocations(
        "http, many digits",
        "http, many digits, tower_governor",
        None,
    );
    allocations("http, refused", "http, refused, tower_governor", Some(4.0));
}

fn memory(table: &mut Table, counts: &Counts) {
    for (keys, goal) in [(1_000_000, Some(24.0)), (300_000, None), (100_000, None)] {
        let ours = counts.of("bytes", &format!("ours, {keys}"));
        let peer = counts.of("bytes", &format!("governor, {keys}"));
        table.push(Row {
            what: format!("bytes a key, {keys} keys of room for 10^6"),
            ours: number(ours),
            peer: number(peer),
            figure: ours,
            instructions: None,
            goal,
        });
    }
}

const MILLION: u64 = 1_000_000;

#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

/// One row for a worst pause. The goal is for the thread's own time.
fn pause(table: &mut Table, what: &str, ours: Worst, peer: Option<Worst>, goal: Option<f64>) {
    let both = |worst: Worst| {
        format!(
            "{} (wall {}) ms",
            number(millis(worst.cpu)),
            number(millis(worst.wall))
        )
    };
    table.push(Row {
        what: what.to_owned(),
        ours: both(ours),
        peer: peer.map(both).unwrap_or_default(),
        figure: millis(ours.cpu),
        instructions: None,
        goal,
    });
}

fn pauses(table: &mut Table, _: &Counts) {
    let (mut control, mut grown, mut others, mut full) =
        (Worst::NONE, Worst::NONE, Worst::NONE, Worst::NONE);
    let (mut peer_grown, mut peer_swept) = (Worst::NONE, Worst::NONE);
    for _ in 0..5 {
        let mut nothing = runs::no_decisions();
        control = control.or(Worst::of(MILLION, |_| nothing(1)));

        // In debt for two seconds: long enough to be there all at once.
        let mut service = ours_by_key::<u64>(Quota::new(1, SPAN).burst(10), 1_000_000);
        let mut decide = |n: u64| drive(&mut service, n).expect("its first");
        grown = grown.or(Worst::of(MILLION, &mut decide));
        wait();
        others = others.or(Worst::of(MILLION, |n| decide(MILLION + n)));
        // All of these are in debt: each new one takes the place of another.
        full = full.or(Worst::of(MILLION / 4, |n| decide(2 * MILLION + n)));

        let limiter = governor_by_key::<u64>(runs::lasting(MILLION).1);
        peer_grown = peer_grown.or(Worst::of(MILLION, |n| {
            limiter.check_key(&n).expect("its first");
        }));
        let quick = governor::Quota::with_period(SPAN / 100).expect("not zero");
        let limiter = governor_by_key::<u64>(quick);
        for n in 0..MILLION {
            limiter.check_key(&n).expect("its first");
        }
        wait();
        peer_swept = peer_swept.or(Worst::of(1, |_| limiter.retain_recent()));
    }
    pause(
        table,
        "worst decision, growing to 10^6 keys",
        grown,
        Some(peer_grown),
        Some(0.5),
    );
    pause(
        table,
        "worst decision, 10^6 expire, others come (governor: retain_recent)",
        others,
        Some(peer_swept),
        Some(0.5),
    );
    pause(
        table,
        "worst decision, 10^6 in debt, others come",
        full,
        None,
        Some(0.5),
    );
    pause(
        table,
        "worst turn of the loop alone (the machine's)",
        control,
        None,
        None,
    );
}

const SPAN: std::time::Duration = std::time::Duration::from_secs(2);

/// Waits until what is in debt for [`SPAN`] no longer is.
fn wait() {
    let start = wall_time();
    while u128::from(wall_time() - start) < SPAN.as_nanos() {
        std::thread::yield_now();
    }
}

fn threads(table: &mut Table, _: &Counts) {
    const CALLS: u64 = 200_000;
    let mut row = |what: &str, [mut a, mut b]: [Run; 2], goal| {
        let mut rounds = Vec::new();
        for _ in 0..31 {
            let one = measure::alone(&mut a, CALLS);
            let two = measure::both([&mut a, &mut b], CALLS);
            rounds.push((one, two));
        }
        let median = |of: fn(&(f64, f64)) -> f64| measure::median(rounds.iter().map(of).collect());
        table.push(Row {
            what: what.to_owned(),
            ours: nanos(median(|(_, two)| *two)),
            peer: nanos(median(|(one, _)| *one)),
            figure: median(|(one, two)| two / one),
            instructions: None,
            goal,
        });
    };
    row(
        "two threads, a key each, over one thread",
        runs::our_pair(1, true),
        Some(1.1),
    );
    row(
        "two threads, 1000 keys each, over one thread",
        runs::our_pair(1000, true),
        None,
    );
    row(
        "the same, limiters of their own (the machine's)",
        runs::our_pair(1000, false),
        None,
    );
    row(
        "the same by governor, a key each",
        runs::governor_pair(1),
        None,
    );
    row(
        "the same by governor, 1000 keys each",
        runs::governor_pair(1000),
        None,
    );
}
