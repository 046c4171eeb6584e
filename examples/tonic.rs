//! A gRPC server with a limit, and a client that meets it: gRPC's own health
//! service, so that no `.proto` file is needed.
//!
//! ```text
//! cargo run --example tonic
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use buttress::{
    key::ClientIp,
    rate_limit::{Limit, Quota, RateLimitLayer},
};
use tonic::transport::{Channel, Server, server::TcpIncoming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(2)).key(ClientIp::new()))
        .build()?;
    let (_reporter, health) = tonic_health::server::health_reporter();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse()?)?;
    let address = incoming.local_addr()?;
    let server = Server::builder().layer(limit).add_service(health);
    tokio::spawn(server.serve_with_incoming(incoming));

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
                let wait = std::time::Duration::from_millis(pushback.to_str()?.parse()?);
                tokio::time::sleep(wait).await;
            }
        }
    }
    Ok(())
}
