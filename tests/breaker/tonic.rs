//! On tonic, on both sides: gRPC statuses wherever they stand, and refusals
//! that gRPC clients understand.

use std::{
    error::Error,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    Refusal, RefusalKind,
    circuit_breaker::{CircuitBreakerLayer, Settings, State},
};
use tokio::{net::TcpListener, sync::oneshot};
use tonic::{
    Code, Request, Response, Status,
    codegen::tokio_stream,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};
use tower::Layer;

const LONG: Duration = Duration::from_secs(10);

fn after(failures: u32) -> CircuitBreakerLayer {
    CircuitBreakerLayer::builder()
        .settings(Settings::moderate().consecutive_failures(failures))
        .build()
        .unwrap()
}

/// A service that answers with the status it was told, `check` in its head and
/// `watch` in its trailers after one message.
#[derive(Clone)]
struct Told {
    status: Arc<Mutex<Status>>,
    calls: Arc<AtomicUsize>,
}

impl Told {
    fn result<T>(&self, value: T) -> Result<T, Status> {
        let status = self.status.lock().unwrap().clone();
        if status.code() == Code::Ok {
            Ok(value)
        } else {
            Err(status)
        }
    }
}

type Updates = Vec<Result<HealthCheckResponse, Status>>;

#[tonic::async_trait]
impl Health for Told {
    type WatchStream = tokio_stream::Iter<std::vec::IntoIter<Result<HealthCheckResponse, Status>>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.result(Response::new(HealthCheckResponse::default()))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut updates: Updates = vec![Ok(HealthCheckResponse::default())];
        updates.extend(self.result(()).err().map(Err));
        Ok(Response::new(tokio_stream::iter(updates)))
    }
}

/// That service, until it is dropped.
struct Bed {
    address: SocketAddr,
    told: Told,
    _stop: oneshot::Sender<()>,
}

impl Bed {
    /// Behind this layer, if there is one.
    async fn start(layer: Option<CircuitBreakerLayer>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let told = Told {
            status: Arc::new(Mutex::new(Status::ok(""))),
            calls: Arc::default(),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let service = HealthServer::new(told.clone());
        tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener);
            let mut server = Server::builder();
            let serve = async {
                match layer {
                    Some(layer) => {
                        let mut server = server.layer(layer);
                        server
                            .add_service(service)
                            .serve_with_incoming(incoming)
                            .await
                    }
                    None => {
                        server
                            .add_service(service)
                            .serve_with_incoming(incoming)
                            .await
                    }
                }
            };
            tokio::select! {
                result = serve => result.unwrap(),
                _ = stopped => {}
            }
        });
        Self {
            address,
            told,
            _stop: stop,
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.timeout(LONG).connect().await.unwrap()
    }

    async fn client(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel().await)
    }

    fn tell(&self, status: Status) {
        *self.told.status.lock().unwrap() = status;
    }

    fn calls(&self) -> usize {
        self.told.calls.load(Ordering::Relaxed)
    }
}

fn request() -> HealthCheckRequest {
    HealthCheckRequest::default()
}

/// The status of a stream, when it has been read to its end.
async fn watched<T>(client: &mut HealthClient<T>) -> Result<(), Status>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let mut updates = client.watch(request()).await?.into_inner();
    while updates.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn a_refusal_is_unavailable_and_says_when_to_retry() {
    let layer = after(1);
    let bed = Bed::start(Some(layer.clone())).await;
    let mut client = bed.client().await;
    client.check(request()).await.unwrap();
    layer.breaker().trip(None).unwrap();
    for mut client in [client, bed.client().await] {
        let refused = client.check(request()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        let pushback = refused.metadata().get("grpc-retry-pushback-ms").unwrap();
        let pushback: u32 = pushback.to_str().unwrap().parse().unwrap();
        assert!((20_000..=30_000).contains(&pushback), "{pushback}");
        assert!(!refused.metadata().contains_key("retry-after"));
        let refused = client.watch(request()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
    }
    assert_eq!(bed.calls(), 1);
}

/// A server's own failures open it, in heads and in trailers; what is the
/// caller's fault does not.
#[tokio::test]
async fn statuses_in_heads_and_trailers_count() {
    let layer = after(3);
    let bed = Bed::start(Some(layer.clone())).await;
    let mut client = bed.client().await;
    let failures = || layer.breaker().status().failures;
    for (status, counts) in [
        (Status::unavailable("down"), true),
        (Status::internal("broken"), true),
        (Status::deadline_exceeded("late"), true),
        (Status::not_found("no such thing"), false),
        (Status::unauthenticated("who?"), false),
    ] {
        layer.breaker().reset();
        let code = status.code();
        bed.tell(status);
        assert_eq!(client.check(request()).await.unwrap_err().code(), code);
        assert_eq!(failures(), u64::from(counts), "{code:?} in a head");
        assert_eq!(watched(&mut client).await.unwrap_err().code(), code);
        assert_eq!(failures(), 2 * u64::from(counts), "{code:?} in trailers");
        bed.tell(Status::ok(""));
        watched(&mut client).await.unwrap();
        assert_eq!(failures(), 0, "a good end ends the run");
    }
    bed.tell(Status::unavailable("down"));
    for _ in 0..3 {
        assert_eq!(watched(&mut client).await.unwrap_err().message(), "down");
    }
    assert_eq!(layer.breaker().state(), State::Open);
    let calls = bed.calls();
    let refused = watched(&mut client).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(bed.calls(), calls);
}

/// In front of a client's channel: it opens by the trailers that come, and the
/// refusal is in the status' sources.
#[tokio::test]
async fn in_front_of_a_client() {
    let bed = Bed::start(None).await;
    let layer = CircuitBreakerLayer::builder()
        .settings(Settings::moderate().consecutive_failures(2))
        .errors()
        .build()
        .unwrap();
    let mut client = HealthClient::new(layer.layer(bed.channel().await));
    watched(&mut client).await.unwrap();
    bed.tell(Status::unavailable("down"));
    watched(&mut client).await.unwrap_err();
    client.check(request()).await.unwrap_err();
    let calls = bed.calls();

    // Another channel, the same state.
    let mut other = HealthClient::new(layer.layer(bed.channel().await));
    for status in [
        client.check(request()).await.unwrap_err(),
        watched(&mut other).await.unwrap_err(),
    ] {
        let refusal = Refusal::find(&status).expect("the refusal is among the sources");
        assert_eq!(refusal.kind(), RefusalKind::CircuitOpen);
        assert!(refusal.retry_after().unwrap() > Duration::from_secs(20));
        assert!(status.source().is_some());
    }
    assert_eq!(bed.calls(), calls);

    bed.tell(Status::ok(""));
    layer.breaker().half_open().unwrap();
    watched(&mut other).await.unwrap();
    client.check(request()).await.unwrap();
}
