//! One clock for all: what a naive model says, the store in memory and Redis.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use buttress_core::{clock::Instant, key::Key, keyed::WhenFull};
use buttress_redis::{
    Cmd, Config, Redis,
    testing::{Server, Wire},
};
use num_rational::Ratio;

use super::{ask::FleetAsk, ground::Ground, script::Scripts, strict::Strict};
use crate::{
    Gcra, Quota,
    store::{self, Ask, Decision, Detail, Standing, Table, Verdict},
};

const START: u64 = 1_790_000_000_123_456;

/// Quotas with whole intervals, thirds of one, and parts of a nanosecond.
fn quotas() -> [Gcra; 4] {
    [
        Quota::per_second(1).burst(3),
        Quota::new(3, Duration::from_secs(1)).burst(5),
        Quota::new(999_983, Duration::from_secs(7)).burst(4),
        Quota::new(7, Duration::from_micros(11)).burst(1000),
    ]
    .map(|quota| quota.check().unwrap())
}

fn tables() -> Arc<[Table]> {
    (quotas().into_iter().enumerate())
        .map(|(index, gcra)| {
            let max_keys = NonZeroUsize::new(1000).unwrap();
            Table::new(format!("l{index}").into(), gcra, max_keys, WhenFull::Evict)
        })
        .collect()
}

struct Harness {
    _server: Server,
    ground: Arc<Ground>,
    strict: Arc<Strict>,
    memory: Arc<[Table]>,
    model: HashMap<(usize, Key), Ratio<i128>>,
    now: u64,
}

impl Harness {
    async fn new() -> Self {
        let server = Server::start().await;
        let ground = Arc::new(Ground::new(server.redis(), tables(), "test", false));
        let strict = Strict::with(Arc::clone(&ground), Scripts::by_caller(START));
        Self {
            _server: server,
            strict: Arc::new(strict),
            ground,
            memory: tables(),
            model: HashMap::new(),
            now: START,
        }
    }

    fn advance(&mut self, micros: u64) {
        self.now += micros;
        let clock = self.strict.scripts().clock.as_ref().expect("it is ours");
        clock.store(self.now, Ordering::SeqCst);
    }

    fn ask(&self, limit: usize, key: &str, cost: u32, gcra: Gcra) -> FleetAsk {
        let key = Key::from(key);
        FleetAsk {
            limit,
            id: self.ground.tables[limit].id(&key),
            key,
            cost,
            gcra,
        }
    }

    /// The same of the store in memory, whose keys have ids of their own.
    fn local(&self, ask: &FleetAsk) -> Ask {
        Ask {
            id: self.memory[ask.limit].id(&ask.key),
            ..ask.local()
        }
    }

    fn instant(&self) -> Instant {
        // Memory's clock has 36 years.
        Instant::from_nanos((self.now - START) * 1000 + (1 << 50))
    }

    /// Whether all pass, by the definition.
    fn model(&mut self, asks: &[FleetAsk]) -> bool {
        let now = Ratio::from_integer(i128::from(self.now) * 1000);
        let mut arrivals = Vec::new();
        for ask in asks {
            let nanos = i128::try_from(ask.gcra.period().as_nanos()).unwrap();
            let interval = Ratio::new(nanos, i128::from(ask.gcra.limit()));
            let tat = self.model.get(&(ask.limit, ask.key.clone()));
            let tolerance = interval * i128::from(ask.gcra.burst());
            let start = tat.copied().unwrap_or(now).max(now);
            let arrival = start + interval * i128::from(ask.cost);
            if arrival > now + tolerance {
                return false;
            }
            arrivals.push(arrival);
        }
        for (ask, arrival) in asks.iter().zip(arrivals) {
            self.model.insert((ask.limit, ask.key.clone()), arrival);
        }
        true
    }

