//! Signing and verifying over the bare MAC of the same bytes; and what `emit`
//! costs.
//!
//! `cargo bench -p buttress-benches -- webhook`; with a longer name only the
//! sections whose name begins so: webhook-sign, webhook-verify,
//! webhook-backends, webhook-emit.

use std::env;

use buttress_benches::{
    delivery::emit,
    measure::interleave,
    table::{self, Row, Section, Table, number},
    webhook::{Make, SCHEMES, bare, bare_aws_lc},
};

const LENGTHS: [(usize, &str); 3] = [(256, "256 B"), (1024, "1 KiB"), (64 << 10, "64 KiB")];

fn main() {
    let only = env::args().skip(1).find(|arg| arg != "--bench");
    let sections: [Section; 4] = [
        ("webhook-sign", |table| {
            rows(table, "sign", |(_, _, sign, _)| sign);
        }),
        ("webhook-verify", |table| {
            rows(table, "verify", |(_, _, _, verify)| verify);
        }),
        ("webhook-backends", backends),
        ("webhook-emit", emits),
    ];
    table::tell(
        &only.unwrap_or_default(),
        &sections,
        "time over that of hmac 0.13 with sha2 0.11, its key kept, over the same bytes; of emit as it says.",
    );
}

fn rows(table: &mut Table, what: &str, pick: fn((&'static str, Make, Make, Make)) -> Make) {
    for (length, size) in LENGTHS {
        for scheme @ (name, bare, ..) in SCHEMES {
            let rounds = interleave(&mut [bare(length), pick(scheme)(length)], 100);
            table.push(Row {
                what: format!("{what} {size}, {name}"),
                ours: format!("{} ns", number(rounds.cost(1))),
                peer: format!("{} ns", number(rounds.cost(0))),
                figure: rounds.median(|round| round[1] / round[0]),
                instructions: None,
                goal: Some(1.05),
            });
        }
    }
}

/// What the feature `aws-lc-rs` is chosen by.
fn backends(table: &mut Table) {
    for (length, size) in LENGTHS {
        let mut all = [bare("", length), bare_aws_lc(length)];
        let rounds = interleave(&mut all, 100);
        table.push(Row {
            what: format!("MAC alone {size}, AWS-LC over sha2"),
            ours: format!("{} ns", number(rounds.cost(1))),
            peer: format!("{} ns", number(rounds.cost(0))),
            figure: rounds.median(|round| round[1] / round[0]),
            instructions: None,
            goal: None,
        });
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
