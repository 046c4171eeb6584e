//! HTTP/2 by prior knowledge: refused streams, connections on their way out,
//! and bodies with trailers.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use buttress::retry::{Cause, GiveUp, RetryBudget};
use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{self, SendResponse},
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, channel::Channel};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::support::{Bed, Caller, MS, accept, attempts, http2, listen, payload, run, until};

/// What there is to a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// Reads it all and answers 200.
    Take,
    /// The same, and lets the connection end with it.
    TakeLast,
    /// Resets it at once.
    Refuse(Reason),
    /// Reads so much and resets it.
    ResetAfter(usize, Reason),
    /// Reads so much and ends the connection.
    GoAway(usize, Reason),
    /// Answers 503 with nothing read, and resets with NO_ERROR, as RFC 9113
    /// §8.1 has it.
    Early,
    /// Says nothing.
    Hang,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
    /// How it ended, if it did not by itself.
    pub(crate) reset: Option<Reason>,
}

pub(crate) struct Upstream {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    _stop: oneshot::Sender<()>,
}

impl Upstream {
    pub(crate) async fn start(bed: &Bed, acts: impl IntoIterator<Item = Act>) -> Self {
        Self::start_at(listen().await, bed, acts)
    }

    fn start_at(listener: TcpListener, bed: &Bed, acts: impl IntoIterator<Item = Act>) -> Self {
        let address = listener.local_addr().unwrap();
        let acts: Arc<Mutex<VecDeque<_>>> = Arc::new(Mutex::new(acts.into_iter().collect()));
        let seen = Arc::default();
        let (all, bed) = (Arc::clone(&seen), bed.clone());
        let stop = accept(listener, move |stream| {
            let (acts, all, socket) = (Arc::clone(&acts), Arc::clone(&all), bed.socket());
            tokio::spawn(async move {
                let _ = serve(stream, &acts, &all).await;
                drop(socket);
            });
        });
        Self {
            address,
            seen,
            _stop: stop,
        }
    }

    pub(crate) fn request<B>(&self, method: &str, body: B) -> Request<B> {
        Request::builder()
            .method(method)
            .uri(format!("http://{}/", self.address))
            .body(body)
            .unwrap()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

async fn serve(
    stream: TcpStream,
    acts: &Mutex<VecDeque<Act>>,
    all: &Arc<Mutex<Vec<Seen>>>,
) -> Result<(), h2::Error> {
    let mut connection = server::handshake(stream).await?;
    let (closes, mut closed) = tokio::sync::mpsc::unbounded_channel();
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            Some(reason) = closed.recv() => {
                match reason {
                    Some(reason) => connection.abrupt_shutdown(reason),
                    None => connection.graceful_shutdown(),
                }
                continue;
            }
        };
        let Some(accepted) = accepted else {
            return Ok(());
        };
        let (request, respond) = accepted?;
        let act = acts.lock().unwrap().pop_front().unwrap_or(Act::Take);
        let index = {
            let mut all = all.lock().unwrap();
            all.push(Seen::default());
            all.len() - 1
        };
        let (all, closes) = (Arc::clone(all), closes.clone());
        tokio::spawn(async move {
            stream_by(act, request.into_body(), respond, &all, index).await;
            let _ = match act {
                Act::GoAway(_, reason) => closes.send(Some(reason)),
                Act::TakeLast => closes.send(None),
                _ => Ok(()),
            };
        });
    }
}

/// Does what concerns the stream alone.
async fn stream_by(
    act: Act,
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    all: &Mutex<Vec<Seen>>,
    index: usize,
) {
    let most = match act {
        Act::Take | Act::TakeLast | Act::Hang => usize::MAX,
        Act::ResetAfter(most, _) | Act::GoAway(most, _) => most,
        Act::Refuse(_) | Act::Early => 0,
    };
    while all.lock().unwrap()[index].body.len() < most {
        let Some(data) = body.data().await else {
            break;
        };
        match data {
            Ok(data) => {
                let _ = body.flow_control().release_capacity(data.len());
                all.lock().unwrap()[index].body.extend_from_slice(&data);
            }
            Err(error) => {
                all.lock().unwrap()[index].reset = error.reason();
                return;
            }
        }
    }
    let answer = |status| {
        let mut response = Response::new(());
        *response.status_mut() = status;
        response
    };
    match act {
        Act::Take | Act::TakeLast => {
            let trailers = body.trailers().await.ok().flatten();
            all.lock().unwrap()[index].trailers = trailers;
            let _ = respond.send_response(answer(StatusCode::OK), true);
        }
        Act::Refuse(reason) | Act::ResetAfter(_, reason) => respond.send_reset(reason),
        Act::GoAway(..) => {}
        Act::Early => {
            if let Ok(mut stream) =
                respond.send_response(answer(StatusCode::SERVICE_UNAVAILABLE), true)
            {
                stream.send_reset(Reason::NO_ERROR);
            }
        }
        Act::Hang => {
            let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            all.lock().unwrap()[index].reset = reset.ok();
        }
    }
}

