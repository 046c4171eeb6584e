//! tonic's clients on a retried channel: what has not begun is asked again.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use buttress::{
    BoxError,
    circuit_breaker::{CircuitBreakerLayer, Settings},
    retry::{HedgeLayer, PeekLayer, ReplayBody, RetryLayer},
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use tokio::sync::oneshot;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::tokio_stream,
    transport::{self, Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};

use crate::support::{Bed, LONG, MS, attempts, listen, run, until};

/// What a call comes to, and whether after a first message.
#[derive(Clone, Debug)]
enum Act {
    Refuse(Status),
    BeginAndEnd(Status),
    /// Its head first, and the status in the trailers.
    EndAfterHead(Status),
    Hang,
}

/// Does these one after another, and is well then.
#[derive(Clone)]
struct Told {
    acts: Arc<Mutex<VecDeque<Act>>>,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Counts those that hang.
    hangs: Bed,
}

/// What was asked, and how much time it had.
#[derive(Clone, Debug)]
struct Call {
    asked: String,
    left: Option<String>,
}

type Updates = tokio_stream::Iter<std::vec::IntoIter<Result<HealthCheckResponse, Status>>>;

impl Told {
    fn act(&self, request: &Request<HealthCheckRequest>) -> Option<Act> {
        let left = request.metadata().get("grpc-timeout");
        let left = left.map(|left| left.to_str().unwrap().to_owned());
        let asked = request.get_ref().service.clone();
        self.calls.lock().unwrap().push(Call { asked, left });
        self.acts.lock().unwrap().pop_front()
    }

    async fn hang(&self) -> ! {
        let _hangs = self.hangs.socket();
        std::future::pending().await
    }
}

#[tonic::async_trait]
impl Health for Told {
    type WatchStream = Updates;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.act(&request) {
            None => Ok(Response::new(HealthCheckResponse::default())),
            Some(Act::Refuse(status) | Act::BeginAndEnd(status) | Act::EndAfterHead(status)) => {
                Err(status)
            }
            Some(Act::Hang) => self.hang().await,
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Updates>, Status> {
        let mut updates = vec![Ok(HealthCheckResponse::default())];
        match self.act(&request) {
            None => {}
            Some(Act::Refuse(status)) => return Err(status),
            Some(Act::BeginAndEnd(status)) => updates.push(Err(status)),
            Some(Act::EndAfterHead(status)) => updates = vec![Err(status)],
            Some(Act::Hang) => self.hang().await,
        }
        Ok(Response::new(tokio_stream::iter(updates)))
    }
}

/// That service, until it is dropped. Its connections are tasks, too, and end
/// with the channels.
struct Upstream {
    address: SocketAddr,
    told: Told,
    _stop: oneshot::Sender<()>,
}

impl Upstream {
    async fn start(acts: impl IntoIterator<Item = Act>) -> Self {
        let listener = listen().await;
        let address = listener.local_addr().unwrap();
        let told = Told {
            acts: Arc::new(Mutex::new(acts.into_iter().collect())),
            calls: Arc::default(),
            hangs: Bed::default(),
        };
        let service = HealthServer::new(told.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let served = Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener));
            tokio::select! {
                served = served => served.unwrap(),
                _ = stopped => {}
            }
        });
        Self {
            address,
            told,
            _stop: stop,
        }
    }

    fn calls(&self) -> usize {
        self.told.calls.lock().unwrap().len()
    }

    /// Calls that hang, and have not been given up.
    fn hanging(&self) -> usize {
        self.told.hangs.sockets()
    }

    fn client(&self, settings: buttress::retry::Settings) -> HealthClient<Service> {
        HealthClient::new(service(self.address, settings, &breaker()))
    }
}

type Service = BoxCloneSyncService<
    http::Request<Body>,
    http::Response<UnsyncBoxBody<Bytes, BoxError>>,
    transport::Error,
>;

fn breaker() -> CircuitBreakerLayer {
    CircuitBreakerLayer::builder()
        .settings(Settings::tolerant())
        .build()
        .unwrap()
}

