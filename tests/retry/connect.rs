//! No connection, and connections that break: what was sent decides.

use buttress::retry::{Cause, GiveUp};
use bytes::Bytes;
use http::Request;
use http_body_util::{Full, channel::Channel};
use tokio::{net::TcpListener, time::sleep};

use crate::support::{Act, Caller, MS, attempts, http1, listen, payload, run, until};

/// Nobody listens; then somebody does. Even a POST is sent again, since
/// nothing was sent.
#[test]
fn refused_connections_until_the_port_is_open() {
    run(async |bed| {
        let address = listen().await.local_addr().unwrap();
        let caller = Caller::new(http1(), attempts(1_000));
        let data = payload(10_000);
        let request = Request::post(format!("http://{address}/"))
            .body(Full::new(data.clone()))
            .unwrap();
        let opens = async {
            until("it was refused twice", || caller.causes().len() >= 2).await;
            let listener = TcpListener::bind(address).await.unwrap();
            bed.upstream_at(listener, [])
        };
        let (answer, upstream) = tokio::join!(caller.send(request), opens);
        assert_eq!(answer.unwrap().status, 200);
        assert_eq!(upstream.requests(), 1);
        assert_eq!(upstream.last().body, data);
        let causes = caller.causes();
        assert!(causes.iter().all(|cause| *cause == Cause::Connect));
        // The breaker counts attempts.
        assert_eq!(caller.failures(), causes.len());
    });
}

/// When the head is out nobody knows what came of it.
#[test]
fn a_reset_after_the_head_was_sent() {
    run(async |bed| {
        for after in [0, 10, 10_000] {
            let data = payload(10_000);
            let upstream = bed.upstream([Act::Reset(after); 2]).await;
            let caller = Caller::new(http1(), attempts(3));
            let request = |method: &str| {
                Request::builder()
                    .method(method)
                    .uri(upstream.url())
                    .body(Full::new(data.clone()))
                    .unwrap()
            };
            caller.send(request("POST")).await.unwrap_err();
            assert_eq!(upstream.requests(), 1);
            assert_eq!(caller.gave_up(), [GiveUp::Unsafe]);

            let answer = caller.send(request("PUT")).await.unwrap();
            assert_eq!(answer.status, 200);
            assert_eq!(upstream.requests(), 3);
            assert_eq!(upstream.last().body, data);
            assert_eq!(caller.causes(), [Cause::Reset]);
        }
    });
}

/// A key by which the callee knows the request again makes a POST repeatable.
#[test]
fn a_post_with_an_idempotency_key() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Reset(5)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let request = Request::post(upstream.url())
            .header("idempotency-key", "7")
            .body(Full::new(payload(1_000)))
            .unwrap();
        assert_eq!(caller.send(request).await.unwrap().status, 200);
        for seen in upstream.seen() {
            assert_eq!(seen.header("idempotency-key"), Some("7"));
        }
        assert_eq!(upstream.requests(), 2);
    });
}

/// The caller's own body that breaks off is nobody else's fault.
#[test]
fn a_request_body_that_fails_is_not_sent_again() {
    run(async |bed| {
        let upstream = bed.upstream([]).await;
        let caller = Caller::new(http1(), attempts(3));
        let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(2);
        sender.send_data(payload(100)).await.unwrap();
        sender.abort(std::io::ErrorKind::ConnectionReset.into());
        let request = Request::put(upstream.url()).body(body).unwrap();
        caller.send(request).await.unwrap_err();
        sleep(30 * MS).await;
        assert!(upstream.requests() <= 1);
        assert!(upstream.seen().iter().all(|seen| !seen.whole));
    });
}