/// Once, at once, whatever the method is, and no budget is asked for it.
#[test]
fn a_refused_stream_is_free_once() {
    run(async |bed| {
        let refuse = Act::Refuse(Reason::REFUSED_STREAM);
        let upstream = Upstream::start(&bed, [refuse]).await;
        let none = RetryBudget::new(0, 0).unwrap();
        let caller = Caller::with(http2(), Default::default(), |retry| {
            retry.settings(attempts(1)).budget(none)
        });
        let data = payload(50_000);
        let request = upstream.request("POST", Full::new(data.clone()));
        assert_eq!(caller.send(request).await.unwrap().status, 200);
        assert_eq!(caller.causes(), [Cause::RefusedStream]);
        let seen = upstream.seen();
        assert_eq!((seen.len(), &seen[1].body[..]), (2, &data[..]));

        // The second time it is an attempt like any other.
        let upstream = Upstream::start(&bed, [refuse; 4]).await;
        let caller = Caller::new(http2(), attempts(3));
        let request = upstream.request("POST", Full::new(data.clone()));
        caller.send(request).await.unwrap_err();
        assert_eq!(upstream.requests(), 4);
        assert_eq!(caller.causes(), [Cause::RefusedStream; 3]);
        assert_eq!(caller.gave_up(), [GiveUp::Attempts]);
    });
}

#[test]
fn refused_connections_until_the_port_is_open() {
    run(async |bed| {
        let address = listen().await.local_addr().unwrap();
        let caller = Caller::new(http2(), attempts(1_000));
        let data = payload(10_000);
        let request = Request::post(format!("http://{address}/"))
            .body(Full::new(data.clone()))
            .unwrap();
        let opens = async {
            until("it was refused twice", || caller.causes().len() >= 2).await;
            let listener = TcpListener::bind(address).await.unwrap();
            Upstream::start_at(listener, &bed, [])
        };
        let (answer, upstream) = tokio::join!(caller.send(request), opens);
        assert_eq!(answer.unwrap().status, 200);
        let seen = upstream.seen();
        assert_eq!((seen.len(), &seen[0].body[..]), (1, &data[..]));
        let causes = caller.causes();
        assert!(causes.iter().all(|cause| *cause == Cause::Connect));
    });
}

#[test]
fn streams_and_connections_that_break() {
    run(async |bed| {
        for act in [
            Act::ResetAfter(0, Reason::INTERNAL_ERROR),
            Act::ResetAfter(20_000, Reason::INTERNAL_ERROR),
            Act::ResetAfter(20_000, Reason::CANCEL),
            Act::ResetAfter(60_000, Reason::ENHANCE_YOUR_CALM),
            Act::GoAway(0, Reason::NO_ERROR),
            Act::GoAway(20_000, Reason::INTERNAL_ERROR),
            Act::GoAway(60_000, Reason::ENHANCE_YOUR_CALM),
        ] {
            let upstream = Upstream::start(&bed, [act, act]).await;
            let caller = Caller::new(http2(), attempts(3));
            let data = payload(60_000);
            let request = upstream.request("POST", Full::new(data.clone()));
            let unsafe_ = caller.send(request).await;
            assert!(unsafe_.is_err(), "{act:?}: {unsafe_:?}");
            assert_eq!(upstream.requests(), 1, "{act:?}");

            let request = upstream.request("PUT", Full::new(data.clone()));
            let answer = caller.send(request).await.unwrap_or_else(|error| {
                panic!("{act:?}: {error:?}");
            });
            assert_eq!(answer.status, 200, "{act:?}");
            let seen = upstream.seen();
            assert_eq!(seen.len(), 3, "{act:?}");
            assert_eq!(seen[2].body, data, "{act:?}");
        }
    });
}

/// A connection that its server ends when all is answered: the next request
/// has another, and needs no retry, or one that sends it once.
#[test]
fn connections_on_their_way_out() {
    run(async |bed| {
        let upstream = Upstream::start(&bed, [Act::TakeLast; 6]).await;
        let caller = Caller::new(http2(), attempts(3));
        let data = payload(30_000);
        for _ in 0..6 {
            let request = upstream.request("PUT", Full::new(data.clone()));
            assert_eq!(caller.send(request).await.unwrap().status, 200);
        }
        assert!(upstream.seen().iter().all(|seen| seen.body == data));
        assert!(upstream.requests() <= 6 + caller.causes().len());
    });
}

/// The answer is there and the stream is done, but the body was in the middle.
#[test]
fn an_early_answer_in_the_middle_of_a_stream() {
    run(async |bed| {
        let upstream = Upstream::start(&bed, [Act::Early, Act::Early]).await;
        let caller = Caller::new(http2(), attempts(3));
        let data = payload(40_000);
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", HeaderValue::from_static("42"));
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_500)).await.unwrap();
            until("the third attempt came", || upstream.requests() == 3).await;
            sender.send_data(rest).await.unwrap();
            sender.send_trailers(trailers.clone()).await.unwrap();
            drop(sender);
        };
        let request = upstream.request("PUT", body);
        let (answer, ()) = tokio::join!(caller.send(request), writes);
        assert_eq!(answer.unwrap().status, 200);
        let seen = upstream.seen();
        assert_eq!(seen[2].body, data);
        assert_eq!(seen[2].trailers, Some(trailers));
    });
}

/// An attempt that hangs is told by a reset of its stream; the connection is
/// not closed for it.
#[test]
fn a_hang_ends_its_stream_alone() {
    run(async |bed| {
        let upstream = Upstream::start(&bed, [Act::Hang]).await;
        let caller = Caller::new(http2(), attempts(3).attempt_timeout(300 * MS));
        let data = payload(40_000);
        let body = Full::new(data.clone()).with_trailers(std::future::ready(None));
        let request = upstream.request("PUT", body);
        assert_eq!(caller.send(request).await.unwrap().status, 200);
        until("the first was reset", || {
            upstream.seen()[0].reset == Some(Reason::CANCEL)
        })
        .await;
        assert_eq!(upstream.seen()[1].body, data);
        assert_eq!(bed.sockets(), 1);
    });
}
