//! What is counted and not timed: by the other program, and by callgrind.

use std::{collections::HashMap, env, process::Command};

use crate::measure::Run;

/// What `count` has counted, by its kind and the run's name.
#[derive(Debug)]
pub struct Counts(HashMap<String, f64>);

impl Counts {
    /// Runs `program` and keeps what it says.
    ///
    /// # Panics
    ///
    /// If there is no such program, or it does not write names and numbers.
    #[must_use]
    pub fn take(program: &str, only: &str) -> Self {
        let out = Command::new(program)
            .arg(only)
            .output()
            .expect("it was built with this one");
        let out = String::from_utf8(out.stdout).expect("it writes names and numbers");
        let lines = out.lines().filter_map(|line| {
            let (name, count) = line.rsplit_once('\t')?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        Self(lines.collect())
    }

    /// What was counted of that kind in that run.
    ///
    /// # Panics
    ///
    /// If it was not.
    #[must_use]
    pub fn of(&self, kind: &str, name: &str) -> f64 {
        let line = self.0.get(&format!("{kind}\t{name}"));
        *line.unwrap_or_else(|| panic!("{name} was not counted"))
    }

    /// Allocations a call.
    ///
    /// # Panics
    ///
    /// If no run of that name was counted.
    #[must_use]
    pub fn allocations(&self, name: &str) -> f64 {
        self.of("allocations", name)
    }
}

/// Callgrind counts only what happens in here.
#[inline(never)]
pub fn counted(run: &mut Run, calls: u64) {
    run(calls);
}

/// Instructions of one call; `None` without valgrind. This program must make
/// [`counted`] calls of a run when it is told `--calls NAME NUMBER`.
#[must_use]
pub fn instructions(name: &str) -> Option<f64> {
    let total = |calls: u32| {
        let out = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg("--toggle-collect=*counted*")
            .arg(env::current_exe().ok()?)
            .args(["--calls", name, &calls.to_string()])
            .output()
            .ok()?;
        let told = String::from_utf8_lossy(&out.stderr).into_owned();
        let line = told.lines().find(|line| line.contains("Collected"))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    Some((total(3000)? - total(1000)?) / 2000.0)
}
