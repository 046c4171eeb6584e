//! A gRPC service without a `.proto`, whose messages are bytes: both sides talk
//! as long as they like, by tonic's own client and server.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use tokio::sync::mpsc;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::tokio_stream::Stream,
    server::NamedService,
    transport::Channel,
};
use tower::Service;

pub(crate) const PATH: &str = "/test.v1.Talk/Talk";

/// What a handler says.
pub(crate) type Say = mpsc::Sender<Result<Bytes, Status>>;

#[derive(Clone, Copy)]
struct Plain;

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

struct Messages<T>(mpsc::Receiver<T>);

impl<T> Stream for Messages<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.poll_recv(cx)
    }
}

/// The service: the answer ends, with status OK, when the handler does.
#[derive(Clone)]
pub(crate) struct Talk<H>(pub(crate) H);

impl<H> NamedService for Talk<H> {
    const NAME: &'static str = "test.v1.Talk";
}

impl<H, F> Service<http::Request<Body>> for Talk<H>
where
    H: Fn(Request<Streaming<Bytes>>, Say) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let handler = self.0.clone();
        let call = tower::service_fn(move |request| {
            let (say, said) = mpsc::channel(1);
            tokio::spawn(handler(request, say));
            ready(Ok::<_, Status>(Response::new(Messages(said))))
        });
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Plain);
            Ok(grpc.streaming(call, request).await)
        })
    }
}

/// Opens a conversation: what is said, and what is heard.
pub(crate) async fn talk(
    channel: Channel,
) -> Result<(mpsc::Sender<Bytes>, Streaming<Bytes>), Status> {
    let (say, said) = mpsc::channel(1);
    let mut client = tonic::client::Grpc::new(channel);
    let gone = |error| Status::unavailable(format!("{error}"));
    client.ready().await.map_err(gone)?;
    let (request, path) = (Messages(said), PathAndQuery::from_static(PATH));
    let answer = client.streaming(Request::new(request), path, Plain);
    let answer = answer.await?;
    Ok((say, answer.into_inner()))
}