    async fn decide(&mut self, asks: &[FleetAsk]) -> Decision {
        // Never asked of Redis: see `foresee`.
        let never = asks.iter().any(|ask| ask.cost > ask.gcra.burst());
        let local: Vec<_> = asks.iter().map(|ask| Some(self.local(ask))).collect();
        let memory = store::decide_all(&self.memory, &local, self.instant(), Detail::All);
        let passes = self.model(asks);
        let decision = if never {
            self.strict
                .decide_now(asks, Detail::All)
                .expect("it never fits")
        } else {
            self.strict.decide(asks, Detail::All).await.unwrap()
        };
        assert_eq!(decision.verdict == Verdict::Pass, passes, "{asks:?}");
        assert_eq!(decision.verdict, memory.verdict, "{asks:?}");
        if !never {
            assert_eq!(decision.tightest, memory.tightest, "{asks:?}");
            assert_eq!(decision.all, memory.all, "{asks:?}");
        }
        decision
    }

    async fn stored(&self, ask: &FleetAsk) -> Option<String> {
        let mut cmd = Cmd::new();
        cmd.arg("GET").arg(self.ground.key(ask).as_str());
        self.ground.redis.run("get", &cmd).await.unwrap()
    }

    async fn run(&self, words: &[&str]) {
        let mut cmd = Cmd::new();
        for word in words {
            cmd.arg(word);
        }
        self.ground.redis.run::<()>("test", &cmd).await.unwrap();
    }
}

/// Xorshift: the same run each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

#[tokio::test]
async fn model_memory_and_redis_say_the_same() {
    let mut it = Harness::new().await;
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let (mut passed, mut refused) = (0, 0);
    for _ in 0..4000 {
        match dice.below(10) {
            0 => it.advance(dice.below(4)),
            1 => it.advance(dice.below(400_000)),
            2 => it.advance(dice.below(3000)),
            _ => {}
        }
        let key = ["a", "b", "2001:db8::1"][dice.below(3) as usize];
        let first = dice.below(4) as usize;
        let count = [1, 1, 2, 4][dice.below(4) as usize];
        let asks: Vec<_> = (0..count.min(4 - first))
            .map(|more| {
                let gcra = quotas()[first + more];
                let most = u64::from(gcra.burst()) + 2;
                let cost = if dice.below(3) == 0 {
                    dice.below(most)
                } else {
                    1
                };
                it.ask(first + more, key, u32::try_from(cost).unwrap(), gcra)
            })
            .collect();
        if dice.below(12) == 0 {
            // Given back, as far as it has not come back by itself.
            let ask = &asks[0];
            let before = it.instant();
            it.memory[ask.limit].refund(&it.local(ask), before);
            let now = Ratio::from_integer(i128::from(it.now) * 1000);
            let nanos = i128::try_from(ask.gcra.period().as_nanos()).unwrap();
            let back = Ratio::new(nanos * i128::from(ask.cost), i128::from(ask.gcra.limit()));
            if let Some(tat) = it.model.get_mut(&(ask.limit, ask.key.clone())) {
                *tat = (*tat - back).max(now);
            }
            let stands = it.strict.refund(std::slice::from_ref(ask)).await.unwrap();
            let (tat, now) = stands[0];
            let standing = Standing::of(ask.limit, &ask.gcra, tat, now, Detail::All);
            assert_eq!(standing, it.memory[ask.limit].peek(&it.local(ask), before));
        } else if dice.below(60) == 0 {
            let ask = &asks[0];
            it.strict.reset(ask).await.unwrap();
            it.memory[ask.limit].reset(it.memory[ask.limit].id(&ask.key), it.instant());
            it.model.remove(&(ask.limit, ask.key.clone()));
        } else {
            match it.decide(&asks).await.verdict {
                Verdict::Pass => passed += 1,
                _ => refused += 1,
            }
        }
    }
    // It was about something.
    assert!(
        passed > 500 && refused > 500,
        "{passed} passed, {refused} refused"
    );
}

#[tokio::test]
async fn a_quota_that_changes_leaves_what_is_owed() {
    let mut it = Harness::new().await;
    let mut dice = Dice(42);
    for _ in 0..600 {
        it.advance(dice.below(300_000));
        // Of another denominator each time, under the same key: here the model
        // knows more than 60 bits of parts do.
        let gcra = quotas()[dice.below(3) as usize];
        let ask = it.ask(0, "a", 1, gcra);
        let local = Some(it.local(&ask));
        let memory = store::decide_all(&it.memory, &[local], it.instant(), Detail::All);
        let redis = it.strict.decide(&[ask], Detail::All).await.unwrap();
        assert_eq!(redis.verdict, memory.verdict);
        assert_eq!(redis.all, memory.all);
    }
}

