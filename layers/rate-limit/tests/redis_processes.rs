//! One quota for processes of the operating system, each with a runtime, a
//! connection and clocks of its own: 2, 10 and 50 of them.
//!
//! The clocks of a process cannot all be set from within, so what is wrong here
//! is every one that this library ever reads: of each child the monotonic clock
//! is hours from the others', and the wall clock years, one ahead and the next
//! behind. What they let through is measured from outside, by the system's
//! monotonic clock, which no child can move.

use std::{
    convert::Infallible,
    env,
    io::Write as _,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use buttress_core::{clock, key, testing::web};
use buttress_rate_limit::{
    Limit, Quota, RateLimitLayer,
    redis::{Lease, Mode, OnStoreError},
};
use buttress_redis::{Config, Redis, testing::Server};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{advance, pause, resume, sleep};
use tower::{Layer, ServiceExt, service_fn};

/// `url mode number`: what a child is to do.
const ROLE: &str = "BUTTRESS_RATE_LIMIT_CHILD";

const RATE: u32 = 300;
/// Half a second of it.
const BURST: u32 = 150;
const SHARE: u32 = 20;
/// How long a child asks.
const ASKS: Duration = Duration::from_secs(1);
/// Within which a child has said all.
const PATIENCE: Duration = Duration::from_secs(60);
const HOUR: u64 = 3600;

/// When a request was sent that was let through, and when its answer was here:
/// microseconds by the system's clock. It was decided in between.
type Passed = (u64, u64);

/// What was let through; and of what was denied the first and the last.
#[derive(Default)]
struct Answers {
    passed: Vec<Passed>,
    denied: Vec<Passed>,
}

#[expect(clippy::cast_sign_loss, reason = "it does not start below zero")]
fn micros() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

async fn ok(_: Request<Full<Bytes>>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(web::response(200, ""))
}

/// What the tests below start. By itself it does nothing.
#[test]
fn child() {
    let Ok(role) = env::var(ROLE) else { return };
    let [url, mode, number] = role.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{role}")
    };
    let number: u64 = number.parse().unwrap();
    let mode = match mode {
        "strict" => Mode::Strict,
        _ => Mode::Leased(Lease::default().share(SHARE)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread();
    let answers = { runtime }
        .enable_all()
        .build()
        .unwrap()
        .block_on(ask(url, mode, number));
    let words = |of: &[Passed]| -> String {
        of.iter()
            .map(|(sent, answered)| format!("{sent} {answered} "))
            .collect()
    };
    let line = format!("{}/{}", words(&answers.passed), words(&answers.denied));
    // The test harness has begun a line of its own.
    writeln!(std::io::stdout(), "\nchild:{line}").unwrap();
}

async fn ask(url: &str, mode: Mode, number: u64) -> Answers {
    // Its monotonic clock: at its zero, and then hours from where the others'
    // are.
    let zero = clock::now();
    pause();
    advance(Duration::from_secs(number * HOUR)).await;
    resume();
    assert!(clock::now() - zero >= Duration::from_secs(number * HOUR));
    // And its wall clock: years ahead, or years behind.
    let year = 365 * 24 * HOUR;
    let wall = 30 * year + number * year * if number.is_multiple_of(2) { 1 } else { 40 };
    let config = Config::new(url)
        .timeout(Duration::from_secs(5))
        .connect_timeout(Duration::from_secs(5));
    let layer = RateLimitLayer::builder()
        .name("processes")
        .limit(Limit::new(Quota::per_second(RATE).burst(BURST)).key(key::header("x-key")))
        .wall_clock(move || Duration::from_secs(wall))
        .redis(&Redis::from_config(config).unwrap())
        .mode(mode)
        // What Redis did not decide is not counted.
        .on_store_error(OnStoreError::Deny)
        .build()
        .unwrap();
    let service = layer.layer(service_fn(ok));
    let mut answers = Answers::default();
    let end = clock::now() + ASKS;
    while clock::now() < end {
        let request = Request::builder().header("x-key", "one");
        let request = request.body(Full::default()).unwrap();
        let sent = micros();
        let response = service.clone().oneshot(request).await.unwrap();
        let answered = micros();
        match response.status().as_u16() {
            200 => {
                // Clients are told the time that is wrong, and it is.
                let reset = response.headers()["x-ratelimit-reset"].to_str().unwrap();
                let reset: u64 = reset.parse().unwrap();
                assert!((wall..wall + 60).contains(&reset), "{reset}");
                answers.passed.push((sent, answered));
            }
            429 => {
                answers.denied.truncate(1);
                answers.denied.push((sent, answered));
                sleep(Duration::from_millis(4)).await;
            }
            status => panic!("{status}"),
        }
    }
    layer.handle().give_back().await;
    answers
}

/// Children that are killed if they do not end by themselves.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What all of them answered.
async fn processes(count: usize, mode: &str) -> Answers {
    let server = Server::start().await;
    let (tell, told) = mpsc::channel();
    let mut children = Children(Vec::new());
    for number in 0..count {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, format!("{} {mode} {number}", server.url()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        children.0.push(child);
        let tell = tell.clone();
        thread::spawn(move || {
            let text = std::io::read_to_string(out).unwrap_or_default();
            let _ = tell.send(text);
        });
    }
    let mut answers = Answers::default();
    for _ in 0..count {
        let text = told.recv_timeout(PATIENCE).expect("a child hangs");
        let line = text.lines().find_map(|line| line.strip_prefix("child:"));
        let line = line.unwrap_or_else(|| panic!("a child has failed: {text}"));
        let read = |text: &str| -> Vec<Passed> {
            let words = text.split_whitespace().map(|word| word.parse().unwrap());
            let words: Vec<u64> = words.collect();
            words
                .chunks_exact(2)
                .map(|pair| (pair[0], pair[1]))
                .collect()
        };
        let (passed, denied) = line.split_once('/').unwrap();
        answers.passed.extend(read(passed));
        answers.denied.extend(read(denied));
    }
    answers
}

/// What a quota lets through in so many microseconds.
fn quota(micros: u64) -> f64 {
    f64::from(BURST) + f64::from(RATE) * micros as f64 / 1e6
}

/// How much more than by `bound` was let through in any span that begins with
/// a request and ends with an answer: zero or less is right.
fn excess(passed: &[Passed], bound: impl Fn(u64) -> f64) -> f64 {
    let mut by_answer = passed.to_vec();
    by_answer.sort_unstable_by_key(|(_, answered)| *answered);
    let mut most = f64::MIN;
    for &(begin, _) in passed {
        let mut count = 0.0;
        for &(sent, answered) in &by_answer {
            if sent >= begin {
                count += 1.0;
                most = most.max(count - bound(answered - begin));
            }
        }
    }
    most
}

/// How much of all that there was.
fn share_of_all(passed: &[Passed]) -> f64 {
    let first = passed.iter().map(|(sent, _)| sent).min().unwrap();
    let last = passed.iter().map(|(_, answered)| answered).max().unwrap();
    passed.len() as f64 / quota(last - first)
}

async fn strict(count: usize) {
    let Answers { passed, denied } = processes(count, "strict").await;
    let excess = excess(&passed, quota);
    assert!(excess <= 0.0, "{excess} too many of {}", passed.len());
    // Nothing is left when one is denied. So from the first of these to the
    // last all passed that came with time: on a machine that is too busy for
    // all to ask enough, too.
    let (_, from) = denied.iter().min().copied().expect("one is denied");
    let (to, _) = denied.iter().max().copied().expect("one is denied");
    let between = passed
        .iter()
        .filter(|(sent, answered)| *answered > from && *sent < to);
    let came = f64::from(RATE) * to.saturating_sub(from) as f64 / 1e6;
    assert!(came >= f64::from(RATE) / 4.0, "they did not ask enough");
    let share = between.count() as f64 / came;
    assert!(share >= 0.9, "{share} of {came}");
}

/// By what `Lease` promises: a process may have spent ahead, and from an unused
/// quota on nobody has.
async fn leased(count: usize) {
    let Answers { passed, .. } = processes(count, "leased").await;
    let ahead = count as f64 * 1.25 * f64::from(SHARE);
    let over = excess(&passed, |micros| quota(micros) + ahead);
    assert!(over <= 0.0, "{over} too many of {}", passed.len());
    // Who starts takes a part that others cannot use; not most of it.
    let share = share_of_all(&passed);
    assert!(share <= 1.0, "{share}, {} passed", passed.len());
    assert!(share >= 0.4, "{share}, {} passed", passed.len());
}

#[tokio::test]
async fn two_processes_strictly() {
    strict(2).await;
}

#[tokio::test]
async fn ten_processes_strictly() {
    strict(10).await;
}

#[tokio::test]
async fn fifty_processes_strictly() {
    strict(50).await;
}

#[tokio::test]
async fn two_processes_by_shares() {
    leased(2).await;
}

#[tokio::test]
async fn ten_processes_by_shares() {
    leased(10).await;
}

#[tokio::test]
async fn fifty_processes_by_shares() {
    leased(50).await;
}
