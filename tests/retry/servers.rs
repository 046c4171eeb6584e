//! Servers that are clients: an axum handler, and a forwarder of what hyper
//! reads.

use std::{convert::Infallible, sync::Arc};

use axum::{Router, body::Body, extract::State, http::Uri, routing::any};
use buttress::{
    circuit_breaker::CircuitBreakerLayer,
    retry::{Cause, ReplayBody, RetryLayer},
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, channel::Channel};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::{self, Client},
    rt::{TokioExecutor, TokioIo},
};
use tokio::sync::oneshot;
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};

use crate::support::{
    Act, BoxBody, Caller, MS, UNAVAILABLE, accept, attempts, http1, listen, payload, run, until,
};

type Remote = BoxCloneSyncService<Request<Body>, Response<Body>, legacy::Error>;

/// A whole stack over a client that wants axum's own bodies.
fn remote() -> Remote {
    let retry = RetryLayer::builder().settings(attempts(4)).build().unwrap();
    let breaker = CircuitBreakerLayer::builder().build().unwrap();
    let limit = TimeoutLayer::builder()
        .limit(500 * MS)
        .header(http::HeaderName::from_static("x-time-left"))
        .build()
        .unwrap();
    let http = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let stack = breaker
        .layer(limit.layer(http))
        .map_request(|request: Request<ReplayBody<Body>>| request.map(Body::new));
    let service = retry.layer(stack);
    BoxCloneSyncService::new(service.map_response(|response: Response<_>| response.map(Body::new)))
}

async fn forward(
    State((remote, upstream)): State<(Arc<Remote>, Uri)>,
    mut request: Request<Body>,
) -> Result<Response<Body>, StatusCode> {
    *request.uri_mut() = upstream;
    let remote = Remote::clone(&remote);
    remote
        .oneshot(request)
        .await
        .map_err(|_| StatusCode::BAD_GATEWAY)
}

#[test]
fn an_axum_handler_with_a_client() {
    run(async |bed| {
        let acts = [Act::Reset(30_000), Act::Answer(UNAVAILABLE), Act::Hang];
        let upstream = bed.upstream(acts).await;
        let uri: Uri = upstream.url().parse().unwrap();
        let router = Router::new()
            .route("/", any(forward))
            .with_state((Arc::new(remote()), uri));
        let listener = listen().await;
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, router) => served.unwrap(),
                _ = stopped => {}
            }
        });

        let data = payload(60_000);
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let request = Request::put(format!("http://{address}/"))
            .body(Full::new(data.clone()))
            .unwrap();
        let response = client.request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), data);
        assert_eq!(upstream.requests(), 4);
        for seen in upstream.seen() {
            let left: u32 = seen.header("x-time-left").unwrap().parse().unwrap();
            assert!(left <= 500);
        }
        assert_eq!(upstream.last().body, data);
        drop(stop);
        server.await.unwrap();
    });
}

/// What is read from one connection is written to another, and again.
#[test]
fn a_forwarder_of_what_it_reads() {
    run(async |bed| {
        let acts = [
            Act::Reset(700),
            Act::Reset(30_000),
            Act::Answer(UNAVAILABLE),
        ];
        let upstream = bed.upstream(acts).await;
        let caller = Caller::<Incoming>::new(http1(), attempts(5));
        let uri: Uri = upstream.url().parse().unwrap();
        let listener = listen().await;
        let address = listener.local_addr().unwrap();
        let (sends, sockets) = (caller.service.clone(), bed.clone());
        let stop = accept(listener, move |stream| {
            let (sends, uri, socket) = (sends.clone(), uri.clone(), sockets.socket());
            let service = service_fn(move |mut request: Request<Incoming>| {
                *request.uri_mut() = uri.clone();
                let service = sends.clone();
                async move {
                    let sent = service.oneshot(request).await;
                    Ok::<_, Infallible>(sent.unwrap_or_else(|_| bad_gateway()))
                }
            });
            tokio::spawn(async move {
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let _ = connection.await;
                drop(socket);
            });
        });

        let data = payload(60_000);
        let client = Client::builder(TokioExecutor::new()).build_http::<Channel<Bytes>>();
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let request = Request::put(format!("http://{address}/"))
            .body(body)
            .unwrap();
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_000)).await.unwrap();
            until("the second attempt came", || upstream.requests() == 2).await;
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(7_000));
                sender.send_data(chunk).await.unwrap();
            }
            drop(sender);
        };
        let (response, ()) = tokio::join!(client.request(request), writes);
        let response = response.unwrap();
        assert_eq!(response.status(), 200);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), data);
        assert_eq!(upstream.last().body, data);
        assert_eq!(caller.causes().len(), 3);
        assert_eq!(caller.causes()[..2], [Cause::Reset; 2]);
        drop(stop);
    });
}

/// Who asked the forwarder has gone: so has what it sent.
#[test]
fn a_client_of_the_forwarder_goes_away() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE), Act::Hang]).await;
        let caller = Caller::<Incoming>::new(http1(), attempts(5));
        let uri: Uri = upstream.url().parse().unwrap();
        let listener = listen().await;
        let address = listener.local_addr().unwrap();
        let sends = caller.service;
        let stop = accept(listener, move |stream| {
            let (sends, uri) = (sends.clone(), uri.clone());
            let service = service_fn(move |mut request: Request<Incoming>| {
                *request.uri_mut() = uri.clone();
                sends.clone().oneshot(request)
            });
            tokio::spawn(async move {
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let _ = connection.await;
            });
        });
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let request = Request::put(format!("http://{address}/"))
            .body(Full::new(payload(1_000)))
            .unwrap();
        let asks = tokio::spawn(async move { client.request(request).await.map(drop) });
        until("the second attempt hangs", || {
            upstream.requests() == 2 && upstream.request(1).whole
        })
        .await;
        asks.abort();
        assert!(asks.await.unwrap_err().is_cancelled());
        until("the connection is closed", || bed.sockets() == 0).await;
        assert_eq!(upstream.requests(), 2);
        drop(stop);
    });
}

fn bad_gateway() -> Response<BoxBody> {
    let body = Full::default().map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response
}
