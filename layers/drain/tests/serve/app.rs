//! What is served.

use std::{convert::Infallible, future::Future, pin::Pin, time::Duration};

use buttress_core::BoxError;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Channel, Empty, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, copy},
    time::sleep,
};
use tower::Service;

pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

pub(crate) fn app()
-> impl Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future = Answer>
+ Clone
+ Send
+ 'static {
    app_of()
}

/// For bodies of a framework's own.
pub(crate) fn app_of<B>()
-> impl Service<Request<B>, Response = Response<Body>, Error = Infallible, Future = Answer>
+ Clone
+ Send
+ Sync
+ 'static
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    tower::service_fn(|request: Request<B>| -> Answer {
        Box::pin(async move { Ok(answer(request).await) })
    })
}

pub(crate) fn text(text: impl Into<Bytes>) -> Body {
    let full = Full::new(text.into()).map_err(|never| match never {});
    UnsyncBoxBody::new(full)
}

fn empty() -> Body {
    UnsyncBoxBody::new(Empty::new().map_err(|never| match never {}))
}

/// `/slow/300` takes 300 ms.
fn number(path: &str) -> u64 {
    let last = path.rsplit('/').next().unwrap_or_default();
    last.parse().unwrap_or_default()
}

async fn answer<B>(mut request: Request<B>) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let path = request.uri().path().to_owned();
    let connect = request.method() == Method::CONNECT;
    let status = |status| Response::builder().status(status).body(empty()).unwrap();
    match path.split('/').nth(1).unwrap_or_default() {
        "slow" => {
            sleep(Duration::from_millis(number(&path))).await;
            Response::new(text("slow"))
        }
        "full" => {
            let bytes: Vec<u8> = (0..number(&path) as usize).map(byte).collect();
            Response::new(text(bytes))
        }
        "pause" => Response::new(pause(number(&path))),
        "paced" => Response::new(paced(number(&path))),
        "events" => Response::builder()
            .header(header::CONTENT_TYPE, "text/event-stream")
            .body(endless())
            .unwrap(),
        "echo" => {
            let body = request.into_body().map_err(Into::into);
            Response::new(UnsyncBoxBody::new(body))
        }
        "endless" => Response::new(endless()),
        "panic" => panic!("as it was asked to"),
        "nothing" => status(StatusCode::NO_CONTENT),
        "same" => status(StatusCode::NOT_MODIFIED),
        // With a body that such an answer has not.
        "odd" => {
            let status = u16::try_from(number(&path)).unwrap();
            let odd = Response::builder().status(status);
            odd.body(endless()).unwrap()
        }
        "size" => match request.into_body().collect().await {
            Ok(body) => Response::new(text(body.to_bytes().len().to_string())),
            Err(_) => status(StatusCode::BAD_REQUEST),
        },
        "ignored" => Response::new(text("ignored")),
        "tunnel" => {
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                let _ = copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            if connect {
                let label = buttress_drain::Label::from("/tunnel");
                return Response::builder().extension(label).body(empty()).unwrap();
            }
            Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header(header::CONNECTION, "upgrade")
                .header(header::UPGRADE, "echo")
                .extension(buttress_drain::Label::from("/tunnel"))
                .body(empty())
                .unwrap()
        }
        _ => Response::new(text("hello")),
    }
}

/// Byte `n` of a download.
pub(crate) const fn byte(n: usize) -> u8 {
    (n.wrapping_mul(31) >> 3) as u8
}

/// So many bytes, 64 KiB at a time, with a pause after every few.
fn paced(bytes: u64) -> Body {
    let (mut sender, body) = Channel::<Bytes, BoxError>::new(1);
    tokio::spawn(async move {
        let bytes = usize::try_from(bytes).unwrap();
        let mut sent = 0;
        while sent < bytes {
            let next = bytes.min(sent + 64 * 1024);
            let data: Vec<u8> = (sent..next).map(byte).collect();
            if sender.send_data(data.into()).await.is_err() {
                return;
            }
            sent = next;
            sleep(Duration::from_millis(3)).await;
        }
    });
    UnsyncBoxBody::new(body)
}

/// Two frames, and so many milliseconds between them.
fn pause(millis: u64) -> Body {
    let (mut sender, body) = Channel::<Bytes, BoxError>::new(1);
    tokio::spawn(async move {
        let _ = sender.send_data("slow".into()).await;
        sleep(Duration::from_millis(millis)).await;
        let _ = sender.send_data("slow".into()).await;
    });
    UnsyncBoxBody::new(body)
}

/// A tick every 20 ms, whatever happens.
fn endless() -> Body {
    let (mut sender, body) = Channel::<Bytes, BoxError>::new(1);
    tokio::spawn(async move {
        while sender.send_data("data: tick\n\n".into()).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    UnsyncBoxBody::new(body)
}
