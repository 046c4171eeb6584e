//! Bodies that have to be sent again, over HTTP/1: the last attempt's is byte
//! for byte the original, wherever the one before ended.

use std::convert::Infallible;

use buttress::{
    RefusalKind,
    retry::{Cause, GiveUp},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Full, StreamBody, channel::Channel};
use hyper::body::{Body, Frame};
use tokio::time::sleep;
use tonic::codegen::tokio_stream;

use crate::support::{
    Act, Bed, BoxBody, Caller, HELLO, MS, UNAVAILABLE, Upstream, attempts, http1, payload, run,
    until,
};

const LEN: usize = 60_000;
const ANSWERED_503: Cause = Cause::Status(StatusCode::SERVICE_UNAVAILABLE);

pub(crate) fn put<B>(upstream: &Upstream, body: B) -> Request<B> {
    Request::put(upstream.url()).body(body).unwrap()
}

pub(crate) fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("42"));
    trailers
}

/// In chunks of all lengths, with trailers, and of no known length.
pub(crate) fn streaming(
    data: &Bytes,
) -> impl Body<Data = Bytes, Error = Infallible> + Send + 'static {
    let mut rest = data.clone();
    let mut frames = Vec::new();
    for len in (1..).map(|n| n * 97 % 5_000 + 1) {
        if rest.is_empty() {
            break;
        }
        let chunk = rest.split_to(len.min(rest.len()));
        frames.push(Ok(Frame::data(chunk)));
    }
    frames.push(Ok(Frame::trailers(trailers())));
    StreamBody::new(tokio_stream::iter(frames))
}

pub(crate) fn boxed<B>(body: B) -> BoxBody
where
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Sends it to an upstream that breaks off after so many bytes of the body,
/// one attempt after another.
async fn broken_off<B>(bed: &Bed, after: &[usize], body: B)
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<buttress::BoxError>,
{
    let data = payload(LEN);
    let is_chunked = body.size_hint().exact().is_none();
    let acts = after.iter().map(|after| Act::Reset(*after));
    let upstream = bed.upstream(acts).await;
    let caller = Caller::new(http1(), attempts(10));
    let mut request = put(&upstream, body);
    request
        .headers_mut()
        .insert("trailer", HeaderValue::from_static("x-checksum"));
    let answer = caller.send(request).await.unwrap();

    assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));
    assert_eq!(upstream.requests(), after.len() + 1);
    for (seen, after) in upstream.seen().iter().zip(after) {
        assert_eq!(seen.body, data[..*after]);
    }
    let last = upstream.last();
    assert!(last.whole);
    assert_eq!(last.body, data);
    if is_chunked {
        assert_eq!(last.header("content-length"), None);
        assert_eq!(last.trailers, "x-checksum: 42\r\n");
    } else {
        assert_eq!(last.header("content-length"), Some("60000"));
    }
    assert!(caller.causes().iter().all(|cause| *cause == Cause::Reset));
    assert_eq!(caller.causes().len(), after.len());
}

/// And sooner than the body is read at all, and when all was read but for the
/// answer.
const POINTS: [usize; 6] = [0, 1, 1_000, 30_000, 59_999, 60_000];

#[test]
fn a_body_of_known_length_survives_resets() {
    run(async |bed| broken_off(&bed, &POINTS, Full::new(payload(LEN))).await);
}

#[test]
fn a_streamed_body_survives_resets_and_so_do_its_trailers() {
    run(async |bed| broken_off(&bed, &POINTS, streaming(&payload(LEN))).await);
}

#[test]
fn boxed_bodies_survive_resets() {
    run(async |bed| {
        let data = payload(LEN);
        let points = [30_000, 1];
        broken_off(&bed, &points, boxed(Full::new(data.clone()))).await;
        broken_off(&bed, &points, boxed(streaming(&data))).await;
    });
}