#[tokio::test]
async fn what_is_stored_is_the_microsecond_at_which_it_is_whole() {
    let mut it = Harness::new().await;
    let whole = it.ask(0, "a", 1, quotas()[0]);
    it.decide(std::slice::from_ref(&whole)).await;
    assert_eq!(it.stored(&whole).await.unwrap(), "1790000001123456");
    let third = it.ask(1, "a", 1, quotas()[1]);
    it.decide(std::slice::from_ref(&third)).await;
    assert_eq!(it.stored(&third).await.unwrap(), "1790000000456789:333:1");
    // Below a second, all digits of the microsecond are there.
    it.advance(1_000_000 - 123_456 + 7);
    it.decide(std::slice::from_ref(&whole)).await;
    assert_eq!(it.stored(&whole).await.unwrap(), "1790000002123456");
    it.advance(5_000_000);
    it.decide(std::slice::from_ref(&whole)).await;
    assert_eq!(it.stored(&whole).await.unwrap(), "1790000007000007");
}

#[tokio::test]
async fn what_is_corrupt_or_foreign_is_healed() {
    let it = Harness::new().await;
    let far = (START + 9_000_000_000_000).to_string();
    let fresh = [
        "",
        "x",
        "-1",
        "1e3",
        "nan",
        "-nan",
        "1:2",
        "1:2:3",
        ":::",
        "0x10",
        " ",
        "0",
        "99999999999999999999:1",
        "\u{0}\u{1}",
    ];
    let full = [
        &far[..],
        "1e300",
        "inf",
        "9007199254740993",
        "99999999999999999999",
        "1890000000000000:9999999999:99999999999999999999999",
        "1890000000000000.5",
    ];
    for (limit, gcra) in quotas().into_iter().enumerate() {
        let ask = it.ask(limit, "a", 1, gcra);
        let other = it.ask(limit, "b", 1, gcra);
        let key = it.ground.key(&ask).as_str().to_owned();
        for several in [false, true] {
            let asks = if several {
                vec![ask.clone(), other.clone()]
            } else {
                vec![ask.clone()]
            };
            // Fresh each time.
            let reset = || async {
                it.strict.reset(&other).await.unwrap();
                it.run(&["DEL", &key]).await;
            };
            for value in fresh {
                reset().await;
                it.run(&["SET", &key, value]).await;
                let decision = it.strict.decide(&asks, Detail::All).await.unwrap();
                assert_eq!(decision.verdict, Verdict::Pass, "{value:?}");
                assert_eq!(decision.all[0].remaining, gcra.burst() - 1, "{value:?}");
            }
            for value in full {
                reset().await;
                it.run(&["SET", &key, value]).await;
                let decision = it.strict.decide(&asks, Detail::All).await.unwrap();
                // Full, but no fuller than can be: one comes back after τ.
                let Verdict::Wait { wait, .. } = decision.verdict else {
                    panic!("{value:?} passes");
                };
                let interval = gcra.period().as_nanos().div_ceil(u128::from(gcra.limit()));
                assert_eq!(u128::from(wait), interval, "{value:?}");
                // Put right in Redis, too.
                let stored = it.stored(&ask).await.unwrap();
                let micros: u64 = stored.split(':').next().unwrap().parse().unwrap();
                let most = u64::try_from(gcra.time_to_full().as_micros()).unwrap();
                assert!(micros - START <= most, "{value:?} became {stored}");
            }
            for make in [
                &["RPUSH", &key, "x"][..],
                &["SADD", &key, "x"],
                &["HSET", &key, "f", "x"],
                &["ZADD", &key, "1", "x"],
                &["XADD", &key, "*", "f", "x"],
                &["PFADD", &key, "x"],
                &["SETBIT", &key, "7", "1"],
            ] {
                reset().await;
                it.run(make).await;
                let decision = it.strict.decide(&asks, Detail::All).await.unwrap();
                assert_eq!(decision.verdict, Verdict::Pass, "{make:?}");
                assert!(
                    it.stored(&ask).await.unwrap().starts_with("179"),
                    "{make:?}"
                );
            }
        }
    }
}

