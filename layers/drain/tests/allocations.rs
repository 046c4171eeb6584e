//! What a request costs on the server, beside hyper alone.

use std::{
    convert::Infallible,
    io,
    task::{Context, Poll},
};

use buttress_drain::{Listener, Server, Shutdown};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    runtime::{Builder, Runtime},
};

struct One(Option<DuplexStream>);

impl Listener for One {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, _: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        match self.0.take() {
            Some(io) => Poll::Ready(Ok((io, ()))),
            None => Poll::Pending,
        }
    }
}

async fn hello(_: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

/// One request and its answer.
async fn round(client: &mut DuplexStream) {
    let request = b"GET / HTTP/1.1\r\nhost: test\r\naccept: */*\r\n\r\n";
    client.write_all(request).await.unwrap();
    let mut answer = [0; 512];
    let mut read = 0;
    while !answer[..read].ends_with(b"hello") {
        read += client.read(&mut answer[read..]).await.unwrap();
    }
}

/// How often the thread allocates in 200 requests, once it has settled.
fn allocations(runtime: &Runtime, mut client: DuplexStream) -> u64 {
    let mut rounds = |n| {
        runtime.block_on(async {
            for _ in 0..n {
                round(&mut client).await;
            }
        });
    };
    rounds(100);
    allocation_counter::measure(|| rounds(200)).count_total
}

#[test]
fn a_request_costs_no_allocation_beyond_hypers() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();

    let hyper = runtime();
    let (client, server) = duplex(4096);
    hyper.spawn(async move {
        let service = hyper::service::service_fn(hello);
        hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(server), service)
            .await
    });
    let bare = allocations(&hyper, client);

    let ours = runtime();
    let (client, server) = duplex(4096);
    let shutdown = Shutdown::builder().build().unwrap();
    let server = Server::new(&shutdown).serve(One(Some(server)), tower::service_fn(hello));
    ours.spawn(server);
    let counted = allocations(&ours, client);

    assert!(counted <= bare, "{counted}, where hyper has {bare}");
}
