//! What is logged.

use std::convert::Infallible;

use buttress_core::{
    key,
    testing::{
        Log,
        web::{self, ScriptedBody},
    },
};
use buttress_lock::LockLayer;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};

type Web = Request<Full<Bytes>>;

async fn serve(_: Web) -> Result<Response<ScriptedBody>, Infallible> {
    Ok(Response::new(ScriptedBody::new().hang()))
}

fn order(id: &str) -> Web {
    let mut request = web::get("/");
    request.headers_mut().insert("x-order", id.parse().unwrap());
    request
}

#[tokio::test(start_paused = true)]
async fn who_is_refused_and_never_a_key() {
    let log = Log::new().target("buttress_lock");
    let _here = log.here();
    let layer = LockLayer::builder(key::header("x-order")).name("api");
    let service = layer.build().unwrap().layer(service_fn(serve));
    let held = service.clone().oneshot(order("secret")).await.unwrap();
    assert_eq!(log.take().len(), 0);
    service.clone().oneshot(order("secret")).await.unwrap();
    let [event] = &log.take()[..] else {
        panic!("one event")
    };
    assert_eq!(*event, "DEBUG not locked name=api reason=busy");
    service.oneshot(web::get("/")).await.unwrap();
    let [event] = &log.take()[..] else {
        panic!("one event")
    };
    assert_eq!(*event, "DEBUG not locked name=api reason=missing_key");
    drop(held);
    assert_eq!(log.take().len(), 0);
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn an_outage_once_its_end_once_and_what_was_lost() {
    use std::time::Duration;

    use buttress_core::clock;
    use buttress_lock::Fence;
    use buttress_redis::{Cmd, testing::Server};
    use tracing::Level;

    let log = Log::new().target("buttress_lock").max_level(Level::INFO);
    let _here = log.here();
    let mut server = Server::start().await;
    let redis = server.redis();
    redis.connect().await.unwrap();
    let layer = LockLayer::builder(key::header("x-order")).name("api");
    let layer = layer.redis(&redis).ttl(Duration::from_millis(300));
    let service = layer
        .build()
        .unwrap()
        .layer(service_fn(async |request: Web| {
            let mut response = serve(request.clone()).await?;
            if let Some(fence) = request.extensions().get::<Fence>() {
                response.extensions_mut().insert(fence.clone());
            }
            Ok::<_, Infallible>(response)
        }));
    let held = service.clone().oneshot(order("secret")).await.unwrap();
    let mut flush = Cmd::new();
    flush.arg("FLUSHALL");
    redis.run::<()>("test", &flush).await.unwrap();
    held.extensions().get::<Fence>().unwrap().lost().await;
    let began = clock::now();
    while log.events().is_empty() {
        assert!(clock::now() - began < Duration::from_secs(30));
        tokio::task::yield_now().await;
    }
    let [event] = &log.take()[..] else {
        panic!("one event")
    };
    assert_eq!(*event, "WARN a lock was lost name=api how=taken away");
    drop(held);

    server.kill();
    for _ in 0..5 {
        service.clone().oneshot(order("secret")).await.unwrap();
    }
    let [event] = &log.take()[..] else {
        panic!("one event")
    };
    assert_eq!(event.level(), Level::WARN);
    assert_eq!(event.message(), "no locks can be had");
    assert!(!format!("{event:?}").contains("secret"));

    server.restart().await;
    let mut watch = redis.watch();
    while !redis.is_up() {
        watch.changed().await;
    }
    for _ in 0..3 {
        service.clone().oneshot(order("other")).await.unwrap();
    }
    let [event] = &log.take()[..] else {
        panic!("one event")
    };
    assert_eq!(*event, "INFO locks can be had again name=api");
}
