//! The targets without libFuzzer, on any compiler: lines of random text and of
//! the words that parsers look for, changed here and there, without knowledge
//! of what was reached.
//!
//!     stable SECONDS [TARGET…]

use std::{env, panic, process::ExitCode, time::Duration};

use buttress_fuzz::{TARGETS, Target, WORDS};

const LINES: usize = 6;
const WORDS_IN_A_LINE: usize = 8;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let Some(seconds) = arguments.next().and_then(|text| text.parse().ok()) else {
        eprintln!("usage: stable SECONDS [TARGET…]");
        return ExitCode::from(2);
    };
    let wanted: Vec<String> = arguments.collect();
    let unknown = wanted
        .iter()
        .find(|name| TARGETS.iter().all(|(known, _)| known != name));
    if let Some(name) = unknown {
        eprintln!("there is no target {name}");
        return ExitCode::from(2);
    }
    let chosen = |(name, _): &&Target| wanted.is_empty() || wanted.iter().any(|want| want == name);
    let mut code = ExitCode::SUCCESS;
    for target in TARGETS.iter().filter(chosen) {
        if !run(target, Duration::from_secs(seconds)) {
            code = ExitCode::FAILURE;
        }
    }
    code
}

fn run(&(name, target): &Target, span: Duration) -> bool {
    let end = buttress_core::clock::now() + span;
    let mut count = 0_u64;
    while buttress_core::clock::now() < end {
        for _ in 0..1000 {
            let seed = fastrand::u64(..);
            let data = made_up(&mut fastrand::Rng::with_seed(seed));
            if panic::catch_unwind(|| target(&data)).is_err() {
                println!("{name}: FAILED by {}", data.escape_ascii());
                return false;
            }
            count += 1;
        }
    }
    println!("{name}: {count} inputs, none that fails");
    true
}

fn made_up(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..random.usize(1..=LINES) {
        data.push(random.u8(..));
        for _ in 0..random.usize(0..=WORDS_IN_A_LINE) {
            match random.u8(0..4) {
                0 => data.push(random.u8(..)),
                1 => data.extend_from_slice(random.u64(..).to_string().as_bytes()),
                _ => {
                    let word = WORDS[random.usize(..WORDS.len())];
                    data.extend_from_slice(word.as_bytes());
                }
            }
        }
        data.push(b'\n');
    }
    for _ in 0..random.usize(0..3) {
        let at = random.usize(..data.len());
        match random.u8(0..3) {
            0 => data[at] = random.u8(..),
            1 => drop(data.remove(at)),
            _ => data.insert(at, random.u8(..)),
        }
        if data.is_empty() {
            break;
        }
    }
    data
}
