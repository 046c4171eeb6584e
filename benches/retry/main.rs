//! Retries where none is needed, beside tower's own and tower-resilience's.
//!
//! `cargo bench -p buttress-benches -- retry`; with a longer name only the
//! sections whose name begins so: retry-calls, retry-bodies, retry-counts.

use std::env;

use buttress_benches::{
    counts::Counts,
    measure::{Run, interleave},
    retry::named,
    table::{self, Row, Section, Table, number},
};

fn main() {
    let only = env::args().skip(1).find(|arg| arg != "--bench");
    let sections: [Section; 3] = [
        ("retry-calls", calls),
        ("retry-bodies", bodies),
        ("retry-counts", allocations),
    ];
    table::tell(
        &only.unwrap_or_default(),
        &sections,
        "ours over the peer's, or what the goal bounds; times: the thread's own, a call.",
    );
}

fn runs<const N: usize>(names: [&str; N]) -> [Run; N] {
    names.map(|name| named(name).expect("a run's name"))
}

fn nanos(cost: f64) -> String {
    format!("{} ns", number(cost))
}

fn calls(table: &mut Table) {
    let mut all = runs([
        "bare",
        "ours",
        "ours, 30 s in all",
        "tower",
        "tower-resilience",
    ]);
    let rounds = interleave(&mut all, 200);
    let over = |at: usize| rounds.median(|round| round[at] - round[0]);
    for (at, what, peer, of, goal) in [
        (1, "no retry needed", 4, "tower-resilience", Some(0.15)),
        (1, "no retry needed", 3, "tower's own", None),
        (2, "– with a total timeout", 4, "tower-resilience", None),
    ] {
        table.push(Row {
            what: format!("{what}, over {of}"),
            ours: nanos(over(at)),
            peer: nanos(over(peer)),
            figure: rounds.median(|round| (round[at] - round[0]) / (round[peer] - round[0])),
            instructions: None,
            goal,
        });
    }
}

fn bodies(table: &mut Table) {
    let mut all = runs(["http, 1 KiB, a copy of the head", "http, 1 KiB, ours"]);
    let rounds = interleave(&mut all, 100);
    table.push(Row {
        what: "http, 1 KiB body, over a copy of the head".into(),
        ours: nanos(rounds.cost(1)),
        peer: nanos(rounds.cost(0)),
        figure: rounds.median(|round| round[1] / round[0]),
        instructions: None,
        goal: None,
    });
    let mut all = runs(["http, 10 MiB, bare", "http, 10 MiB, ours"]);
    let rounds = interleave(&mut all, 40);
    table.push(Row {
        what: "http, 10 MiB body, time over bare".into(),
        ours: nanos(rounds.cost(1)),
        peer: nanos(rounds.cost(0)),
        figure: rounds.median(|round| round[1] / round[0]),
        instructions: None,
        // Of the throughput without the layer, 0.95.
        goal: Some(1.0 / 0.95),
    });
}

fn allocations(table: &mut Table) {
    let counts = Counts::take(env!("CARGO_BIN_EXE_count"), "retry");
    for (name, peer, goal) in [
        ("ours", "tower-resilience", Some(0.0)),
        ("ours, 30 s in all", "tower-resilience", Some(0.0)),
        (
            "http, 1 KiB, ours",
            "http, 1 KiB, a copy of the head",
            Some(2.0),
        ),
        ("http, 10 MiB, ours", "http, 10 MiB, bare", None),
    ] {
        let (ours, beside) = (counts.allocations(name), counts.allocations(peer));
        let over = if name.starts_with("http") {
            ours - beside
        } else {
            ours
        };
        table.push(Row {
            what: format!("allocations, {name}"),
            ours: number(ours),
            peer: number(beside),
            figure: over,
            instructions: None,
            goal,
        });
    }
}
