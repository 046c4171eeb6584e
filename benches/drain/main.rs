//! The drain's layer over a bare HTTP service.
//!
//! `cargo bench -p buttress-benches -- drain`; with a longer name only the
//! sections whose name begins so: drain-calls, drain-threads, drain-counts.

use std::env;

use buttress_benches::{
    counts::{Counts, counted},
    drain::{apart, named, shared},
    measure::{Run, alone, both, interleave, median},
    table::{self, Row, Section, Table, number},
};

fn main() {
    let mut args = env::args().skip(1).filter(|arg| arg != "--bench");
    match args.next() {
        // For a profiler.
        Some(word) if word == "--calls" => {
            let name = args.next().expect("a run's name");
            let calls = args.next().and_then(|calls| calls.parse().ok());
            let mut run = named(&name).expect("a run's name");
            run(10);
            counted(&mut run, calls.expect("how many calls"));
        }
        only => tell(&only.unwrap_or_default()),
    }
}

fn tell(only: &str) {
    let sections: [Section; 3] = [
        ("drain-calls", calls),
        ("drain-threads", threads),
        ("drain-counts", allocations),
    ];
    table::tell(
        only,
        &sections,
        "nanoseconds over the bare service, or what the goal bounds.",
    );
}

fn nanos(cost: f64) -> String {
    format!("{} ns", number(cost))
}

fn calls(table: &mut Table) {
    let names = [
        "bare",
        "counted",
        "tracked",
        "streams",
        "signal",
        "refuse",
        "bare, empty",
        "counted, empty",
    ];
    let mut all: [Run; 8] = names.map(|name| named(name).expect("a run's name"));
    let rounds = interleave(&mut all, 200);
    for (at, bare, what, goal) in [
        (7, 6, "counted, an empty body, ns over bare", Some(25.0)),
        (1, 0, "– and a body of one frame", None),
        (2, 0, "– tracked for the report", None),
        (3, 0, "– streams that may be ended", None),
        (4, 0, "– with the handlers' signal", None),
        (5, 0, "refusal where it is not refused", None),
    ] {
        table.push(Row {
            what: what.into(),
            ours: nanos(rounds.cost(at)),
            peer: nanos(rounds.cost(bare)),
            figure: rounds.median(|round| round[at] - round[bare]),
            instructions: None,
            goal,
        });
    }
}

const CALLS: u64 = 500_000;

/// Two threads that count for one shutdown, beside one alone.
fn threads(table: &mut Table) {
    for (what, runs, goal) in [
        (
            "two threads, a shutdown each",
            apart as fn() -> [Run; 2],
            None,
        ),
        ("two threads, one shutdown", shared, Some(1.2)),
    ] {
        let rounds: Vec<[f64; 2]> = (0..9)
            .map(|_| {
                let [mut first, mut second] = runs();
                let one = alone(&mut first, CALLS);
                [both([&mut first, &mut second], CALLS), one]
            })
            .collect();
        let middle = |of: fn(&[f64; 2]) -> f64| median(rounds.iter().map(of).collect());
        table.push(Row {
            what: what.into(),
            ours: nanos(middle(|[two, _]| *two)),
            peer: nanos(middle(|[_, one]| *one)),
            figure: middle(|[two, one]| two / one),
            instructions: None,
            goal,
        });
    }
}

fn allocations(table: &mut Table) {
    let counts = Counts::take(env!("CARGO_BIN_EXE_count"), "drain");
    for (name, goal) in [
        ("counted", Some(0.0)),
        ("tracked", None),
        ("signal", None),
        ("refuse", Some(0.0)),
    ] {
        let (ours, bare) = (counts.allocations(name), counts.allocations("bare"));
        table.push(Row {
            what: format!("allocations, {name}"),
            ours: number(ours),
            peer: number(bare),
            figure: ours - bare,
            instructions: None,
            goal,
        });
    }
}
