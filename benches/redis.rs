//! What is measured of the state in Redis: checks per second, and what each
//! costs the server, beside the least that a limiter could ask of it.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use buttress_core::clock;
use buttress_redis::{Cmd, Redis, testing::Server};
use http::{Request, Response};
use redis::aio::MultiplexedConnection;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_rate_limit_redis::KeyResolver;

/// One task's way to ask, which it does in a row; whether it was let in.
pub type Asker = Box<dyn FnMut() -> Asking + Send>;

/// One question.
pub type Asking = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Makes the askers of so many tasks.
pub type Askers = Box<dyn Fn(usize) -> Asker>;

/// The server's own account, through a connection that nobody else uses.
pub struct Account {
    redis: Redis,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").finish_non_exhaustive()
    }
}

/// What the server has done so far.
#[derive(Clone, Copy, Debug)]
struct Done {
    /// Commands that clients sent, but for those of the account.
    commands: f64,
    /// Processor time, in microseconds.
    cpu: f64,
}

impl Account {
    /// Of this server.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        Self {
            redis: server.redis(),
        }
    }

    async fn done(&self) -> Done {
        let mut info = Cmd::new();
        info.arg("INFO").arg("everything");
        let info: String = self
            .redis
            .run("info", &info)
            .await
            .expect("the server is there");
        let field = |name: &str| -> f64 {
            let line = info.lines().find_map(|line| line.strip_prefix(name));
            line.map_or(0.0, |value| value.trim().parse().expect("a number"))
        };
        // What scripts call counts, too, in all but the calls of the scripts.
        let calls = |name: &str| -> f64 {
            let name = format!("cmdstat_{name}:calls=");
            let line = info.lines().find_map(|line| line.strip_prefix(&name));
            line.map_or(0.0, |rest| {
                let (calls, _) = rest.split_once(',').expect("more follows");
                calls.parse().expect("a number")
            })
        };
        Done {
            commands: calls("evalsha") + calls("eval"),
            cpu: (field("used_cpu_sys:") + field("used_cpu_user:")) * 1e6,
        }
    }
}

/// What came of asking for a while.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Checks per second.
    pub rate: f64,
    /// Commands that each check cost.
    pub commands: f64,
    /// Microseconds of the server's processor that each check cost.
    pub cpu: f64,
}

/// Lets so many tasks ask for so long.
pub async fn turn(account: &Account, askers: &Askers, tasks: usize, lasting: Duration) -> Turn {
    let over = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicU64::new(0));
    let before = account.done().await;
    let began = clock::now();
    let running: Vec<_> = (0..tasks)
        .map(|task| {
            let (over, asked, mut ask) = (Arc::clone(&over), Arc::clone(&asked), askers(task));
            tokio::spawn(async move {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    ask().await;
                    count += 1;
                    // What is decided in this process never waits: others,
                    // and the clock, must have their turn.
                    if count % 64 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                asked.fetch_add(count, Ordering::Relaxed);
            })
        })
        .collect();
    tokio::time::sleep(lasting).await;
    over.store(true, Ordering::Relaxed);
    for task in running {
        task.await.expect("no asker panics");
    }
    let took = (clock::now() - began).as_secs_f64();
    let after = account.done().await;
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
    let asked = asked.load(Ordering::Relaxed) as f64;
    Turn {
        rate: asked / took,
        commands: (after.commands - before.commands) / asked,
        cpu: (after.cpu - before.cpu) / asked,
    }
}

/// The least script that keeps a limit by GCRA, in whole microseconds.
const LEAST: &str = "
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + ARGV[1]
if tat - now > tonumber(ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], string.format('%.0f', tat), 'PX', math.ceil((tat - now) / 1000))
return 1";

/// That script by EVALSHA and nothing else, on the keys of so many clients.
pub async fn bare(connection: MultiplexedConnection, clients: usize) -> Askers {
    let script = redis::Script::new(LEAST);
    let hash = script.get_hash().to_owned();
    let mut load = redis::cmd("SCRIPT");
    load.arg("LOAD").arg(LEAST);
    let _: String = load
        .query_async(&mut connection.clone())
        .await
        .expect("the server is there");
    Box::new(move |task| {
        let (connection, hash) = (connection.clone(), hash.clone());
        Box::new(move || {
            let (mut connection, hash) = (connection.clone(), hash.clone());
            Box::pin(async move {
                let mut check = redis::cmd("EVALSHA");
                // A microsecond each, and a burst that nobody reaches.
                check
                    .arg(hash)
                    .arg(1)
                    .arg(client(task % clients))
                    .arg(1)
                    .arg(1_000_000_000);
                let passed: i64 = check.query_async(&mut connection).await.expect("an answer");
                passed == 1
            })
        })
    })
}

/// What a client is known by: 23 bytes, as in the field's measurements.
fn client(task: usize) -> String {
    format!("client-000000-{task:09}")
}

/// A layer before a service that is always ready, asked by so many clients.
pub fn layered<L, R>(layer: L, clients: usize) -> Askers
where
    L: Layer<Bare>,
    L::Service: Service<Request<()>, Response = Response<R>> + Clone + Send + 'static,
    <L::Service as Service<Request<()>>>::Future: Send,
    <L::Service as Service<Request<()>>>::Error: fmt::Debug,
{
    let service = layer.layer(service_fn(answer as Answer));
    Box::new(move |task| {
        let (service, client) = (service.clone(), client(task % clients));
        Box::new(move || {
            let service = service.clone();
            let request = Request::builder().header("x-client", &*client);
            let request = request.body(()).expect("a sound request");
            Box::pin(async move {
                let response = service.oneshot(request).await.expect("an answer");
                response.status().is_success()
            })
        })
    })
}

type Answer = fn(Request<()>) -> std::future::Ready<Result<Response<String>, Infallible>>;

/// What every limiter stands before.
pub type Bare = tower::util::ServiceFn<Answer>;

fn answer(_: Request<()>) -> std::future::Ready<Result<Response<String>, Infallible>> {
    std::future::ready(Ok(Response::new(String::new())))
}

/// The peer's key: the same header.
#[derive(Clone, Debug)]
pub struct ByClient;

impl KeyResolver for ByClient {
    type Key = String;
    type ErrorBody = String;

    fn key<T>(&self, request: &Request<T>) -> Result<String, Response<String>> {
        let client = request.headers()["x-client"].to_str();
        Ok(client.expect("plain").to_owned())
    }
}
