//! A gRPC server with a limit, which drains in the end, and a client that meets
//! it and watches its health: gRPC's own health service, so that no `.proto`
//! file is needed.
//!
//! ```text
//! cargo run --example tonic
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::time::Duration;

use buttress::{
    drain::{DrainLayer, Phase, Server, Shutdown, TcpConnectInfos},
    health::HealthRegistry,
    key::ClientIp,
    rate_limit::{Limit, Quota, RateLimitLayer},
};
use tokio::net::TcpListener;
use tonic::{service::Routes, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::ServiceBuilder;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let quota = Quota::per_second(2).burst(3);
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(quota).key(ClientIp::new()))
        .build()?;
    let shutdown = Shutdown::builder().build()?;
    let health = HealthRegistry::builder()
        .gate("drain", shutdown.clone())
        .build()?;
    let _running = health.start()?;
    // Else the drain would wait for those who watch until it cuts them off.
    let health = health.grpc_server_until(shutdown.reached(Phase::Closing));
    let service = ServiceBuilder::new()
        .layer(DrainLayer::new(&shutdown))
        .layer(limit)
        .service(Routes::new(health).prepare());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = Server::new(&shutdown);
    // So that the limiter knows who asks.
    tokio::spawn(server.serve_with(listener, TcpConnectInfos(service)));

    let channel = Channel::from_shared(format!("http://{address}"))?
        .connect()
        .await?;
    let mut client = HealthClient::new(channel);
    let watch = client.watch(HealthCheckRequest::default()).await?;
    let mut watch = watch.into_inner();
    // It says that it does not know until it has looked.
    while let Some(health) = watch.message().await? {
        if health.status() == ServingStatus::Serving {
            break;
        }
    }
    for call in 1..=4 {
        match client.check(HealthCheckRequest::default()).await {
            Ok(response) => println!("call {call}: {:?}", response.into_inner().status()),
            Err(refused) => {
                println!("call {call}: {:?}: {}", refused.code(), refused.message());
                let Some(pushback) = refused.metadata().get("grpc-retry-pushback-ms") else {
                    return Err(refused.into());
                };
                println!(
                    "         waiting {} ms, as the server asks",
                    pushback.to_str()?
                );
                let wait = Duration::from_millis(pushback.to_str()?.parse()?);
                tokio::time::sleep(wait).await;
            }
        }
    }
    // In a program that runs on, a signal says so: `Shutdown::install_signals`.
    shutdown.trigger_without_delay("nobody calls any more");
    let drain = tokio::spawn(async move { shutdown.run().await });
    loop {
        match watch.message().await {
            Ok(Some(health)) => println!("the watch: {:?}", health.status()),
            Ok(None) => break,
            Err(end) => println!("the watch: {:?}, {}", end.code(), end.message()),
        }
    }
    println!("{}", drain.await?);
    Ok(())
}