/// What the body still had to say is read by the second attempt.
#[test]
fn a_reset_in_the_middle_of_a_stream() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Reset(1_000)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let data = payload(50_000);
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_500)).await.unwrap();
            until("the second attempt came", || upstream.requests() == 2).await;
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(9_000));
                sender.send_data(chunk).await.unwrap();
            }
            sender.send_trailers(trailers()).await.unwrap();
            drop(sender);
        };
        let mut request = put(&upstream, body);
        request
            .headers_mut()
            .insert("trailer", HeaderValue::from_static("x-checksum"));
        let (answer, ()) = tokio::join!(caller.send(request), writes);
        assert_eq!(answer.unwrap().status, 200);
        let last = upstream.last();
        assert_eq!(last.body, data);
        assert_eq!(last.trailers, "x-checksum: 42\r\n");
    });
}

/// The answer is there before the body was read, as servers do that will not
/// have it now.
#[test]
fn early_answers() {
    run(async |bed| {
        for act in [Act::Early(UNAVAILABLE), Act::EarlyAndClose(CLOSING_503)] {
            for length_known in [true, false] {
                let upstream = bed.upstream([act, act]).await;
                let caller = Caller::new(http1(), attempts(3));
                let data = payload(LEN);
                let body = if length_known {
                    boxed(Full::new(data.clone()))
                } else {
                    boxed(streaming(&data))
                };
                let answer = caller.send(put(&upstream, body)).await.unwrap();
                assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));
                assert_eq!(upstream.requests(), 3, "{act:?}");
                assert_eq!(upstream.last().body, data);
                assert_eq!(caller.causes(), [ANSWERED_503; 2]);
            }
        }
    });
}

const CLOSING_503: &str =
    "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 5\r\n\r\nsorry";
/// Of a body that never ends.
const HALF_503: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 500\r\n\r\nsorry";

/// The connection still holds the body when there is the answer: the second
/// attempt waits until it is given back, and has what is left of it.
#[test]
fn an_early_answer_in_the_middle_of_a_stream() {
    run(async |bed| {
        for act in [Act::EarlyAndClose(CLOSING_503), Act::Early(HALF_503)] {
            let upstream = bed.upstream([act]).await;
            let caller = Caller::new(http1(), attempts(3));
            let data = payload(20_000);
            let (mut sender, body) = Channel::<Bytes>::new(1);
            let writes = async {
                let mut rest = data.clone();
                sender.send_data(rest.split_to(1_500)).await.unwrap();
                until("the second attempt came", || upstream.requests() == 2).await;
                sender.send_data(rest).await.unwrap();
                drop(sender);
            };
            let (answer, ()) = tokio::join!(caller.send(put(&upstream, body)), writes);
            assert_eq!(answer.unwrap().status, 200, "{act:?}");
            assert_eq!(upstream.last().body, data);
        }
    });
}

/// An answer that is whole leaves the connection as it is, and hyper goes on
/// sending: the second attempt comes when the body is through.
#[test]
fn an_early_answer_on_a_connection_that_goes_on() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Early(UNAVAILABLE)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let data = payload(20_000);
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_500)).await.unwrap();
            until("there is the answer", || caller.causes().len() == 1).await;
            sleep(50 * MS).await;
            assert_eq!(upstream.requests(), 1);
            sender.send_data(rest).await.unwrap();
            drop(sender);
        };
        let (answer, ()) = tokio::join!(caller.send(put(&upstream, body)), writes);
        assert_eq!(answer.unwrap().status, 200);
        assert_eq!(upstream.requests(), 2);
        until("both came whole", || {
            upstream.seen().iter().all(|seen| seen.whole)
        })
        .await;
        assert!(upstream.seen().iter().all(|seen| seen.body == data));
    });
}