/// A whole stack over a channel.
fn service(
    address: SocketAddr,
    settings: buttress::retry::Settings,
    breaker: &CircuitBreakerLayer,
) -> Service {
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_timeout(LONG)
        .connect_lazy();
    let retry = RetryLayer::builder().settings(settings).build().unwrap();
    let limit = TimeoutLayer::builder().build().unwrap();
    let inner = breaker
        .layer(limit.layer(PeekLayer::new().layer(channel)))
        .map_request(|request: http::Request<ReplayBody<Body>>| request.map(Body::new));
    boxed(retry.layer(inner))
}

fn boxed<S, R>(service: S) -> Service
where
    S: tower::Service<
            http::Request<Body>,
            Response = http::Response<R>,
            Error = transport::Error,
            Future: Send,
        > + Clone
        + Send
        + Sync
        + 'static,
    R: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    BoxCloneSyncService::new(service.map_response(|response: http::Response<R>| {
        response.map(|body| BodyExt::map_err(body, Into::into).boxed_unsync())
    }))
}

fn request() -> HealthCheckRequest {
    HealthCheckRequest {
        service: "inventory".to_owned(),
    }
}

fn unavailable() -> Act {
    Act::Refuse(Status::unavailable("not yet"))
}

#[test]
fn unavailable_in_the_head_is_asked_again() {
    run(async |_| {
        let upstream = Upstream::start([unavailable(), unavailable()]).await;
        let mut client = upstream.client(attempts(3));
        client.check(request()).await.unwrap();
        let calls = upstream.told.calls.lock().unwrap().clone();
        assert_eq!(calls.len(), 3);
        assert!(calls.iter().all(|call| call.asked == "inventory"));
    });
}

#[test]
fn a_stream_that_has_not_begun_is_asked_again() {
    run(async |_| {
        let upstream = Upstream::start([unavailable()]).await;
        let mut client = upstream.client(attempts(3));
        let mut updates = client.watch(request()).await.unwrap().into_inner();
        assert!(updates.message().await.unwrap().is_some());
        assert!(updates.message().await.unwrap().is_none());
        assert_eq!(upstream.calls(), 2);
    });
}

#[test]
fn a_stream_that_has_begun_is_not() {
    run(async |_| {
        let ends = Act::BeginAndEnd(Status::unavailable("no more"));
        let upstream = Upstream::start([ends]).await;
        let mut client = upstream.client(attempts(3));
        let mut updates = client.watch(request()).await.unwrap().into_inner();
        assert!(updates.message().await.unwrap().is_some());
        let status = updates.message().await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        tokio::time::sleep(30 * MS).await;
        assert_eq!(upstream.calls(), 1);
    });
}

/// The head has come, and no message: the status is in the trailers.
#[test]
fn a_stream_that_fails_after_its_head_is_asked_again() {
    run(async |_| {
        let fails = || Act::EndAfterHead(Status::unavailable("not yet"));
        let internal = Act::EndAfterHead(Status::internal("broken"));
        let upstream = Upstream::start([fails(), fails(), internal]).await;
        let mut client = upstream.client(attempts(3));
        let mut updates = client.watch(request()).await.unwrap().into_inner();
        let status = updates.message().await.unwrap_err();
        assert_eq!((status.code(), upstream.calls()), (Code::Internal, 3));
    });
}

/// So does the breaker, though the trailers are dropped unread.
#[test]
fn each_attempt_that_fails_after_its_head_counts() {
    run(async |_| {
        let fails = || Act::EndAfterHead(Status::unavailable("not yet"));
        let upstream = Upstream::start([fails(), fails(), fails()]).await;
        let breaker = breaker();
        let mut client = HealthClient::new(service(upstream.address, attempts(3), &breaker));
        let mut updates = client.watch(request()).await.unwrap().into_inner();
        updates.message().await.unwrap_err();
        assert_eq!(
            (upstream.calls(), breaker.breaker().status().failures),
            (3, 3)
        );
    });
}

