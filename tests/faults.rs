//! A stack whose state is in Redis, under load, while a real server fails in
//! each way that servers fail: what clients see of it.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use buttress::{
    ServiceBuilderExt,
    circuit_breaker::{CircuitBreakerLayer, Sharing},
    clock::{self, Instant},
    key,
    rate_limit::{
        Limit, Quota, RateLimitLayer,
        redis::{FleetHandle, Mode},
    },
    redis::{
        Config, Key, Redis,
        testing::{Cluster, Server, Wire},
    },
};
use http::{Request, Response};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::{ServiceBuilder, ServiceExt, service_fn};

const TIMEOUT: Duration = Duration::from_millis(100);

/// What a machine adds that is busy with other tests.
const BUSY: Duration = Duration::from_millis(400);

/// Within a second, that is, and what a busy machine adds.
const SOON: Duration = Duration::from_secs(4);

/// What each client saw: when it asked, how long it took, and the status.
type Seen = Arc<Mutex<Vec<(Instant, Duration, u16)>>>;

/// Twenty clients who ask without end, through a limit that none of them comes
/// near and a breaker that stays closed.
struct Load {
    began: Instant,
    redis: Redis,
    handle: FleetHandle,
    /// Another process's.
    other: FleetHandle,
    over: Arc<AtomicBool>,
    seen: Seen,
    tasks: JoinSet<()>,
}

impl Load {
    async fn on(config: Config, mode: Mode) -> Self {
        let redis = Redis::from_config(config.clone().timeout(TIMEOUT)).unwrap();
        redis.connect().await.unwrap();
        // So slow to come back that each client's key stays in Redis.
        let quota = Quota::new(100, Duration::from_secs(1)).burst(1_000_000);
        let limited = |redis: &Redis, mode| {
            RateLimitLayer::builder()
                .limit(Limit::new(quota).name("all").key(key::header("x-client")))
                .redis(redis)
                .mode(mode)
                .build()
                .unwrap()
        };
        let limit = limited(&redis, mode);
        let other = Redis::from_config(config.timeout(TIMEOUT)).unwrap();
        let other = limited(&other, Mode::Strict).handle();
        let breaker = CircuitBreakerLayer::builder()
            .name("upstream")
            .redis(Sharing::new(&redis))
            .build()
            .unwrap();
        let handle = limit.handle();
        let service = ServiceBuilder::new()
            .limit_rate(limit)
            .circuit_breaker(breaker)
            .service(service_fn(async |_: Request<String>| {
                Ok::<_, Infallible>(Response::new(String::new()))
            }));
        let over = Arc::new(AtomicBool::new(false));
        let seen = Seen::default();
        let mut tasks = JoinSet::new();
        for client in 0..20 {
            let (service, over, seen) = (service.clone(), Arc::clone(&over), Arc::clone(&seen));
            tasks.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let request = Request::builder().header("x-client", format!("c{client}"));
                    let request = request.body(String::new()).unwrap();
                    let began = clock::now();
                    let response = service.clone().oneshot(request).await.unwrap();
                    let took = clock::now() - began;
                    seen.lock()
                        .unwrap()
                        .push((began, took, response.status().as_u16()));
                    // Load, and not a race for the processor.
                    sleep(Duration::from_millis(1)).await;
                }
            });
        }
        let load = Self {
            began: clock::now(),
            redis,
            handle,
            other,
            over,
            seen,
            tasks,
        };
        sleep(Duration::from_millis(300)).await;
        load
    }

    /// How long 99 of 100 took at most of those who came from then on, for so
    /// long.
    fn p99(&self, from: Instant, length: Duration) -> Duration {
        let seen = self.seen.lock().unwrap();
        let mut took: Vec<_> = seen
            .iter()
            .filter(|(began, ..)| *began >= from && *began < from + length)
            .map(|(_, took, _)| *took)
            .collect();
        took.sort_unstable();
        let at = took.len() * 99 / 100;
        took.get(at).copied().unwrap_or_default()
    }

    /// Until a charge is made in Redis again, where another process finds it.
    async fn correct(&self) {
        const COST: u32 = 1_000;

        let key = key::Key::from("witness");
        let limit = self.handle.limit("all").unwrap();
        let charged = async {
            loop {
                let passes = limit.charge(&key, COST).await.is_ok();
                if let (true, Ok(seen)) = (passes, self.other.usage("all", &key).await)
                    && seen.limit - seen.remaining > COST / 2
                {
                    return;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, charged)
            .await
            .expect("it is right again soon");
    }

    /// Nobody has seen an error; and so long did it take at first, and later.
    #[expect(clippy::print_stdout, reason = "figures, for who asks for them")]
    async fn end(mut self, fault: &str, failed: Instant) {
        self.correct().await;
        sleep(Duration::from_millis(300)).await;
        self.over.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        let normal = self.p99(self.began, failed - self.began);
        let first = self.p99(failed, Duration::from_secs(1));
        let later = self.p99(failed + Duration::from_secs(1), Duration::from_secs(60));
        let seen = self.seen.lock().unwrap();
        let longest = seen.iter().map(|(_, took, _)| *took).max().unwrap();
        println!(
            "{fault}: {} calls; p99 {normal:?} before, {first:?} in the first second, {later:?} after; longest {longest:?}",
            seen.len()
        );
        assert!(seen.len() > 500, "{fault}: {} calls", seen.len());
        let status = seen.iter().find(|(.., status)| *status != 200);
        assert_eq!(status, None, "{fault}");
        assert!(first < TIMEOUT + BUSY, "{fault}: {first:?}");
        assert!(later < TIMEOUT + BUSY, "{fault}: {later:?}");
        assert!(longest < 2 * TIMEOUT + 2 * BUSY, "{fault}: {longest:?}");
    }
}

/// The limiter's own keys, wherever they are: whoever moves another slot moves
/// nothing that anybody asks for.
async fn limited(cluster: &Cluster, redis: &Redis) -> Vec<Key> {
    let mut keys = Vec::new();
    for node in cluster.nodes() {
        let found: Vec<String> = node.cmd(&["KEYS", "*:rate-limit:*"]).await;
        for text in found {
            let (_, rest) = text.split_once('{').unwrap();
            let (tag, limit) = rest.split_once("}:").unwrap();
            let key = redis.keyspace("rate-limit").tag(tag.split(':'));
            let key = key.segment(limit);
            assert_eq!(key.as_str(), text);
            keys.push(key);
        }
    }
    assert!(keys.len() >= 5, "{} keys", keys.len());
    keys
}

/// Both modes, under the same fault.
macro_rules! faults {
    ($($name:ident: $fault:expr;)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn strict() {
                run(Mode::Strict).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn leased() {
                run(Mode::leased()).await;
            }

            async fn run(mode: Mode) {
                let fault = $fault;
                fault(mode).await;
            }
        }
    )*};
}

