//! State in Redis: a limiter's checks beside the least script there could be,
//! and beside a peer; the commands and the server's time they cost.
//!
//! `cargo bench -p buttress-benches -- redis`; with a longer name only the
//! sections whose name begins so: redis-strict, redis-leased, redis-denied.
//! Wants `redis-server`, which it starts on a free port.

use std::{env, time::Duration};

use buttress_benches::{
    measure::{median, pin_to},
    redis::{Account, Askers, ByClient, Turn, bare, layered, turn},
    table::{self, Row, Section, Table, number},
};
use buttress_core::key;
use buttress_rate_limit::{
    Limit, Quota, RateLimitLayer,
    redis::{Lease, Mode},
};
use buttress_redis::{Redis, testing::Server};
use tower_rate_limit_redis::RateLimitLayer as PeerLayer;

const ROUNDS: usize = 9;
const TURN: Duration = Duration::from_millis(300);

fn main() {
    let only = env::args().skip(1).find(|arg| arg != "--bench");
    let sections: [Section; 3] = [
        ("redis-strict", |table| block_on(strict(table))),
        ("redis-leased", |table| block_on(leased(table))),
        ("redis-denied", |table| block_on(denied(table))),
    ];
    table::tell(
        &only.unwrap_or_default(),
        &sections,
        "the peer's checks per second over ours, or what the line says of each check.",
    );
}

/// One thread for all that asks.
fn block_on(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(work);
}

/// A server on one processor; what asks it is on the other from now on.
async fn server() -> (Server, Redis, Account) {
    // A child is where its parent was.
    pin_to(0);
    let server = Server::start().await;
    pin_to(1);
    let redis = server.redis();
    redis.connect().await.expect("it has just started");
    let account = Account::of(&server);
    (server, redis, account)
}

/// A quota that nobody comes near.
fn wide() -> Limit {
    Limit::new(Quota::new(1_000_000, Duration::from_secs(1)).burst(100_000_000))
        .key(key::header("x-client"))
}

fn ours(redis: &Redis, mode: Mode, clients: usize) -> Askers {
    let layer = RateLimitLayer::builder().limit(wide()).redis(redis);
    layered(layer.mode(mode).build().expect("it is sound"), clients)
}

/// The same without headers, of which the peer has none where it lets in.
fn plain(redis: &Redis, clients: usize) -> Askers {
    let layer = RateLimitLayer::builder().limit(wide()).headers([]);
    layered(layer.redis(redis).build().expect("it is sound"), clients)
}

async fn peer(server: &Server, clients: usize) -> Askers {
    let client = redis_0_32::Client::open(server.url()).expect("a URL");
    let connection = client.get_multiplexed_async_connection().await;
    layered(
        PeerLayer::builder()
            .conn(connection.expect("the server is there"))
            .key_resolver(ByClient)
            .capacity(u16::MAX)
            .emission_interval(Duration::from_millis(1))
            // As its own example has it: without one it may wait for ever.
            .timeout(Duration::from_millis(300))
            .build(),
        clients,
    )
}

/// Turns of each, one after the other, so that a slow spell meets all.
async fn rounds(account: &Account, all: &[&Askers], tasks: usize) -> Vec<Vec<Turn>> {
    for askers in all {
        turn(account, askers, tasks, TURN / 3).await;
    }
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let mut turns = vec![None; all.len()];
        for step in 0..all.len() {
            let at = (step + round) % all.len();
            turns[at] = Some(turn(account, all[at], tasks, TURN).await);
        }
        rounds.push(turns.into_iter().flatten().collect());
    }
    rounds
}

fn middle(rounds: &[Vec<Turn>], of: impl Fn(&[Turn]) -> f64) -> f64 {
    median(rounds.iter().map(|round| of(round)).collect())
}

fn per_second(rate: f64) -> String {
    format!("{rate:.0}/s")
}