/// Checks of several kinds at once: what shares a trip is decided as if it came
/// one after the other.
#[tokio::test]
async fn checks_that_share_a_trip_are_charged_one_by_one() {
    let it = Harness::new().await;
    let gcra = quotas()[3];
    let mut tasks = tokio::task::JoinSet::new();
    // Alike on one key, alike on several, of several costs, several limits at
    // once, and one that knows another quota.
    for number in 0..1500_u32 {
        let asks = match number % 5 {
            0 | 1 => vec![it.ask(3, "a", 1, gcra)],
            2 => vec![it.ask(3, ["b", "c"][number as usize % 2], 1, gcra)],
            3 => vec![it.ask(3, "a", 1 + number % 7, gcra)],
            _ => vec![
                it.ask(3, "a", 1, gcra),
                it.ask(0, "a", 1, quotas()[usize::from(number % 100 == 99)]),
            ],
        };
        let strict = Arc::clone(&it.strict);
        tasks.spawn(async move {
            let decision = strict.decide(&asks, Detail::None).await.unwrap();
            (asks, decision.verdict)
        });
    }
    let mut charged: HashMap<(usize, Key), u32> = HashMap::new();
    let mut passed = 0;
    while let Some(done) = tasks.join_next().await {
        let (asks, verdict) = done.unwrap();
        if verdict == Verdict::Pass {
            passed += 1;
            for ask in asks {
                *charged.entry((ask.limit, ask.key)).or_default() += ask.cost;
            }
        }
    }
    for key in ["a", "b", "c"] {
        let ask = it.ask(3, key, 0, gcra);
        let charged = charged[&(3, Key::from(key))];
        let (tat, now) = it.strict.peek(&ask).await.unwrap();
        assert_eq!(gcra.remaining(tat, now), gcra.burst() - charged, "{key}");
    }
    assert!(charged[&(3, Key::from("a"))] > 990, "the burst is used up");
    assert!((5..1500).contains(&passed));
    let calls = commands(&it.ground.redis).await;
    assert!(calls < 200, "{calls} calls for 1500 checks");
}

/// How often scripts were called.
async fn commands(redis: &buttress_redis::Redis) -> u64 {
    let mut cmd = Cmd::new();
    cmd.arg("INFO").arg("commandstats");
    let text: String = redis.run("info", &cmd).await.unwrap();
    (text.lines())
        .filter_map(|line| line.strip_prefix("cmdstat_eval"))
        .map(|line| {
            let calls = line.split("calls=").nth(1).unwrap();
            calls.split(',').next().unwrap().parse::<u64>().unwrap()
        })
        .sum()
}

/// A check whose future is dropped while it waits is not sent; one that is
/// under way strands nobody.
#[tokio::test]
async fn dropped_checks_strand_nobody_and_charge_once_at_most() {
    let it = Harness::new().await;
    let gcra = quotas()[3];
    let ask = [it.ask(3, "a", 1, gcra)];
    // The connection is there, the script is known.
    it.strict.decide(&ask, Detail::None).await.unwrap();
    let mut checks: Vec<_> = (0..100)
        .map(|_| Box::pin(it.strict.decide(&ask, Detail::None)))
        .collect();
    for check in &mut checks {
        assert!(poll::once(check.as_mut()).is_none());
    }
    // Two are under way, 98 wait: the two and 48 of the others go away.
    checks.truncate(50);
    checks.drain(..2);
    for check in checks {
        check.await.unwrap();
    }
    let (tat, now) = it.strict.peek(&ask[0]).await.unwrap();
    let charged = gcra.burst() - gcra.remaining(tat, now);
    assert!((49..=51).contains(&charged), "{charged} charged");
}

/// A replica whose clock is another one was promoted.
#[tokio::test]
async fn a_server_clock_that_steps_locks_nobody_out() {
    let mut it = Harness::new().await;
    let gcra = quotas()[0];
    let ask = [it.ask(0, "a", 1, gcra)];
    for _ in 0..3 {
        it.strict.decide(&ask, Detail::None).await.unwrap();
    }
    // An hour back: no more is owed than a whole burst.
    it.now -= 3_600_000_000;
    it.advance(0);
    let decision = it.strict.decide(&ask, Detail::All).await.unwrap();
    let wait = 1_000_000_000;
    assert_eq!(decision.verdict, Verdict::Wait { limit: 0, wait });
    assert_eq!(decision.all[0].until_full, 3_000_000_000);
    it.advance(1_000_000);
    let decision = it.strict.decide(&ask, Detail::All).await.unwrap();
    assert_eq!(decision.verdict, Verdict::Pass);
    // An hour on: it is whole.
    it.advance(3_600_000_000);
    let decision = it.strict.decide(&ask, Detail::All).await.unwrap();
    assert_eq!(decision.all[0].remaining, 2);
}

