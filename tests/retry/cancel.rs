//! A client that goes away stops the retries.

use buttress::retry::{Backoff, Cause, Settings};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{Empty, Full};
use tokio::time::sleep;

use crate::support::{Act, Caller, MS, UNAVAILABLE, attempts, http1, payload, run, until};

/// In the middle of an attempt: the connection is closed, and there is no
/// further one.
#[test]
fn in_an_attempt() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE), Act::Hang]).await;
        let caller = Caller::new(http1(), attempts(5));
        let sent = caller.clone();
        let request = Request::put(upstream.url())
            .body(Full::new(payload(10_000)))
            .unwrap();
        let send = tokio::spawn(async move { sent.send(request).await.map(drop) });
        until("the second attempt hangs", || {
            upstream.requests() == 2 && upstream.request(1).whole
        })
        .await;
        assert_eq!(bed.sockets(), 1);
        send.abort();
        assert!(send.await.unwrap_err().is_cancelled());
        until("the connection is closed", || bed.sockets() == 0).await;
        sleep(50 * MS).await;
        assert_eq!(upstream.requests(), 2);
        assert_eq!(upstream.connections(), 1);
        // Given up on: no verdict of the second.
        let status = caller.breaker.status();
        assert_eq!((status.failures, status.probes_in_flight), (1, 0));
    });
}

/// In the middle of a wait: there is no connection in use then, and none
/// after that.
#[test]
fn in_a_wait() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE)]).await;
        let settings = Settings::standard().backoff(Backoff::fixed(300 * MS));
        let caller = Caller::new(http1(), settings);
        let sent = caller.clone();
        let request = Request::get(upstream.url())
            .body(Empty::<Bytes>::new())
            .unwrap();
        let send = tokio::spawn(async move { sent.send(request).await.map(drop) });
        until("it waits", || caller.causes().len() == 1).await;
        send.abort();
        assert!(send.await.unwrap_err().is_cancelled());
        sleep(400 * MS).await;
        assert_eq!(upstream.requests(), 1);
        assert_eq!(
            caller.causes(),
            [Cause::Status(StatusCode::SERVICE_UNAVAILABLE)]
        );
    });
}

/// While the answer's body is read, after retries: the connection is closed.
#[test]
fn in_the_answer() {
    run(async |bed| {
        let endless = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";
        let upstream = bed
            .upstream([Act::Answer(UNAVAILABLE), Act::Early(endless)])
            .await;
        let caller = Caller::new(http1(), attempts(5));
        let sent = caller.clone();
        let request = Request::get(upstream.url())
            .body(Empty::<Bytes>::new())
            .unwrap();
        let send = tokio::spawn(async move { sent.send(request).await.map(drop) });
        until("the second attempt came", || upstream.requests() == 2).await;
        sleep(30 * MS).await;
        send.abort();
        assert!(send.await.unwrap_err().is_cancelled());
        until("the connection is closed", || bed.sockets() == 0).await;
        assert_eq!(upstream.requests(), 2);
    });
}
