//! Services of any kind, and functions without a service.

use std::{
    cell::Cell,
    convert::Infallible,
    fmt,
    future::pending,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    Any, BoxError, Inspect, Refusal, RefusalKind, clock,
    deadline::Deadline,
    testing::{ReadinessProbe, Script, Step, advance},
};
use buttress_retry::{
    AbortHandle, Again, Backoff, Cause, Error, Errors, GiveUp, RetryBuilder, RetryLayer,
    RetryPolicy, Settings,
};
use tokio_test::{assert_pending, task};
use tower::{Layer, ServiceExt, limit::ConcurrencyLimit, service_fn};

const SECOND: Duration = Duration::from_secs(1);

/// Three attempts, a second between them, ten seconds.
fn settings() -> Settings {
    Settings::standard()
        .backoff(Backoff::fixed(SECOND))
        .total_timeout(10 * SECOND)
}

fn builder() -> RetryBuilder<Any<u32>, Errors> {
    RetryLayer::any().settings(settings())
}

fn failed() -> io::Error {
    io::Error::other("no")
}

#[tokio::test(start_paused = true)]
async fn every_error_is_worth_another_attempt() {
    let layer = builder().build().unwrap();
    let (inner, script) = Script::<u32, u32, io::Error>::new()
        .then(Step::err(failed()))
        .then(Step::err(failed()))
        .then(Step::ok(7))
        .build();
    assert_eq!(layer.layer(inner).oneshot(1).await.unwrap(), 7);
    assert_eq!(script.requests(), [1, 1, 1]);
    let (inner, script) = Script::<u32, u32, io::Error>::new()
        .otherwise(|_| Step::err(failed()))
        .build();
    let error = layer.layer(inner).oneshot(1).await.unwrap_err();
    assert_eq!(error.to_string(), "no");
    assert_eq!(error.into_inner().unwrap().kind(), io::ErrorKind::Other);
    assert_eq!(script.call_count(), 3);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_heeded_boxed_or_plain() {
    let open =
        |wait: Option<Duration>| Refusal::new(RefusalKind::CircuitOpen).with_retry_after(wait);
    for (refusal, calls) in [
        (open(Some(3 * SECOND)), 2),
        (open(None), 1),
        (open(Some(10 * SECOND)), 1),
    ] {
        let before = clock::now();
        let (inner, script) = Script::<u32, u32, Refusal>::new()
            .then(Step::err(refusal.clone()))
            .otherwise(|n| Step::ok(*n))
            .build();
        let _ = builder().build().unwrap().layer(inner).oneshot(1).await;
        assert_eq!(script.call_count(), calls);
        let boxed = builder().boxed_errors().build().unwrap();
        let (inner, script) = Script::<u32, u32, BoxError>::new()
            .then(Step::err(refusal.into()))
            .otherwise(|n| Step::ok(*n))
            .build();
        let _ = boxed.layer(inner).oneshot(1).await;
        assert_eq!(script.call_count(), calls);
        let waits = if calls == 2 {
            6 * SECOND
        } else {
            Duration::ZERO
        };
        assert_eq!(clock::now() - before, waits);
    }
}

/// As the errors of the layers are: no [`std::error::Error`], so that it can
/// become a boxed one.
#[tokio::test(start_paused = true)]
async fn what_another_layer_fails_with_is_looked_into() {
    #[derive(Debug)]
    enum Layered {
        Refused(Refusal),
        Inner(io::Error),
    }
    impl Inspect for Layered {
        fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
            match self {
                Self::Refused(_) => None,
                Self::Inner(error) => Some(error),
            }
        }
        fn refusal(&self) -> Option<Refusal> {
            match self {
                Self::Refused(refusal) => Some(refusal.clone()),
                Self::Inner(_) => None,
            }
        }
    }
    let open = |wait: Option<Duration>| {
        Layered::Refused(Refusal::new(RefusalKind::CircuitOpen).with_retry_after(wait))
    };
    for (error, waited) in [
        (open(Some(4 * SECOND)), Some(4 * SECOND)),
        (open(None), None),
        (Layered::Inner(failed()), Some(SECOND)),
    ] {
        let (inner, script) = Script::<u32, u32, Layered>::new()
            .then(Step::err(error))
            .otherwise(|n| Step::ok(*n))
            .build();
        let _ = builder().build().unwrap().layer(inner).oneshot(1).await;
        let calls = script.arrivals();
        assert_eq!(calls.get(1).map(|second| *second - calls[0]), waited);
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_judges_results_of_any_type() {
    #[derive(Debug, PartialEq)]
    struct NoError(u32);
    let layer = builder()
        .retry_if(
            |request: &u32, result: Result<&u32, &NoError>| match result {
                Ok(answer) => answer < request,
                Err(error) => error.0 == 503,
            },
        )
        .build()
        .unwrap();
    for (step, calls) in [
        (Step::ok(4), 2),
        (Step::ok(5), 1),
        (Step::err(NoError(503)), 2),
        (Step::err(NoError(400)), 1),
    ] {
        let (inner, script) = Script::new()
            .then(step)
            .otherwise(|n: &u32| Step::ok(*n))
            .build();
        let _: Result<u32, Error<NoError>> = layer.layer(inner).oneshot(5).await;
        assert_eq!(script.call_count(), calls);
    }
    let opaque = builder().opaque_errors().build().unwrap();
    let (inner, script) = Script::<u32, u32, NoError>::new()
        .otherwise(|_| Step::err(NoError(1)))
        .build();
    let error = opaque.layer(inner).oneshot(1).await.unwrap_err();
    assert_eq!(error, Error::Inner(NoError(1)));
    assert_eq!(script.call_count(), 3);
}

/// The rest of the time goes by while another holds the only slot.
#[tokio::test(start_paused = true)]
async fn the_wait_for_readiness_ends_with_the_deadline() {
    let limit = ConcurrencyLimit::new(
        service_fn(async |n: u32| {
            if n == 0 {
                pending::<()>().await;
            }
            Err::<u32, _>(failed())
        }),
        1,
    );
    let service = builder().build().unwrap().layer(limit);
    let mut call = task::spawn(service.clone().oneshot(1));
    assert_pending!(call.poll());
    let mut other = task::spawn(service.oneshot(0));
    assert_pending!(other.poll());
    advance(10 * SECOND - Duration::from_millis(1)).await;
    assert_pending!(call.poll());
    advance(Duration::from_millis(1)).await;
    let std::task::Poll::Ready(Err(error)) = call.poll() else {
        panic!("time is up");
    };
    assert_eq!(error.to_string(), "no time left after 1 attempt");
    let error = BoxError::from(error);
    assert_eq!(
        Refusal::find(&*error).unwrap().kind(),
        RefusalKind::TimedOut
    );
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
        .check(&builder().build().unwrap())
        .await;
}

#[test]
fn where_nothing_fails_nothing_is_allocated() {
    let layer = builder().build().unwrap();
    let mut service = layer.layer(service_fn(|n: u32| {
        std::future::ready(Ok::<_, io::Error>(n))
    }));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        use tower::Service;
        let mut calls = async |count| {
            for n in 0..count {
                let service = service.ready().await.unwrap();
                assert_eq!(service.call(n).await.unwrap(), n);
            }
        };
        calls(1).await;
        let mut future = Box::pin(calls(100));
        let counted = allocation_counter::measure(|| {
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(future.as_mut().poll(&mut cx).is_ready());
        });
        assert_eq!(counted.count_total, 0);
    });
}