/// But it is not waited for, for ever, and nothing is left of it.
#[test]
fn a_body_that_the_connection_keeps_is_given_up() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Early(UNAVAILABLE)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let (mut sender, body) = Channel::<Bytes>::new(1);
        sender.send_data(payload(1_500)).await.unwrap();
        let answer = caller.send(put(&upstream, body)).await.unwrap();
        // Of the answer that is no more in hand.
        assert_eq!(answer.status, 503);
        assert_eq!(caller.gave_up(), [GiveUp::Body]);
        assert_eq!(upstream.requests(), 1);
        drop(sender);
    });
}

/// A body that is too large to be remembered goes once.
#[test]
fn a_body_over_the_cap_goes_once() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let data = payload(64 * 1024 + 1);
        let answer = caller
            .send(put(&upstream, boxed(streaming(&data))))
            .await
            .unwrap();
        assert_eq!(
            (answer.status, &answer.body.unwrap()[..]),
            (503, &b"sorry"[..])
        );
        assert_eq!(upstream.requests(), 1);
        assert_eq!(upstream.last().body, data);
        assert_eq!(caller.gave_up(), [GiveUp::Body]);
    });
}

#[test]
fn hints_first_then_503_then_200() {
    run(async |bed| {
        let hints = "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n\
            HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\nsorry";
        let good = "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n\
            HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
        let upstream = bed
            .upstream([Act::Answer(hints), Act::Early(hints), Act::Answer(good)])
            .await;
        let caller = Caller::new(http1(), attempts(3));
        let data = payload(LEN);
        let answer = caller
            .send(put(&upstream, Full::new(data.clone())))
            .await
            .unwrap();
        assert_eq!(
            (answer.status, &answer.body.unwrap()[..]),
            (200, &b"hello"[..])
        );
        assert_eq!(upstream.requests(), 3);
        assert_eq!(upstream.last().body, data);
        assert_eq!(caller.causes(), [ANSWERED_503; 2]);
    });
}

/// The connection is kept alive, and gone when the next request comes.
#[test]
fn a_connection_closed_between_two_requests() {
    run(async |bed| {
        let upstream = bed.upstream([Act::AnswerAndClose(HELLO); 5]).await;
        let caller = Caller::new(http1(), attempts(3));
        let data = payload(1_000);
        for nth in 1..=5 {
            let request = put(&upstream, Full::new(data.clone()));
            assert_eq!(caller.send(request).await.unwrap().status, 200);
            assert_eq!(upstream.requests(), nth);
            assert_eq!(upstream.last().body, data);
        }
        assert_eq!(upstream.connections(), 5);
    });
}

/// A hang is a failure that the breaker sees, and the next attempt succeeds.
#[test]
fn a_hang_ends_with_the_attempt() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang]).await;
        let caller = Caller::new(http1(), attempts(3).attempt_timeout(300 * MS));
        let data = payload(LEN);
        let request = put(&upstream, boxed(streaming(&data)));
        assert_eq!(caller.send(request).await.unwrap().status, 200);
        assert_eq!(upstream.requests(), 2);
        assert_eq!(upstream.last().body, data);
        assert_eq!(caller.causes(), [Cause::Refused(RefusalKind::TimedOut)]);
        assert_eq!(caller.failures(), 1);
    });
}

/// A good head is an answer: what follows of it is the caller's to see, and
/// the breaker's.
#[test]
fn a_truncated_answer_is_not_retried_but_counts() {
    run(async |bed| {
        let half = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";
        let upstream = bed.upstream([Act::AnswerAndClose(half)]).await;
        let caller = Caller::new(http1(), attempts(3));
        let request = Request::get(upstream.url()).body(Empty::new()).unwrap();
        let answer = caller.send(request).await.unwrap();
        assert_eq!(answer.status, 200);
        answer.body.unwrap_err();
        assert_eq!(caller.failures(), 1);
        // It would have come by now.
        sleep(30 * MS).await;
        assert_eq!(upstream.requests(), 1);
        assert!(caller.causes().is_empty());
    });
}