/// 1/s, 3 at once: what is owed since so many microseconds (or ahead of now).
#[tokio::test]
async fn what_is_owed_is_charged_from_when_it_was() {
    let it = Harness::new().await;
    let gcra = quotas()[0];
    for (number, (before, first, cost, left)) in [
        // Eleven in the ten seconds past: one is owed still.
        (0, -10_000_000, 11, 2),
        // Five in ten seconds: time has paid.
        (0, -10_000_000, 5, 3),
        // On top of what the server knows.
        (2, -1_000_000, 1, 0),
        // The server has forgotten what this process knew: two were owed.
        (0, 2_000_000, 1, 0),
        // Both know it.
        (1, 1_000_000, 1, 1),
        // No more than a whole burst.
        (2, 0, 100, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let ask = [it.ask(0, &number.to_string(), 1, gcra)];
        for _ in 0..before {
            it.strict.decide(&ask, Detail::None).await.unwrap();
        }
        let key = it.ground.key(&ask[0]);
        let owing = [super::script::Owing {
            key: &key,
            first,
            gcra,
            cost,
        }];
        let call = it.strict.scripts().owed(&owing);
        let answer = it
            .ground
            .redis
            .call::<buttress_redis::Value>("owed", &call)
            .await;
        let (tat, now) = it.strict.peek(&ask[0]).await.unwrap();
        assert_eq!(gcra.remaining(tat, now), left, "case {number}");
        let told = super::script::answer(&answer.unwrap(), [gcra].into_iter(), 0).unwrap();
        assert_eq!(gcra.remaining(told[0], 0), left, "case {number}");
        assert!(gcra.until_full(tat, now) <= 3_000_000_000);
    }
}

/// Several threads, and checks that are dropped at any point of their way; so
/// many that a call goes before those of the last are told.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn in_a_crowd_each_check_is_charged_once_or_dropped() {
    let it = Harness::new().await;
    let gcra = Quota::per_second(1000).burst(1_000_000).check().unwrap();
    let ask = it.ask(3, "a", 1, gcra);
    it.strict
        .decide(std::slice::from_ref(&ask), Detail::None)
        .await
        .unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..400_u64 {
        let (strict, ask) = (Arc::clone(&it.strict), [ask.clone()]);
        tasks.spawn(async move {
            let mut dice = Dice(task + 1);
            let (mut passed, mut dropped) = (0, 0);
            for _ in 0..20 {
                let mut check = Box::pin(strict.decide(&ask, Detail::None));
                let mut patience = match dice.below(3) {
                    0 => 1 + dice.below(4),
                    _ => u64::MAX,
                };
                let done = std::future::poll_fn(|cx| {
                    if let std::task::Poll::Ready(done) = check.as_mut().poll(cx) {
                        return std::task::Poll::Ready(Some(done));
                    }
                    patience -= 1;
                    if patience <= 4 {
                        cx.waker().wake_by_ref();
                    }
                    if patience == 0 {
                        return std::task::Poll::Ready(None);
                    }
                    std::task::Poll::Pending
                });
                match done.await {
                    Some(decision) => {
                        assert_eq!(decision.unwrap().verdict, Verdict::Pass);
                        passed += 1;
                    }
                    None => dropped += 1,
                }
            }
            (passed, dropped)
        });
    }
    let all = async {
        let mut sum = (1, 0);
        while let Some(one) = tasks.join_next().await {
            let (passed, dropped) = one.unwrap();
            sum = (sum.0 + passed, sum.1 + dropped);
        }
        sum
    };
    let (passed, dropped) = tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .unwrap();
    assert!(passed > 1000 && dropped > 100, "{passed} and {dropped}");
    // What was dropped may be under way yet.
    for _ in 0..100 {
        it.strict
            .decide(std::slice::from_ref(&ask), Detail::None)
            .await
            .unwrap();
    }
    let (tat, now) = it.strict.peek(&ask).await.unwrap();
    let charged = gcra.burst() - gcra.remaining(tat, now) - 100;
    assert!(
        (passed..=passed + dropped).contains(&charged),
        "{charged} of {passed} to {dropped} more"
    );
}

