//! The drain's layer over a bare HTTP service.
//!
//! `cargo bench -p buttress-benches -- drain`; with a longer name only the
//! sections whose name begins so: drain-calls, drain-threads, drain-counts.

use std::env;

use buttress_benches::{
    counts::Counts,
    drain::{apart, named, shared},
    measure::{Run, alone, both, interleave, median},
    table::{Row, Table, number},
};

#[expect(clippy::print_stdout, reason = "it is a program")]
fn main() {
    let only = env::args().skip(1).find(|arg| arg != "--bench");
    let only = only.unwrap_or_default();
    let mut table = Table::default();
    let mut told = false;
    for (name, section) in [
        ("drain-calls", calls as fn(&mut Table)),
        ("drain-threads", threads),
        ("drain-counts", allocations),
    ] {
        if name.starts_with(&only) {
            section(&mut table);
            told = true;
        }
    }
    if !told {
        return;
    }
    println!("{}", table.render());
    println!("figure: nanoseconds over the bare service, or what the goal bounds.");
}

fn nanos(cost: f64) -> String {
    format!("{} ns", number(cost))
}

fn calls(table: &mut Table) {
    let names = ["bare", "counted", "tracked", "streams", "signal", "refuse"];
    let mut all: [Run; 6] = names.map(|name| named(name).expect("a run's name"));
    let rounds = interleave(&mut all, 200);
    for (at, what, goal) in [
        (1, "counted, ns over bare", Some(25.0)),
        (2, "– tracked for the report", None),
        (3, "– streams that may be ended", None),
        (4, "– with the handlers' signal", None),
        (5, "refusal where it is not refused", None),
    ] {
        table.push(Row {
            what: what.into(),
            ours: nanos(rounds.cost(at)),
            peer: nanos(rounds.cost(0)),
            figure: rounds.median(|round| round[at] - round[0]),
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
        ("tracked", Some(0.0)),
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