fn policy() -> RetryPolicy {
    RetryPolicy::builder().settings(settings()).build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_function_is_run_until_it_succeeds() {
    let asked = Cell::new(0);
    let start = clock::now();
    let answer = policy()
        .run(async || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 {
                Err(failed())
            } else {
                Ok("yes")
            }
        })
        .await;
    assert_eq!(answer.unwrap(), "yes");
    assert_eq!(clock::now() - start, 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn the_last_error_and_the_count_are_kept() {
    let asked = Cell::new(0);
    let run = async |policy: RetryPolicy| {
        policy
            .run(async || {
                asked.set(asked.get() + 1);
                Err::<(), _>(io::Error::other(format!("no {}", asked.get())))
            })
            .await
            .unwrap_err()
    };
    let error = run(policy()).await;
    assert_eq!(error.attempts(), 3);
    assert_eq!(error.reason(), Some(GiveUp::Attempts));
    assert_eq!(error.last().unwrap().to_string(), "no 3");
    assert_eq!(
        error.to_string(),
        "failed after 3 attempts: no attempt left"
    );
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "no 3");
    assert_eq!(error.into_inner().unwrap().to_string(), "no 3");

    let short = policy();
    short
        .set_settings(settings().total_timeout(SECOND))
        .unwrap();
    let error = run(short).await;
    assert_eq!(
        (error.attempts(), error.reason()),
        (1, Some(GiveUp::Deadline))
    );
    assert_eq!(error.to_string(), "failed after 1 attempt: no time left");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_worth_it_ends_at_once() {
    let error = policy()
        .runner()
        .retry_if(|error: &u32| *error != 404)
        .run(async || Err::<(), _>(404))
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), error.reason()), (1, None));
    assert_eq!(error.into_inner(), Some(404));
}