#[test]
fn other_codes_and_pushback_are_the_answer() {
    run(async |_| {
        let mut pushed_back = Status::unavailable("leave me");
        let never = "-1".parse().unwrap();
        pushed_back
            .metadata_mut()
            .insert("grpc-retry-pushback-ms", never);
        let upstream = Upstream::start([
            Act::Refuse(Status::internal("broken")),
            Act::Refuse(pushed_back),
        ])
        .await;
        let mut client = upstream.client(attempts(3));
        let status = client.check(request()).await.unwrap_err();
        assert_eq!((status.code(), upstream.calls()), (Code::Internal, 1));
        let status = client.check(request()).await.unwrap_err();
        assert_eq!((status.code(), upstream.calls()), (Code::Unavailable, 2));
    });
}

/// Each attempt is told less, and the answer is a status that tonic knows. The
/// server ends the call at the same time and says CANCELLED, which is nobody's
/// failure: the breaker counts a hang all the same.
#[test]
fn what_the_server_is_told_and_the_end_of_time() {
    run(async |_| {
        let upstream = Upstream::start([unavailable(), Act::Hang]).await;
        let breaker = breaker();
        let settings = attempts(3).total_timeout(600 * MS);
        let mut client = HealthClient::new(service(upstream.address, settings, &breaker));
        let status = client.check(request()).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert_eq!(breaker.breaker().status().failures, 2);
        let calls = upstream.told.calls.lock().unwrap().clone();
        assert_eq!(calls.len(), 2);
        let left = |call: usize| {
            let left = calls[call].left.as_deref().expect("it was told");
            left.strip_suffix('n')
                .map(|nanos| nanos.parse::<u64>().unwrap())
                .or_else(|| {
                    left.strip_suffix('u')
                        .map(|micros| micros.parse::<u64>().unwrap() * 1000)
                })
                .unwrap_or_else(|| panic!("{left}"))
        };
        assert!(left(0) <= 600_000_000);
        assert!(left(1) + 10_000_000 <= left(0));
    });
}

/// Nobody listens: it is asked again, and in the end the cause is told.
#[test]
fn no_connection() {
    run(async |_| {
        let address = listen().await.local_addr().unwrap();
        let mut client = HealthClient::new(service(address, attempts(3), &breaker()));
        let status = client.check(request()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    });
}

/// As often as its closure says that it is harmless: the server sees that the
/// first is given up.
#[test]
fn a_call_that_hangs_is_hedged() {
    run(async |_| {
        let upstream = Upstream::start([Act::Hang, unavailable(), Act::Hang]).await;
        let channel = Endpoint::from_shared(format!("http://{}", upstream.address))
            .unwrap()
            .connect_timeout(LONG)
            .connect_lazy();
        let retry = RetryLayer::builder().settings(attempts(3)).build().unwrap();
        let hedge = HedgeLayer::builder()
            .after(30 * MS)
            .max_hedges(2)
            .hedge_if(|head| head.uri.path().ends_with("/Check"))
            .build()
            .unwrap();
        let limit = TimeoutLayer::builder().build().unwrap();
        let inner = limit.layer(channel).map_request(
            |request: http::Request<ReplayBody<ReplayBody<Body>>>| request.map(Body::new),
        );
        let mut client = HealthClient::new(boxed(retry.layer(hedge.layer(inner))));
        // The second is not available.
        tokio::select! {
            answer = client.check(request()) => panic!("{answer:?}"),
            () = until("the third hangs", || upstream.hanging() == 2) => {}
        }
        assert_eq!(upstream.calls(), 3);
        until("both are given up", || upstream.hanging() == 0).await;

        upstream.told.acts.lock().unwrap().push_back(Act::Hang);
        client.check(request()).await.unwrap();
        assert_eq!(upstream.calls(), 5);
        until("the first is given up", || upstream.hanging() == 0).await;
        let calls = upstream.told.calls.lock().unwrap().clone();
        assert!(calls.iter().all(|call| call.asked == "inventory"));

        // Of this nothing is said.
        upstream.told.acts.lock().unwrap().push_back(Act::Hang);
        tokio::select! {
            answer = client.watch(request()) => panic!("{answer:?}"),
            () = async {
                until("it hangs", || upstream.hanging() == 1).await;
                tokio::time::sleep(100 * MS).await;
            } => {}
        }
        assert_eq!(upstream.calls(), 6);
        until("it is given up", || upstream.hanging() == 0).await;
    });
}
