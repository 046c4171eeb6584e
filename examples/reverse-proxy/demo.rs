//! What there is to see without a file: an upstream that does as it is told,
//! and a route to it with every layer on.

use std::{
    convert::Infallible,
    io::{self, Write},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Either, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    net::TcpListener,
    time::{Interval, interval},
};

use crate::settings::{
    Budget, CircuitBreaker, Count, LimitHeaders, RateLimit, Retry, Route, SignWebhook, Span,
    VerifyWebhook,
};

/// The demo's routes: one for all, and one that takes only what is signed.
pub(crate) fn routes(upstream: SocketAddr) -> [Route; 2] {
    let sound = "this source is";
    let all = route(upstream);
    let hooks = Route {
        name: "hooks".parse().expect(sound),
        path: "/hooks".parse().expect(sound),
        strip_prefix: true,
        circuit_breaker: None,
        verify_webhook: Some(VerifyWebhook {
            scheme: "sha256".parse().expect(sound),
            secrets: vec!["demo-secret".parse().expect(sound)],
            tolerance: Span::secs(300),
            replay_protection: None,
            on_store_error: "deny".parse().expect(sound),
        }),
        sign_webhook: Some(SignWebhook {
            scheme: "standard".parse().expect(sound),
            secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
                .parse()
                .expect(sound),
        }),
        ..all.clone()
    };
    [all, hooks]
}

fn route(upstream: SocketAddr) -> Route {
    let sound = "this source is";
    Route {
        name: "demo".parse().expect(sound),
        path: "/".parse().expect(sound),
        host: None,
        strip_prefix: false,
        upstream: vec![format!("http://{upstream}").parse().expect(sound)],
        timeout: Span::secs(5),
        rate_limit: Some(RateLimit {
            limit: Count(5),
            period: Span::secs(1),
            burst: Some(Count(20)),
            key: "header:x-api-key".parse().expect(sound),
            headers: vec![LimitHeaders::XRateLimit, LimitHeaders::Draft],
            max_keys: Count(100_000),
            mode: "strict".parse().expect(sound),
            on_store_error: "local".parse().expect(sound),
        }),
        circuit_breaker: Some(CircuitBreaker {
            preset: "aggressive".parse().expect(sound),
            // Each attempt counts, and an upstream that fails half of the time
            // is not to be given up.
            failure_threshold: Some(Count(12)),
            ..CircuitBreaker::default()
        }),
        retry: Some(Retry {
            max_attempts: Some(Count(4)),
            initial_delay: Some(Span::millis(100)),
            // One person at a time: nothing to be spared.
            budget: Budget {
                percent: "100".parse().expect(sound),
                min_per_second: "10".parse().expect(sound),
            },
            ..Retry::default()
        }),
        verify_webhook: None,
        sign_webhook: None,
    }
}

/// Prints what is worth trying.
pub(crate) fn greet(listen: SocketAddr, admin: SocketAddr) -> io::Result<()> {
    let mut out = io::stdout().lock();
    write!(
        out,
        "\
A demo: five requests a second for each x-api-key or address, twenty at once; what
fails is tried again; and a circuit breaker in front of the upstream. Try

# How you stand: X-RateLimit-Limit, -Remaining and -Reset, on every answer.
curl -i 'http://{listen}/echo?hello=world'

# More than the burst: the last ones are 429, and their Retry-After can be trusted.
curl -s -o /dev/null -w '%{{http_code}} retry-after:%header{{retry-after}}\\n' 'http://{listen}/status/200?[1-25]'

# An upstream that fails half of the time: with four attempts it is one request in sixteen.
curl -s -o /dev/null -w '%{{http_code}} after %{{time_total}} s\\n' -H 'x-api-key: another' 'http://{listen}/flaky/50?[1-10]'

# Twelve failed attempts in a row open the circuit breaker: the upstream is not asked again for
# ten seconds, whatever is wanted of it. Then one request may try.
curl -s -o /dev/null -w '%{{http_code}} retry-after:%header{{retry-after}}\\n' -H 'x-api-key: third' 'http://{listen}/status/500?[1-5]'

# What the operator sees. A person may prefer http://{admin}/ in a browser, a scraper /metrics.
curl -s http://{admin}/breakers

"
    )?;
    out.flush()
}

/// Starts the upstream on a free loopback port.
pub(crate) async fn upstream() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let service =
                    service_fn(async |request| Ok::<_, Infallible>(answer(request).await));
                // The proxy going away is no error of the upstream's.
                let _ = builder
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    Ok(address)
}

type Answer = Response<Either<Full<Bytes>, Ticking>>;

async fn answer(request: Request<Incoming>) -> Answer {
    let path = request.uri().path().to_owned();
    let (verb, argument) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    match (verb, argument.parse::<u64>()) {
        ("status", Ok(code @ 200..=599)) => {
            let code = u16::try_from(code).expect("in range");
            text(
                StatusCode::from_u16(code).expect("in range"),
                format!("{code}\n"),
            )
        }
        ("delay", Ok(millis)) => {
            tokio::time::sleep(Duration::from_millis(millis.min(60_000))).await;
            text(StatusCode::OK, format!("after {millis} ms\n"))
        }
        ("flaky", Ok(percent)) if fastrand::u64(..100) < percent => {
            text(StatusCode::SERVICE_UNAVAILABLE, "failed\n".to_owned())
        }
        ("flaky", Ok(_)) => text(StatusCode::OK, "succeeded\n".to_owned()),
        ("stream", Ok(chunks)) => Response::new(Either::Right(Ticking::new(chunks.min(100_000)))),
        ("echo", _) => echo(request).await,
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /status/{code}, /delay/{ms}, /flaky/{percent}, /stream/{chunks} and /echo\n"
                .to_owned(),
        ),
    }
}

fn text(status: StatusCode, text: String) -> Answer {
    let mut response = Response::new(Either::Left(Full::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// The request as it arrived here: what the proxy made of it.
async fn echo(request: Request<Incoming>) -> Answer {
    let mut echo = format!(
        "{} {} {:?}\n",
        request.method(),
        request.uri(),
        request.version()
    );
    for (name, value) in request.headers() {
        echo += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
    }
    let Ok(body) = http_body_util::Limited::new(request.into_body(), 1 << 20)
        .collect()
        .await
    else {
        return text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "more than can be echoed\n".to_owned(),
        );
    };
    echo += "\n";
    echo += &String::from_utf8_lossy(&body.to_bytes());
    text(StatusCode::OK, echo)
}

/// A line every tenth of a second.
struct Ticking {
    next: u64,
    chunks: u64,
    tick: Interval,
}

impl Ticking {
    fn new(chunks: u64) -> Self {
        Self {
            next: 0,
            chunks,
            tick: interval(Duration::from_millis(100)),
        }
    }
}

impl Body for Ticking {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.next == self.chunks {
            return Poll::Ready(None);
        }
        ready!(self.tick.poll_tick(cx));
        self.next += 1;
        let line = format!("chunk {} of {}\n", self.next, self.chunks);
        Poll::Ready(Some(Ok(Frame::data(line.into()))))
    }
}