/// 1.5 s an attempt: cut, waited after, and cut by the whole in the end.
#[tokio::test(start_paused = true)]
async fn attempts_of_a_function_are_cut() {
    let causes = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&causes);
    let policy = RetryPolicy::builder()
        .settings(
            settings()
                .attempt_timeout(Duration::from_millis(1500))
                .total_timeout(6 * SECOND)
                .max_attempts(10),
        )
        .on_retry(move |_, _, cause| {
            assert_eq!(cause, Cause::Refused(RefusalKind::TimedOut));
            told.fetch_add(1, Relaxed);
        })
        .build()
        .unwrap();
    let start = clock::now();
    let error = policy
        .run(pending::<Result<(), io::Error>>)
        .await
        .unwrap_err();
    // 0–1.5, 2.5–4, 5–6.
    assert_eq!(clock::now() - start, 6 * SECOND);
    assert_eq!(
        (error.attempts(), error.reason()),
        (3, Some(GiveUp::Deadline))
    );
    assert!(error.last().is_none());
    assert_eq!(causes.load(Relaxed), 2);
}

/// tokio's timers go by milliseconds: the wait ended at the deadline, and an
/// attempt was begun that had no time.
#[tokio::test(start_paused = true)]
async fn no_attempt_begins_at_the_deadline() {
    let policy = policy();
    let nearly = Backoff::fixed(Duration::from_micros(999_500));
    policy
        .set_settings(settings().backoff(nearly).total_timeout(SECOND))
        .unwrap();
    let asked = Cell::new(0);
    let error = policy
        .run(async || {
            asked.set(asked.get() + 1);
            Err::<(), _>(failed())
        })
        .await
        .unwrap_err();
    assert_eq!((asked.get(), error.reason()), (1, Some(GiveUp::Deadline)));
}

/// There is nobody whom it could be told.
#[test]
fn an_attempt_of_any_kind_has_no_timeout() {
    let timed = settings().attempt_timeout(SECOND);
    let error = RetryLayer::<Any<u32>, _>::any().settings(timed).build();
    assert!(error.unwrap_err().to_string().contains("over HTTP"));
}

#[tokio::test(start_paused = true)]
async fn who_says_so_stops_it() {
    let abort = AbortHandle::new();
    let policy = policy();
    let asked = Cell::new(0);
    let runner = || policy.runner().stop_on(abort.aborted());
    let run = || {
        runner().run(async || {
            asked.set(asked.get() + 1);
            Err::<(), _>(failed())
        })
    };
    let mut running = task::spawn(run());
    assert_pending!(running.poll());
    advance(SECOND).await;
    assert_pending!(running.poll());
    abort.clone().abort();
    assert!(running.is_woken());
    let std::task::Poll::Ready(Err(error)) = running.poll() else {
        panic!("it was aborted");
    };
    assert_eq!(error.reason(), Some(GiveUp::Aborted));
    assert_eq!(error.last().unwrap().to_string(), "no");
    assert_eq!((error.attempts(), asked.get()), (2, 2));
    // And what comes later does not begin.
    let error = run().await.unwrap_err();
    assert_eq!(error.reason(), Some(GiveUp::Aborted));
    assert_eq!((error.attempts(), asked.get()), (0, 2));
    // Nobody can any more: it goes its way.
    let gone = AbortHandle::new().aborted();
    let error = policy
        .runner()
        .stop_on(gone)
        .run(async || Err::<(), _>(failed()));
    assert_eq!(error.await.unwrap_err().reason(), Some(GiveUp::Attempts));
}

#[test]
fn a_run_can_be_spawned() {
    fn send<T: Send>(_: T) {}
    let policy = policy();
    send(policy.run(|| async { Err::<(), _>(failed()) }));
    send(
        policy
            .runner()
            .stop_on(AbortHandle::new().aborted())
            .run(|| async { Ok::<_, io::Error>(()) }),
    );
    fn shared<T: Clone + Send + Sync + fmt::Debug + 'static>(_: T) {}
    shared(policy);
    shared(builder().build().unwrap());
    shared(AbortHandle::new());
}

/// Refused for so long, as a peer's own error may say.
#[derive(Clone, Copy, Debug)]
struct Busy(Option<Duration>);

