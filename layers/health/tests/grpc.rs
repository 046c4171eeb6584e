//! The gRPC health protocol on a real tonic server.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_health::{
    Beat, Check, Gate, GrpcServer, GrpcService, HealthRegistry, Indicator, Latch, Readiness,
};
use tokio::{sync::oneshot, task::JoinSet, time::timeout};
use tonic::{
    Code, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

const LONG: Duration = Duration::from_secs(10);
const MILLISECOND: Duration = Duration::from_millis(1);

struct Served {
    client: HealthClient<Channel>,
    address: SocketAddr,
    _server: JoinSet<()>,
}

fn named(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

impl Served {
    async fn new(health: &HealthRegistry) -> Self {
        Self::with(health, health.grpc_server()).await
    }

    async fn with(health: &HealthRegistry, server: GrpcServer) -> Self {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let mut routes = tonic::service::Routes::new(server).into_axum_router();
        // The endpoints on the same port.
        routes = routes.nest_service("/health", health.service());
        let router = Server::builder()
            .accept_http1(true)
            .add_routes(routes.into());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        let channel = timeout(LONG, endpoint.connect()).await.unwrap().unwrap();
        Self {
            client: HealthClient::new(channel),
            address,
            _server: tasks,
        }
    }

    async fn check(&mut self, service: &str) -> Result<ServingStatus, Code> {
        let answer = timeout(LONG, self.client.check(named(service)))
            .await
            .unwrap();
        answer
            .map(|answer| answer.into_inner().status())
            .map_err(|status| status.code())
    }

    /// Until it says so.
    async fn until(&mut self, service: &str, status: ServingStatus) {
        let polling = async {
            while self.check(service).await != Ok(status) {
                tokio::time::sleep(MILLISECOND).await;
            }
        };
        let name = service.to_owned();
        assert!(
            timeout(LONG, polling).await.is_ok(),
            "{name:?} is never {status:?}"
        );
    }

    async fn watch(&mut self, service: &str) -> Streaming<HealthCheckResponse> {
        let answer = timeout(LONG, self.client.watch(named(service)))
            .await
            .unwrap();
        answer.unwrap().into_inner()
    }
}

async fn next(stream: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    let message = timeout(LONG, stream.message()).await.unwrap();
    message.unwrap().unwrap().status()
}

use ServingStatus::{NotServing, Serving, Unknown};

#[tokio::test]
async fn a_watch_sees_the_drain() {
    let drain = Gate::open();
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .grpc_service(GrpcService::new("shop.v1.Orders"))
        // Only who says so is heard.
        .look_every(Duration::from_secs(3600))
        .build()
        .unwrap();
    let mut served = Served::new(&health).await;
    assert_eq!(served.check("").await, Ok(Unknown));
    let mut whole = served.watch("").await;
    let mut orders = served.watch("shop.v1.Orders").await;
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (Unknown, Unknown)
    );

    let running = health.start().unwrap();
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (Serving, Serving)
    );
    assert_eq!(served.check("shop.v1.Orders").await, Ok(Serving));
    assert_eq!(served.check("shop.v1.Users").await, Err(Code::NotFound));

    drain.close("shutting_down");
    health.look();
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (NotServing, NotServing)
    );
    assert_eq!(served.check("").await, Ok(NotServing));
    drain.reopen();
    health.look();
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (Serving, Serving)
    );

    // What nobody looks after is not known.
    running.stop().await;
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (Unknown, Unknown)
    );
    assert_eq!(served.check("").await, Ok(Unknown));
    let _running = health.start().unwrap();
    assert_eq!(next(&mut whole).await, Serving);
}

async fn end(stream: &mut Streaming<HealthCheckResponse>) -> Code {
    let end = timeout(LONG, stream.message()).await.unwrap();
    let code = end.unwrap_err().code();
    assert!(
        timeout(LONG, stream.message())
            .await
            .unwrap()
            .is_ok_and(|more| more.is_none())
    );
    code
}

#[tokio::test]
async fn watches_end_when_the_port_is_about_to() {
    let drain = Gate::open();
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .grpc_service(GrpcService::new("shop.v1.Orders"))
        .look_every(Duration::from_secs(3600))
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    let (leave, left) = oneshot::channel::<()>();
    let server = health.grpc_server_until(async { drop(left.await) });
    let mut served = Served::with(&health, server).await;
    served.until("shop.v1.Orders", Serving).await;
    let mut whole = served.watch("").await;
    let mut orders = served.watch("shop.v1.Orders").await;
    assert_eq!(
        (next(&mut whole).await, next(&mut orders).await),
        (Serving, Serving)
    );
    let more = timeout(Duration::from_millis(50), whole.message()).await;
    assert!(more.is_err(), "{more:?}");

    drain.close("shutting_down");
    health.look();
    assert_eq!(next(&mut whole).await, NotServing);
    assert_eq!(next(&mut orders).await, NotServing);
    leave.send(()).unwrap();
    // It is not told twice.
    assert_eq!(end(&mut whole).await, Code::Unavailable);
    assert_eq!(end(&mut orders).await, Code::Unavailable);
    assert_eq!(served.check("").await, Ok(NotServing));
    let mut late = served.watch("").await;
    assert_eq!(next(&mut late).await, NotServing);
    assert_eq!(end(&mut late).await, Code::Unavailable);
}

