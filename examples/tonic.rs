//! A gRPC server with a limit, which drains in the end, and a client that meets
//! it: gRPC's own health service, so that no `.proto` file is needed.
//!
//! ```text
//! cargo run --example tonic
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::time::Duration;

use buttress::{
    drain::{DrainLayer, Server, Shutdown, TcpConnectInfos},
    key::ClientIp,
    rate_limit::{Limit, Quota, RateLimitLayer},
};
use tokio::net::TcpListener;
use tonic::{service::Routes, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::ServiceBuilder;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(2)).key(ClientIp::new()))
        .build()?;
    let (_reporter, health) = tonic_health::server::health_reporter();
    let shutdown = Shutdown::builder().build()?;
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
    println!("{}", shutdown.run().await);
    Ok(())
}