#[tokio::test(start_paused = true)]
async fn a_closure_says_when_at_the_soonest() {
    for (told, waited) in [(Some(3 * SECOND), 3 * SECOND), (None, SECOND)] {
        let again = |Busy(wait): &Busy| wait.map_or(Again::Yes, Again::After);
        let layer = builder()
            .retry_if(move |_, result: Result<&u32, &Busy>| result.err().map_or(Again::No, again))
            .build()
            .unwrap();
        let (inner, script) = Script::<u32, u32, Busy>::new()
            .then(Step::err(Busy(told)))
            .otherwise(|n| Step::ok(*n))
            .build();
        let before = clock::now();
        assert_eq!(layer.layer(inner).oneshot(7).await.unwrap(), 7);
        assert_eq!(clock::now() - before, waited);
        script.assert_finished();

        let policy = RetryPolicy::builder().settings(settings()).build().unwrap();
        let before = clock::now();
        let mut answers = vec![Ok(7), Err(Busy(told))].into_iter().rev();
        let answer = policy
            .runner()
            .retry_if(again)
            .run(|| std::future::ready(answers.next().unwrap()))
            .await;
        assert_eq!(answer.unwrap(), 7);
        assert_eq!(clock::now() - before, waited);
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_can_ask_what_would_be_done_without_it() {
    let refusal = |kind, wait: Option<Duration>| Refusal::new(kind).with_retry_after(wait);
    for (error, again) in [
        (
            refusal(RefusalKind::CircuitOpen, Some(SECOND)),
            Again::After(SECOND),
        ),
        (refusal(RefusalKind::CircuitOpen, None), Again::No),
        (refusal(RefusalKind::NeverFits, None), Again::No),
        (refusal(RefusalKind::Overloaded, None), Again::Yes),
    ] {
        assert_eq!(Again::of(&error), again);
    }
    assert_eq!(Again::of(&failed()), Again::Yes);
}

#[test]
fn a_name_is_fit_to_be_a_label() {
    for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(129)] {
        let error = builder().name(name).build().unwrap_err().to_string();
        assert!(error.contains("name"), "{name:?}: {error}");
        let hedge = buttress_retry::HedgeLayer::builder()
            .after(SECOND)
            .name(name);
        let error = hedge.build().unwrap_err().to_string();
        assert!(error.contains("name"), "{name:?}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_run_keeps_the_last_cause_and_the_last_error() {
    let settings = settings().max_attempts(2).attempt_timeout(SECOND);
    let policy = RetryPolicy::builder().settings(settings).build().unwrap();
    let mut attempt = 0;
    let error = policy
        .run(|| {
            attempt += 1;
            let hangs = attempt == 2;
            async move {
                if hangs {
                    pending::<()>().await;
                }
                Err::<(), _>(io::Error::other("boom"))
            }
        })
        .await
        .unwrap_err();
    assert_eq!(error.cause(), Some(Cause::Refused(RefusalKind::TimedOut)));
    assert_eq!(error.last().unwrap().to_string(), "boom");
    let text = "failed after 2 attempts: no attempt left, the last took too long";
    assert_eq!(error.to_string(), text);

    // Who says stop during a wait is told what the wait was for.
    let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = Arc::clone(&heard);
    let policy = RetryPolicy::builder()
        .on_give_up(move |_, cause, _| told.lock().unwrap().push(cause))
        .build()
        .unwrap();
    let abort = AbortHandle::new();
    let runs = policy.runner().stop_on(abort.aborted());
    let mut run =
        task::spawn(runs.run(async || Err::<(), _>(Refusal::new(RefusalKind::Overloaded))));
    assert_pending!(run.poll());
    abort.abort();
    assert!(run.await.is_err());
    let overloaded = Cause::Refused(RefusalKind::Overloaded);
    assert_eq!(*heard.lock().unwrap(), [overloaded]);
}

#[tokio::test(start_paused = true)]
async fn a_run_ends_with_the_callers_deadline() {
    let policy = RetryPolicy::builder().settings(settings()).build().unwrap();
    let before = clock::now();
    let deadline = Deadline::at(before + SECOND * 5 / 2);
    let mut calls = 0;
    let error = policy
        .runner()
        .deadline(deadline)
        .run(|| {
            calls += 1;
            pending::<Result<(), io::Error>>()
        })
        .await
        .unwrap_err();
    assert_eq!(clock::now() - before, SECOND * 5 / 2);
    assert_eq!((error.reason(), calls), (Some(GiveUp::Deadline), 1));
}

#[test]
fn what_cannot_be_built_cannot_be_set() {
    let layer = builder().build().unwrap();
    let limited = || settings().attempt_timeout(SECOND);
    let refused = layer.policy().set_settings(limited()).unwrap_err();
    assert!(refused.to_string().contains("over HTTP"), "{refused}");
    assert!(builder().settings(limited()).build().is_err());
    let policy = RetryPolicy::builder().build().unwrap();
    policy.set_settings(limited()).unwrap();
}