mod poll {
    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll, Waker},
    };

    pub(super) fn once<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }
}

/// A runtime that ends with a call under way: the others' checks go on, or are
/// told in time.
#[test]
fn a_runtime_that_ends_strands_nobody() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let main = runtime();
    let it = main.block_on(Harness::new());
    let gcra = quotas()[3];
    let ask = [it.ask(3, "a", 1, gcra)];
    main.block_on(it.strict.decide(&ask, Detail::None)).unwrap();
    for _ in 0..20 {
        let other = runtime();
        for _ in 0..40 {
            let (strict, ask) = (Arc::clone(&it.strict), ask.clone());
            other.spawn(async move { strict.decide(&ask, Detail::None).await });
        }
        let mine: Vec<_> = (0..40)
            .map(|_| {
                let (strict, ask) = (Arc::clone(&it.strict), ask.clone());
                main.spawn(async move { strict.decide(&ask, Detail::None).await })
            })
            .collect();
        other.shutdown_background();
        main.block_on(async {
            for check in mine {
                // Answered, or told that it cannot be: never left alone.
                let _ = tokio::time::timeout(Duration::from_secs(20), check)
                    .await
                    .expect("it is told")
                    .unwrap();
            }
        });
    }
    main.block_on(async {
        // The last of them may still be going, and take one with it.
        for _ in 0..100 {
            if it.strict.decide(&ask, Detail::None).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody is answered any more");
    });
}

/// Asked for by another runtime's task, which ends before the answer is here.
#[test]
fn what_was_sent_by_a_runtime_that_ends_is_not_owed() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let main = runtime();
    let (server, wire) = main.block_on(async {
        let server = Server::start().await;
        let wire = Wire::to(&server).await;
        (server, wire)
    });
    let config = Config::new(wire.url()).timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    main.block_on(redis.connect()).unwrap();
    let ground = Arc::new(Ground::new(redis, tables(), "test", false));
    let strict = Arc::new(Strict::with(Arc::clone(&ground), Scripts::by_caller(START)));
    let gcra = quotas()[3];
    let decide = |key: &str| {
        let key = Key::from(key);
        let id = ground.tables[3].id(&key);
        let ask = [FleetAsk {
            limit: 3,
            id,
            key,
            cost: 1,
            gcra,
        }];
        let strict = Arc::clone(&strict);
        async move { strict.decide(&ask, Detail::None).await }
    };
    // The script is known from here on.
    main.block_on(decide("b")).unwrap();
    wire.delay(Duration::from_millis(300));
    let other = runtime();
    let theirs = [other.spawn(decide("b")), other.spawn(decide("b"))];
    let wait =
        |millis| main.block_on(async { tokio::time::sleep(Duration::from_millis(millis)).await });
    wait(50);
    let mine: Vec<_> = (0..10).map(|_| main.spawn(decide("a"))).collect();
    // Their answers are here, and who asks next for these has asked.
    for one in theirs {
        main.block_on(one).unwrap().unwrap();
    }
    wait(100);
    other.shutdown_background();
    let (mut passed, mut unheard) = (0, 0);
    for one in mine {
        match main.block_on(one).unwrap() {
            Ok(decision) => passed += u32::from(decision.verdict == Verdict::Pass),
            Err(unanswered) => unheard += u32::from(!unanswered.is_owed()),
        }
    }
    let ask = FleetAsk {
        limit: 3,
        key: Key::from("a"),
        id: ground.tables[3].id(&Key::from("a")),
        cost: 1,
        gcra,
    };
    let (tat, now) = main.block_on(strict.peek(&ask)).unwrap();
    let charged = gcra.burst() - gcra.remaining(tat, now);
    assert!(
        (passed..=passed + unheard).contains(&charged),
        "{charged} charged, {passed} passed, {unheard} unheard"
    );
    drop(server);
}
