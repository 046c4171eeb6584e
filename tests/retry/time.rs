//! Deadlines, and a breaker inside that says how long.

use std::time::Duration;

use buttress::{
    RefusalKind, circuit_breaker,
    classify::GrpcCode,
    retry::{Cause, GiveUp},
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{Empty, Full};
use tokio::time::Instant;

use crate::support::{
    Act, Caller, MS, UNAVAILABLE, Upstream, attempts, http1, never, payload, run,
};

const SECOND: Duration = Duration::from_secs(1);

fn opens_at_once(reset: Duration) -> circuit_breaker::Settings {
    circuit_breaker::Settings::moderate()
        .consecutive_failures(1)
        .reset_timeout(reset)
}

/// The first attempt opens it, and it refuses the second for ten seconds:
/// there are only five.
#[test]
fn an_open_breaker_for_longer_than_there_is_time() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE)]).await;
        let opens = opens_at_once(10 * SECOND);
        let caller = Caller::with(http1(), opens, |retry| {
            retry.settings(attempts(5).total_timeout(5 * SECOND))
        });
        let request = Request::put(upstream.url())
            .body(Full::new(payload(1_000)))
            .unwrap();
        let began = Instant::now();
        let answer = caller.send(request).await.unwrap();
        assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
        assert_eq!(answer.status, 503);
        assert_eq!(answer.headers["retry-after"], "10");
        let body = String::from_utf8(answer.body.unwrap().to_vec()).unwrap();
        assert!(body.contains("circuit_open"), "{body}");
        assert_eq!(upstream.requests(), 1);
        assert_eq!(caller.gave_up(), [GiveUp::Deadline]);
    });
}

/// Exactly as long as it says, and not the second that its header makes of it.
#[test]
fn an_open_breaker_is_waited_for_where_there_is_time() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE)]).await;
        let opens = opens_at_once(700 * MS);
        let caller = Caller::with(http1(), opens, |retry| retry.settings(attempts(3)));
        let data = payload(1_000);
        let request = Request::put(upstream.url())
            .body(Full::new(data.clone()))
            .unwrap();
        let began = Instant::now();
        assert_eq!(caller.send(request).await.unwrap().status, 200);
        assert!(began.elapsed() >= 700 * MS, "{:?}", began.elapsed());
        assert_eq!(upstream.requests(), 2);
        assert_eq!(upstream.last().body, data);
        assert_eq!(
            caller.causes(),
            [
                Cause::Status(StatusCode::SERVICE_UNAVAILABLE),
                Cause::Refused(RefusalKind::CircuitOpen)
            ]
        );
        assert_eq!(caller.breaker.state(), circuit_breaker::State::Closed);
    });
}

/// The same of an upstream that says so.
#[test]
fn retry_after_is_not_undercut() {
    run(async |bed| {
        let later =
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n";
        let upstream = bed.upstream([Act::Answer(later)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let request = |url: String| Request::get(url).body(Empty::<Bytes>::new()).unwrap();
        let began = Instant::now();
        let answer = caller.send(request(upstream.url())).await.unwrap();
        assert_eq!(answer.status, 200);
        assert!(began.elapsed() >= SECOND);

        let much_later =
            "HTTP/1.1 429 Too Many Requests\r\nretry-after: 31\r\ncontent-length: 0\r\n\r\n";
        let upstream = bed.upstream([Act::Answer(much_later)]).await;
        let began = Instant::now();
        let answer = caller.send(request(upstream.url())).await.unwrap();
        assert_eq!(answer.status, 429);
        assert!(began.elapsed() < 5 * SECOND);
        assert_eq!(upstream.requests(), 1);
    });
}

/// Three attempts of 150 ms are through before the total second is, also where
/// the machine is busy.
#[test]
fn attempts_that_hang_are_over_in_time() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 4]).await;
        let settings = attempts(3).attempt_timeout(150 * MS).total_timeout(SECOND);
        let caller = Caller::new(http1(), settings);
        let request = Request::put(upstream.url())
            .body(Full::new(payload(1_000)))
            .unwrap();
        let began = Instant::now();
        let answer = caller.send(request).await.unwrap();
        let took = began.elapsed();
        assert!(took >= 450 * MS && took < 2 * SECOND, "{took:?}");
        assert_eq!(answer.status, 504);
        assert_eq!(upstream.requests(), 3);
        assert_eq!(caller.failures(), 3);
    });
}

/// However many attempts there would be, they end with the total.
#[test]
fn the_total_ends_the_last_attempt() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 10]).await;
        let settings = attempts(10).attempt_timeout(400 * MS).total_timeout(SECOND);
        let caller = Caller::new(http1(), settings);
        let request = Request::get(upstream.url())
            .body(Empty::<Bytes>::new())
            .unwrap();
        let began = Instant::now();
        let answer = caller.send(request).await.unwrap();
        let took = began.elapsed();
        assert!(took >= 950 * MS && took < 3 * SECOND, "{took:?}");
        assert_eq!(answer.status, 504);
        assert!((2..=3).contains(&upstream.requests()));
        assert_eq!(caller.gave_up(), [GiveUp::Deadline]);
    });
}

/// What upstreams were told, in nanoseconds: `grpc-timeout`, of any unit.
fn told(upstream: &Upstream) -> Vec<u64> {
    let told = |value: &str| {
        let (number, unit) = value.split_at(value.len() - 1);
        let unit = match unit {
            "n" => 1,
            "u" => 1_000,
            "m" => 1_000_000,
            "S" => 1_000_000_000,
            other => panic!("{other:?}"),
        };
        number.parse::<u64>().unwrap() * unit
    };
    let seen = upstream.seen();
    seen.iter()
        .map(|seen| told(seen.header("grpc-timeout").expect("it was told")))
        .collect()
}

fn grpc(upstream: &Upstream) -> Request<Full<Bytes>> {
    Request::post(upstream.url())
        .header("content-type", "application/grpc")
        .body(Full::new(payload(100)))
        .unwrap()
}

#[test]
fn what_a_grpc_upstream_is_told_shrinks() {
    run(async |bed| {
        let unavailable = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n\
            grpc-status: 14\r\ncontent-length: 0\r\n\r\n";
        let upstream = bed.upstream([Act::Answer(unavailable); 4]).await;
        let caller = Caller::new(http1(), attempts(4).total_timeout(SECOND));
        let answer = caller.send(grpc(&upstream)).await.unwrap();
        assert_eq!(answer.headers["grpc-status"], "14");
        assert_eq!(caller.causes(), [Cause::Grpc(GrpcCode::Unavailable); 3]);
        let told = told(&upstream);
        assert_eq!(told.len(), 4);
        assert!(told[0] <= 1_000_000_000);
        for pair in told.windows(2) {
            // There is a wait between them.
            assert!(pair[1] + 10_000_000 <= pair[0], "{told:?}");
        }
    });
}

#[test]
fn attempts_that_hang_are_told_the_nearer_deadline() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 4]).await;
        let caller = Caller::with(http1(), never(), |retry| {
            retry
                .settings(attempts(3).attempt_timeout(500 * MS).total_timeout(SECOND))
                .grpc_codes([GrpcCode::Unavailable, GrpcCode::DeadlineExceeded])
        });
        let answer = caller.send(grpc(&upstream)).await.unwrap();
        assert_eq!(answer.headers["grpc-status"], "4");
        let told = told(&upstream);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0] <= 500_000_000, "{told:?}");
        // A second less an attempt and a wait.
        assert!(told[1] <= 490_000_000, "{told:?}");
    });
}