async fn strict(table: &mut Table) {
    let (server, redis, account) = server().await;
    let client = ::redis::Client::open(server.url()).expect("a URL");
    for (tasks, clients, goal, cpu_goal) in [
        (1, 1, 0.9, None),
        (50, 1, 1.3, Some(0.6)),
        (50, 50, 1.3, Some(0.6)),
        (500, 1, 1.8, None),
        (500, 500, 1.8, None),
    ] {
        let connection = client.get_multiplexed_async_connection().await;
        let least = bare(connection.expect("the server is there"), clients).await;
        let peer = peer(&server, clients).await;
        let ours = ours(&redis, Mode::Strict, clients);
        let plain = plain(&redis, clients);
        let rounds = rounds(&account, &[&least, &peer, &ours, &plain], tasks).await;
        let rate = |at: usize| middle(&rounds, |round| round[at].rate);
        for (at, name, goal) in [(0, "the least script", 1.0 / goal), (1, "the peer", 1.0)] {
            table.push(Row {
                what: format!("strict, {tasks} tasks, {clients} keys, {name} over it"),
                ours: per_second(rate(2)),
                peer: per_second(rate(at)),
                figure: middle(&rounds, |round| round[at].rate / round[2].rate),
                instructions: None,
                goal: Some(goal),
            });
        }
        table.push(Row {
            what: "  the peer over it without headers".into(),
            ours: per_second(rate(3)),
            peer: per_second(rate(1)),
            figure: middle(&rounds, |round| round[1].rate / round[3].rate),
            instructions: None,
            goal: Some(1.0),
        });
        table.push(Row {
            what: "  commands a check".into(),
            ours: number(middle(&rounds, |round| round[2].commands)),
            peer: number(middle(&rounds, |round| round[1].commands)),
            figure: middle(&rounds, |round| round[2].commands),
            instructions: None,
            goal: Some(1.0),
        });
        table.push(Row {
            what: "  the server's time a check, over the peer's".into(),
            ours: format!("{} µs", number(middle(&rounds, |round| round[2].cpu))),
            peer: format!("{} µs", number(middle(&rounds, |round| round[1].cpu))),
            figure: middle(&rounds, |round| round[2].cpu / round[1].cpu),
            instructions: None,
            goal: cpu_goal,
        });
    }
}

async fn leased(table: &mut Table) {
    let (_server, redis, account) = server().await;
    let strict = ours(&redis, Mode::Strict, 1);
    let leased = ours(&redis, Mode::Leased(Lease::default().share(100)), 1);
    for tasks in [1, 50] {
        let rounds = rounds(&account, &[&strict, &leased], tasks).await;
        let rate = |at: usize| middle(&rounds, |round| round[at].rate);
        table.push(Row {
            what: format!("a share of 100, {tasks} tasks, strict over it"),
            ours: per_second(rate(1)),
            peer: per_second(rate(0)),
            figure: middle(&rounds, |round| round[0].rate / round[1].rate),
            instructions: None,
            goal: Some(1.0 / 30.0),
        });
        table.push(Row {
            what: "  commands a check".into(),
            ours: number(middle(&rounds, |round| round[1].commands)),
            peer: number(middle(&rounds, |round| round[0].commands)),
            figure: middle(&rounds, |round| round[1].commands),
            instructions: None,
            goal: Some(0.011),
        });
        table.push(Row {
            what: "  the server's time a check, over strict's".into(),
            ours: format!("{} µs", number(middle(&rounds, |round| round[1].cpu))),
            peer: format!("{} µs", number(middle(&rounds, |round| round[0].cpu))),
            figure: middle(&rounds, |round| round[1].cpu / round[0].cpu),
            instructions: None,
            goal: Some(1.0 / 50.0),
        });
    }
}

/// One key, a token each 20 ms, and fifty who do not take no for an answer.
async fn denied(table: &mut Table) {
    let (_server, redis, account) = server().await;
    let limit = Limit::new(Quota::new(50, Duration::from_secs(1)).burst(1));
    let layer = RateLimitLayer::builder().limit(limit).redis(&redis);
    let askers = layered(layer.build().expect("it is sound"), 1);
    let rounds = rounds(&account, &[&askers], 50).await;
    let per_token = |turn: &Turn| turn.commands * turn.rate / 50.0;
    table.push(Row {
        what: "denied, 50 tasks: commands for each token's time".into(),
        ours: number(middle(&rounds, |round| per_token(&round[0]))),
        peer: per_second(middle(&rounds, |round| round[0].rate)),
        figure: middle(&rounds, |round| per_token(&round[0])),
        instructions: None,
        goal: Some(1.0),
    });
}
