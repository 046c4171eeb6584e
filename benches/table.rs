//! The table of ratios that a bench ends with.

use std::fmt::Write as _;

/// A table of what was measured, and whether it is what was hoped for.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<[String; 7]>,
}

/// One line: what, in numbers, and what was to be reached.
#[derive(Debug)]
pub struct Row {
    /// What is measured.
    pub what: String,
    /// Ours, with its unit.
    pub ours: String,
    /// The peer's.
    pub peer: String,
    /// Ours over the peer's, or what else the goal is a bound for.
    pub figure: f64,
    /// The same by instructions, which no neighbour disturbs.
    pub instructions: Option<f64>,
    /// At most this; nothing is asked where there is none.
    pub goal: Option<f64>,
}

impl Table {
    /// Adds a line.
    pub fn push(&mut self, row: Row) {
        let verdict = match row.goal {
            None => "",
            Some(goal) if row.figure <= goal => "ok",
            Some(_) => "short",
        };
        self.rows.push([
            row.what,
            row.ours,
            row.peer,
            number(row.figure),
            row.instructions.map(number).unwrap_or_default(),
            row.goal
                .map(|goal| format!("<= {}", number(goal)))
                .unwrap_or_default(),
            verdict.into(),
        ]);
    }

    /// The table in Markdown, its columns aligned.
    #[must_use]
    pub fn render(&self) -> String {
        let head = [
            "what",
            "ours",
            "peer",
            "figure",
            "by instructions",
            "goal",
            "verdict",
        ]
        .map(String::from);
        let mut widths = [0; 7];
        for row in self.rows.iter().chain([&head]) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = String::new();
        let mut line = |cells: &[String; 7]| {
            for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let _ = match at {
                    0 => write!(out, "| {cell:<width$} |"),
                    _ => write!(out, " {cell:>width$} |"),
                };
            }
            out.push('\n');
        };
        line(&head);
        line(&widths.map(|width| "-".repeat(width)));
        self.rows.iter().for_each(line);
        out
    }
}

/// A part of a bench, and what it is called.
pub type Section = (&'static str, fn(&mut Table));

/// Runs the sections whose name begins so, and tells what came of them; says
/// nothing where there is none. `figure` is what the figures are.
#[expect(clippy::print_stdout, reason = "it is what a bench is for")]
pub fn tell(only: &str, sections: &[Section], figure: &str) {
    let mut chosen = sections.iter().filter(|(name, _)| name.starts_with(only));
    let Some(first) = chosen.next() else {
        return;
    };
    let mut table = Table::default();
    for (_, section) in std::iter::once(first).chain(chosen) {
        section(&mut table);
    }
    println!("{}", table.render());
    println!("figure: {figure}");
}

/// Three digits that count.
#[must_use]
pub fn number(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}
