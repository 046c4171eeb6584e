//! Locks of a fleet over a cluster of three nodes.

use std::{convert::Infallible, time::Duration};

use buttress_core::{
    clock, key,
    testing::web::{self, ScriptedBody},
};
use buttress_lock::{Fence, LockBuilder, LockLayer};
use buttress_redis::{Config, Redis, testing::Cluster};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::sleep;
use tower::{Layer, ServiceExt, service_fn};

const LONG: Duration = Duration::from_secs(60);

type Web = Request<Full<Bytes>>;

fn process(redis: &Redis) -> LockBuilder {
    LockLayer::builder(key::header("x-order"))
        .name("orders")
        .redis(redis)
        .ttl(LONG)
}

fn order(id: usize) -> Web {
    let mut request = web::post("/", "");
    request.headers_mut().insert("x-order", id.into());
    request
}

/// Answers with the fence, and a body that goes on for a while.
async fn serve(request: Web) -> Result<Response<ScriptedBody>, Infallible> {
    let body = ScriptedBody::new().data("a").wait(LONG).data("b");
    let mut response = Response::new(body);
    if let Some(fence) = request.extensions().get::<Fence>() {
        response.extensions_mut().insert(fence.clone());
    }
    Ok(response)
}

fn token<B>(response: &Response<B>) -> u64 {
    response.extensions().get::<Fence>().unwrap().token()
}

#[tokio::test]
async fn processes_exclude_each_other_while_slots_move() {
    let cluster = Cluster::start().await;
    let [ours, theirs] = [(); 2].map(|()| {
        let layer = process(&cluster.redis()).build().unwrap();
        layer.layer(service_fn(serve))
    });
    let mut held = Vec::new();
    for id in 0..12 {
        held.push(ours.clone().oneshot(order(id)).await.unwrap());
    }
    for node in cluster.nodes() {
        let there: Vec<String> = node.cmd(&["KEYS", "*lock*"]).await;
        assert!(!there.is_empty());
    }
    for _ in 0..2 {
        cluster.move_all().await;
        for id in 0..12 {
            let busy = theirs.clone().oneshot(order(id)).await.unwrap();
            assert_eq!(busy.status(), 409);
        }
    }
    for (id, held) in held.into_iter().enumerate() {
        let before = token(&held);
        assert!(held.extensions().get::<Fence>().unwrap().is_held());
        drop(held);
        let began = clock::now();
        let next = loop {
            let next = theirs.clone().oneshot(order(id)).await.unwrap();
            if next.status() == 200 {
                break next;
            }
            assert!(clock::now() - began < LONG, "{id} is not given back");
            sleep(Duration::from_millis(2)).await;
        };
        assert!(token(&next) > before);
    }
}

/// A lease is extended on another node than the one that granted it, and lost
/// only with the node that has it.
#[tokio::test]
async fn a_lease_outlasts_a_move_and_ends_with_its_node() {
    let mut cluster = Cluster::start().await;
    let config = Config::cluster(cluster.urls()).timeout(Duration::from_millis(250));
    let redis = Redis::from_config(config).unwrap();
    let layer = process(&redis).ttl(Duration::from_millis(1500));
    let service = layer.build().unwrap().layer(service_fn(serve));
    let held = service.clone().oneshot(order(1)).await.unwrap();
    let fence = held.extensions().get::<Fence>().unwrap().clone();
    for _ in 0..3 {
        cluster.move_all().await;
        sleep(Duration::from_millis(800)).await;
        assert!(fence.is_held());
    }
    let keys = cluster.keys().await;
    let owner = cluster.owner(&keys[0]).await;
    cluster.node_mut(owner).kill();
    let began = clock::now();
    fence.lost().await;
    let took = clock::now() - began;
    assert!(took < Duration::from_secs(4), "{took:?}");
    let others = async {
        let began = clock::now();
        for id in 2..40 {
            let status = service.clone().oneshot(order(id)).await.unwrap().status();
            assert!(status == 200 || status == 503, "{status}");
            if status == 200 {
                return;
            }
        }
        panic!("in {:?} none of the others", clock::now() - began);
    };
    others.await;
}