faults! {
    stopped_for_three_seconds: async |mode: Mode| {
        let server = Server::start().await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        server.pause();
        sleep(Duration::from_secs(3)).await;
        server.resume();
        load.end("stopped", failed).await;
    };
    killed_and_back_empty: async |mode: Mode| {
        let mut server = Server::start().await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        server.kill();
        sleep(Duration::from_secs(1)).await;
        server.restart().await;
        load.end("killed", failed).await;
    };
    killed_and_back_from_disk: async |mode: Mode| {
        let mut server = Server::with(["--appendonly", "yes", "--appendfsync", "always"]).await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        server.kill();
        server.restart().await;
        load.end("from disk", failed).await;
    };
    scripts_forgotten: async |mode: Mode| {
        let server = Server::start().await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        for _ in 0..20 {
            let _: String = server.cmd(&["SCRIPT", "FLUSH"]).await;
            sleep(Duration::from_millis(50)).await;
        }
        load.end("scripts", failed).await;
    };
    connections_killed: async |mode: Mode| {
        let server = Server::start().await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        for _ in 0..5 {
            server.kick().await;
            sleep(Duration::from_millis(200)).await;
        }
        load.end("kicked", failed).await;
    };
    evicting: async |mode: Mode| {
        let server = Server::with(["--maxmemory-policy", "allkeys-lru"]).await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        let _: String = server.cmd(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
        sleep(Duration::from_secs(1)).await;
        let _: String = server.cmd(&["CONFIG", "SET", "maxmemory", "0"]).await;
        load.end("evicting", failed).await;
    };
    out_of_memory: async |mode: Mode| {
        let server = Server::with(["--maxmemory-policy", "noeviction"]).await;
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        let _: String = server.cmd(&["CONFIG", "SET", "maxmemory", "1"]).await;
        sleep(Duration::from_secs(1)).await;
        let _: String = server.cmd(&["CONFIG", "SET", "maxmemory", "0"]).await;
        load.end("out of memory", failed).await;
    };
    read_only_until_promoted: async |mode: Mode| {
        let (server, other) = (Server::start().await, Server::start().await);
        let load = Load::on(Config::new(server.url()), mode).await;
        let failed = clock::now();
        server.replica_of(&other).await;
        sleep(Duration::from_secs(1)).await;
        server.promote().await;
        load.end("read-only", failed).await;
    };
    slow_and_cut: async |mode: Mode| {
        let server = Server::start().await;
        let wire = Wire::to(&server).await;
        let load = Load::on(Config::new(wire.url()), mode).await;
        let failed = clock::now();
        wire.delay(Duration::from_secs(1));
        sleep(Duration::from_secs(1)).await;
        wire.delay(Duration::ZERO);
        wire.cut();
        sleep(Duration::from_millis(300)).await;
        wire.stall();
        sleep(Duration::from_secs(1)).await;
        wire.flow();
        load.end("wire", failed).await;
    };
    a_slot_moved: async |mode: Mode| {
        let cluster = Cluster::start().await;
        let load = Load::on(Config::cluster(cluster.urls()), mode).await;
        let failed = clock::now();
        for key in limited(&cluster, &load.redis).await.iter().take(5) {
            let to = (cluster.owner(key).await + 1) % 3;
            cluster.move_slot(key, to).await;
        }
        load.end("a slot moved", failed).await;
    };
}