/// What leaves without a word to the registry is unwell in its last one.
#[tokio::test]
async fn a_watch_never_ends_on_a_good_word() {
    let health = HealthRegistry::builder().build().unwrap();
    let _running = health.start().unwrap();
    let (leave, left) = oneshot::channel::<()>();
    let server = health.grpc_server_until(async { drop(left.await) });
    let mut served = Served::with(&health, server).await;
    served.until("", Serving).await;
    let mut watch = served.watch("").await;
    assert_eq!(next(&mut watch).await, Serving);
    drop(leave);
    assert_eq!(next(&mut watch).await, NotServing);
    assert_eq!(end(&mut watch).await, Code::Unavailable);
    assert_eq!(served.check("").await, Ok(Serving));
    let mut late = served.watch("").await;
    assert_eq!(next(&mut late).await, Serving);
    assert_eq!(next(&mut late).await, NotServing);
    assert_eq!(end(&mut late).await, Code::Unavailable);
}

#[tokio::test]
async fn what_is_said_again_wakes_nobody() {
    let source = Indicator::new("source");
    let health = HealthRegistry::builder()
        .source(source.clone())
        .look_every(MILLISECOND)
        .evaluate_every(MILLISECOND)
        .build()
        .unwrap();
    let mut served = Served::new(&health).await;
    let _running = health.start().unwrap();
    served.until("", Serving).await;
    let mut watch = served.watch("").await;
    assert_eq!(next(&mut watch).await, Serving);
    let more = timeout(Duration::from_millis(200), watch.message()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test]
async fn services_go_by_what_is_theirs() {
    let (maintenance, latch) = (Gate::open(), Latch::new("routes"));
    let (index, disk) = (Indicator::new("index"), Indicator::new("disk"));
    let fails = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&fails);
    let check = Check::optional("search", move || {
        let fails = asked.load(SeqCst);
        async move { if fails { Err("down") } else { Ok(()) } }
    });
    let health = HealthRegistry::builder()
        .latch(&latch)
        .check(check.interval(10 * MILLISECOND))
        .grpc_service(GrpcService::new("Gated").gate(maintenance.clone()))
        .grpc_service(
            GrpcService::new("Scored")
                .source(index.clone(), 0.5)
                .source(disk.clone(), 1.0),
        )
        .grpc_service(GrpcService::new("Checked").check("search"))
        .grpc_service(
            GrpcService::new("Bad").gate(|| -> Readiness { panic!("a gate's own fault") }),
        )
        .look_every(MILLISECOND)
        .build()
        .unwrap();
    let mut served = Served::new(&health).await;
    let _running = health.start().unwrap();
    let all = ["", "Gated", "Scored", "Checked"];
    for service in all {
        served.until(service, NotServing).await;
    }
    latch.release();
    for service in all {
        served.until(service, Serving).await;
    }
    assert_eq!(served.check("Bad").await, Ok(NotServing));

    maintenance.close("maintenance");
    served.until("Gated", NotServing).await;
    index.set(0.4);
    served.until("Scored", NotServing).await;
    index.set(0.5);
    served.until("Scored", Serving).await;
    disk.set(0.99);
    served.until("Scored", NotServing).await;
    // One that is switched off says nothing against it.
    disk.disable();
    served.until("Scored", Serving).await;
    fails.store(true, SeqCst);
    served.until("Checked", NotServing).await;
    // The whole did not go with any of them.
    for service in ["", "Scored"] {
        assert_eq!(served.check(service).await, Ok(Serving));
    }
}

#[tokio::test]
async fn the_endpoints_are_served_on_the_same_port() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let health = HealthRegistry::builder().build().unwrap();
    let served = Served::new(&health).await;
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(served.address)
            .await
            .unwrap();
        let request = "GET /health/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = timeout(LONG, exchange).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.ends_with("{\"ready\":true,\"score\":1.0}"),
        "{answer}"
    );
}

#[test]
fn what_makes_no_sense_cannot_be_built() {
    let says = |service: GrpcService, what: &str| {
        let built = HealthRegistry::builder().grpc_service(service).build();
        let error = built.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(GrpcService::new(""), "name of a gRPC service");
    says(GrpcService::new("a").check("db"), "no check \"db\"");
    let beat = Beat::new("beat", LONG);
    says(
        GrpcService::new("a").source(beat.clone(), 0.0),
        "least score",
    );
    says(GrpcService::new("a").source(beat, f64::NAN), "least score");
    let twice = HealthRegistry::builder()
        .grpc_service(GrpcService::new("a"))
        .grpc_service(GrpcService::new("a"));
    assert!(twice.build().unwrap_err().to_string().contains("already"));
}
