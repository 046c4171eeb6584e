//! Signing and verifying over the bare MAC of the same bytes; and what `emit`
//! costs.
//!
//! `cargo bench -p buttress-benches -- webhook`; with a longer name only the
//! sections whose name begins so: webhook-sign, webhook-verify, webhook-emit.

use std::env;

use buttress_benches::{
    delivery::emit,
    measure::interleave,
    table::{self, Row, Section, Table, number},
    webhook::{Make, SCHEMES, bare},
};

const LENGTHS: [(usize, &str); 3] = [(256, "256 B"), (1024, "1 KiB"), (64 << 10, "64 KiB")];

fn main() {
    let only = env::args().skip(1).find(|arg| arg != "--bench");
    let sections: [Section; 3] = [
        ("webhook-sign", |table| {
            rows(table, "sign", |(_, sign, _)| sign);
        }),
        ("webhook-verify", |table| {
            rows(table, "verify", |(_, _, verify)| verify);
        }),
        ("webhook-emit", emits),
    ];
    table::tell(
        &only.unwrap_or_default(),
        &sections,
        "time over that of hmac 0.13 with sha2 0.11, its key kept, over the same body; of emit as it says.",
    );
}

fn rows(table: &mut Table, what: &str, pick: fn((&'static str, Make, Make)) -> Make) {
    for (length, size) in LENGTHS {
        let mut all = vec![bare(length)];
        all.extend(SCHEMES.map(|scheme| pick(scheme)(length)));
        let rounds = interleave(&mut all, 100);
        for (at, (name, ..)) in (1..).zip(SCHEMES) {
            table.push(Row {
                what: format!("{what} {size}, {name}"),
                ours: format!("{} ns", number(rounds.cost(at))),
                peer: format!("{} ns", number(rounds.cost(0))),
                figure: rounds.median(|round| round[at] / round[0]),
                instructions: None,
                goal: Some(1.05),
            });
        }
    }
}

fn emits(table: &mut Table) {
    let mut all = [emit(0), emit(10_000), emit(90_000)];
    let rounds = interleave(&mut all, 30);
    for (at, others) in [(0, "nobody else"), (1, "10 000 others")] {
        table.push(Row {
            what: format!("emit to 10, {others}, microseconds"),
            ours: format!("{} ns", number(rounds.cost(at))),
            peer: String::new(),
            figure: rounds.cost(at) / 1000.0,
            instructions: None,
            goal: Some(20.0),
        });
    }
    for (at, others) in [(1, "10 000 others"), (2, "90 000 others")] {
        table.push(Row {
            what: format!("emit to 10, {others}, over nobody else"),
            ours: format!("{} ns", number(rounds.cost(at))),
            peer: format!("{} ns", number(rounds.cost(0))),
            figure: rounds.median(|round| round[at] / round[0]),
            instructions: None,
            goal: Some(1.1),
        });
    }
}
