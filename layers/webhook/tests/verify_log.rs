//! What is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::testing::{settle, web};
use buttress_webhook::{
    Claim, ClaimKey, ClaimToken, Message, OnStoreError, ReplayStore, Secret, Signer, Standard,
    StoreFuture, VerifyLayer, WholeBody, lookup_fn,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn};
use tracing::{Event, Metadata, Subscriber, field, span, subscriber::set_default};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NOW: u64 = 1_700_000_000;

#[derive(Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Line(Vec<String>);

impl field::Visit for Line {
    fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
        self.0.push(format!("{}={value:?}", field.name()));
    }
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.0.push(format!("{}={value}", field.name()));
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("buttress")
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(vec![event.metadata().level().to_string()]);
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0.join(" "));
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Fails until it is told otherwise.
struct Store(Arc<Mutex<bool>>);

impl ReplayStore for Store {
    fn claim<'a>(&'a self, _: &'a ClaimKey, _: Duration) -> StoreFuture<'a, Claim> {
        let works = *self.0.lock().unwrap();
        Box::pin(async move {
            match works {
                true => Ok(Claim::New(ClaimToken::new(1))),
                false => Err("out of reach".into()),
            }
        })
    }
    fn complete<'a>(&'a self, _: &'a ClaimKey, _: ClaimToken, _: Duration) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn release<'a>(&'a self, _: &'a ClaimKey, _: ClaimToken) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

fn signed(id: &str) -> Request<Full<Bytes>> {
    let secret = Secret::new(SECRET).unwrap();
    let signer = Signer::new(Standard::new(), [secret]).unwrap();
    let (mut parts, ()) = Request::post("/hooks?token=hidden")
        .body(())
        .unwrap()
        .into_parts();
    let message = Message {
        id,
        timestamp: NOW,
        body: b"{}",
    };
    signer.sign(&mut parts, &message).unwrap();
    Request::from_parts(parts, Full::new(Bytes::from_static(b"{}")))
}

#[tokio::test(start_paused = true)]
async fn what_is_logged_is_plain() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);
    let take = || std::mem::take(&mut *lines.lock().unwrap());

    let handler = service_fn(async |_: Request<WholeBody>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let now = || Duration::from_secs(NOW);
    let secret = || Secret::new(SECRET).unwrap();
    let builder = || {
        VerifyLayer::builder(Standard::new())
            .name("orders")
            .wall_clock(now)
    };
    let send = async |layer: &VerifyLayer, request| {
        let response = layer.layer(handler).oneshot(request).await.unwrap();
        let status = response.status();
        response.into_body().collect().await.unwrap();
        settle().await;
        status.as_u16()
    };

    let layer = builder().secrets([secret()]).build().unwrap();
    let mut forged = signed("msg_hidden");
    *forged.body_mut() = Full::new(Bytes::from_static(b"[]"));
    assert_eq!(send(&layer, forged).await, 401);
    assert_eq!(send(&layer, signed("msg_hidden")).await, 200);
    assert_eq!(send(&layer, signed("msg_hidden")).await, 200);
    let plain = web::post("/", "");
    assert_eq!(send(&layer, plain).await, 401);
    let large = web::post("/", vec![0; 2 << 20]);
    assert_eq!(send(&layer, large).await, 413);
    assert_eq!(
        take(),
        [
            "DEBUG message=webhook refused name=orders scheme=standard reason=signature_mismatch",
            "DEBUG message=webhook repeated name=orders kind=completed",
            "DEBUG message=webhook refused name=orders scheme=standard reason=missing_id",
            "DEBUG message=webhook refused name=orders scheme=standard reason=body_too_large",
        ]
    );

    // Once when it fails, and once when it works again.
    let works = Arc::new(Mutex::new(false));
    let layer = builder()
        .secrets([secret()])
        .replay_store(Store(Arc::clone(&works)))
        .on_store_error(OnStoreError::Deny)
        .build()
        .unwrap();
    assert_eq!(send(&layer, signed("msg_hidden")).await, 503);
    assert_eq!(send(&layer, signed("msg_hidden")).await, 503);
    *works.lock().unwrap() = true;
    assert_eq!(send(&layer, signed("msg_hidden")).await, 200);
    let refused =
        "DEBUG message=webhook refused name=orders scheme=standard reason=store_unavailable";
    assert_eq!(
        take(),
        [
            "WARN message=the store of webhook claims fails name=orders operation=claim error=out of reach",
            refused,
            refused,
            "INFO message=the store of webhook claims works again name=orders",
        ]
    );

    let lookup = lookup_fn(|_| Some("hidden"), |_| async { Err("no database".into()) });
    let layer = builder().lookup(lookup).build().unwrap();
    assert_eq!(send(&layer, signed("msg_hidden")).await, 503);
    assert_eq!(send(&layer, signed("msg_hidden")).await, 503);
    let refused = "DEBUG message=webhook refused name=orders scheme=standard reason=lookup_failed";
    assert_eq!(
        take(),
        [
            "WARN message=the lookup of webhook secrets fails name=orders error=no database",
            refused,
            refused,
        ]
    );
}
