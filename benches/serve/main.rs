//! Our server beside `axum::serve`.
//!
//! `cargo bench -p buttress-benches -- serve`; with a longer name only the
//! sections whose name begins so: serve-load, serve-calls, serve-counts.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use buttress_benches::{
    counts::{Counts, counted},
    measure::{Run, interleave, median, pin_to},
    serve::{AXUM, COUNTED, Load, NODELAY, OURS, SERVERS, Way, load, named, process},
    table::{self, Row, Section, Table, number},
};

/// Of the peer's requests per second, 0.95.
const GOAL: f64 = 1.0 / 0.95;

fn main() {
    let mut args = env::args().skip(1).filter(|arg| arg != "--bench");
    match args.next() {
        Some(word) if word == "--serve" => process(&args.next().expect("a server's name")),
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
        ("serve-load", loads),
        ("serve-calls", calls),
        ("serve-counts", allocations),
    ];
    table::tell(
        only,
        &sections,
        "axum's requests per second over ours, our processor time over axum's,\n\
         or allocations beyond axum's.",
    );
}

/// A server in a process of its own.
struct Served {
    name: &'static str,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    addr: SocketAddr,
}

impl Served {
    fn start(name: &'static str) -> Self {
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args(["--serve", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stdin = child.stdin.take().expect("piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut addr = String::new();
        stdout.read_line(&mut addr).expect("it says where");
        Self {
            name,
            child,
            stdin,
            stdout,
            addr: addr.trim().parse().expect("an address"),
        }
    }

    /// The processor time it has had, in nanoseconds.
    fn cpu(&mut self) -> f64 {
        self.stdin.write_all(b"\n").expect("it listens");
        let mut nanos = String::new();
        self.stdout.read_line(&mut nanos).expect("it tells");
        nanos.trim().parse().expect("a number")
    }

    /// Requests per second, and its processor time for each in nanoseconds.
    fn turn(&mut self, tool: Option<&str>, way: Way) -> Turn {
        let before = self.cpu();
        let requests = match tool {
            Some(tool) => driven(tool, self.addr, way),
            None => {
                let lasting = Duration::from_secs(TURN);
                let load_of = Load {
                    connections: connections(way),
                    streams: STREAMS,
                    lasting,
                };
                as_float(load(self.addr, way, load_of))
            }
        };
        let turn = Turn {
            rate: requests / as_float(TURN),
            cost: (self.cpu() - before) / requests,
        };
        assert!(requests > 0.0, "{} answered nothing", self.name);
        turn
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy)]
struct Turn {
    rate: f64,
    cost: f64,
}

/// Seconds.
const TURN: u64 = 1;
const STREAMS: usize = 16;

const fn connections(way: Way) -> usize {
    match way {
        Way::Http1 | Way::Once => 64,
        Way::Http2 => 8,
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
const fn as_float(number: u64) -> f64 {
    number as f64
}

fn is_there(tool: &str) -> bool {
    let tried = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    tried.is_ok()
}

/// How many requests it made in a turn.
fn driven(tool: &str, addr: SocketAddr, way: Way) -> f64 {
    let mut command = Command::new(tool);
    let connections = connections(way).to_string();
    let (turn, url) = (TURN.to_string(), format!("http://{addr}/"));
    match way {
        Way::Http1 => command.args(["-t1", "-c", &connections, "-d", &turn]),
        Way::Once => {
            command.args(["-t1", "-c", &connections, "-d", &turn]);
            command.args(["-H", "Connection: close"])
        }
        Way::Http2 => {
            command.args(["-t1", "-c", &connections, "-D", &turn]);
            command.args(["-m", &STREAMS.to_string()])
        }
    };
    let out = command.arg(&url).output().expect("it is installed");
    let told = String::from_utf8_lossy(&out.stdout);
    let failed = told.contains("Non-2xx") || told.contains("Socket errors");
    // h2load counts what is open when time is up as failed, unless it is not.
    let h2_failed = told
        .lines()
        .find(|line| line.starts_with("requests:"))
        .is_some_and(|line| !line.contains(" 0 failed") || !line.contains(" 0 errored"));
    assert!(!failed && !h2_failed, "{told}");
    let count = told.lines().find_map(|line| {
        let (before, _) = line.split_once(match way {
            Way::Http2 => " succeeded",
            Way::Http1 | Way::Once => " requests in ",
        })?;
        before.rsplit([' ', ',']).next()?.parse().ok()
    });
    count.unwrap_or_else(|| panic!("{told}"))
}

const ROUNDS: usize = 15;

/// Servers on one processor, the load on another.
#[expect(clippy::print_stdout, reason = "it is a program")]
fn loads(table: &mut Table) {
    pin_to(1);
    let mut servers = SERVERS.map(Served::start);
    let at = |name| SERVERS.iter().position(|known| *known == name);
    let at = |name| at(name).expect("one of them");
    for (what, way, tool) in [
        ("HTTP/1.1, kept alive", Way::Http1, "wrk"),
        ("HTTP/2", Way::Http2, "h2load"),
        ("a connection each", Way::Once, "wrk"),
    ] {
        let tool = Some(tool).filter(|tool| is_there(tool));
        println!("{what}: the load is {}'s", tool.unwrap_or("the bench"));
        for server in &mut servers {
            server.turn(tool, way);
        }
        let rounds: Vec<Vec<Turn>> = (0..ROUNDS)
            .map(|round| {
                let mut turns = vec![
                    Turn {
                        rate: 0.0,
                        cost: 0.0
                    };
                    servers.len()
                ];
                for step in 0..servers.len() {
                    let at = (step + round) % servers.len();
                    turns[at] = servers[at].turn(tool, way);
                }
                turns
            })
            .collect();
        let middle =
            |of: &dyn Fn(&[Turn]) -> f64| median(rounds.iter().map(|round| of(round)).collect());
        let axum = at(AXUM);
        for (name, told, goal) in [
            (OURS, what.to_owned(), Some(GOAL)),
            (COUNTED, "– with the layer".to_owned(), None),
            (
                NODELAY,
                "– axum with TCP_NODELAY in our place".to_owned(),
                None,
            ),
        ] {
            let ours = at(name);
            table.push(Row {
                what: told,
                ours: per_second(middle(&|round| round[ours].rate)),
                peer: per_second(middle(&|round| round[axum].rate)),
                figure: middle(&|round| round[axum].rate / round[ours].rate),
                instructions: None,
                goal,
            });
            table.push(Row {
                what: "  its processor time".into(),
                ours: micros(middle(&|round| round[ours].cost)),
                peer: micros(middle(&|round| round[axum].cost)),
                figure: middle(&|round| round[ours].cost / round[axum].cost),
                instructions: None,
                goal: None,
            });
        }
    }
}

fn per_second(rate: f64) -> String {
    format!("{rate:.0}/s")
}

fn micros(nanos: f64) -> String {
    format!("{} µs", number(nanos / 1000.0))
}

/// Server and client on one thread, one request at a time: of either no more
/// than the other's time is in it, and nobody waits.
fn calls(table: &mut Table) {
    for (way, what) in [
        ("h1", "one at a time, HTTP/1.1, with its client"),
        ("h2", "one at a time, HTTP/2"),
        ("once", "one at a time, a connection each"),
    ] {
        let run = |name: &str| named(&format!("{way}, {name}")).expect("a run's name");
        let mut all: Vec<Run> = SERVERS.iter().map(|name| run(name)).collect();
        let rounds = interleave(&mut all, 150);
        for (at, what) in [
            (2, what),
            (3, "– with the layer"),
            (1, "– axum with TCP_NODELAY"),
        ] {
            table.push(Row {
                what: what.into(),
                ours: micros(rounds.cost(at)),
                peer: micros(rounds.cost(0)),
                figure: rounds.median(|round| round[at] / round[0]),
                instructions: None,
                goal: None,
            });
        }
    }
}

fn allocations(table: &mut Table) {
    let counts = Counts::take(env!("CARGO_BIN_EXE_count"), "serve");
    for (way, goal) in [("h1", Some(0.0)), ("h2", Some(0.0)), ("once", None)] {
        let of = |name: &str| counts.allocations(&format!("{way}, {name}"));
        for name in [OURS, COUNTED] {
            table.push(Row {
                what: format!("allocations, {way}, {name}"),
                ours: number(of(name)),
                peer: number(of(AXUM)),
                figure: of(name) - of(AXUM),
                instructions: None,
                goal,
            });
        }
    }
}
