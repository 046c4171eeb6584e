//! What the signing layer logs.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use buttress_core::testing::web::ScriptedBody;
use buttress_webhook::{Secret, SignLayer, Signer, Standard, WholeBody};
use http::{HeaderValue, Request, Response};
use tower::{Layer, ServiceExt, service_fn};
use tracing::{Event, Metadata, Subscriber, field, span, subscriber::set_default};

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
    fn record_error(&mut self, field: &field::Field, value: &(dyn std::error::Error + 'static)) {
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

#[tokio::test]
async fn what_is_not_signed_is_logged() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);

    let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let signer = Signer::new(Standard::new(), [secret]).unwrap();
    let layer = SignLayer::builder(signer)
        .name("orders")
        .max_body(2)
        .build();
    let service = layer
        .unwrap()
        .layer(service_fn(async |_: Request<WholeBody>| {
            Ok::<_, Infallible>(Response::new(()))
        }));
    let send = async |body: ScriptedBody, id: &'static str| {
        let mut request = Request::new(body);
        let id = HeaderValue::from_static(id);
        request.headers_mut().insert("webhook-id", id);
        let _ = service.clone().oneshot(request).await;
    };
    send(ScriptedBody::new().data("{}"), "evt").await;
    send(ScriptedBody::new().data("confidential"), "evt").await;
    send(ScriptedBody::new().fail("reset"), "evt").await;
    send(ScriptedBody::new(), "e.v.t").await;
    assert_eq!(
        *lines.lock().unwrap(),
        [
            "DEBUG message=not signed name=orders result=too_large \
             error=the body is longer than the 2 bytes that are signed (orders)",
            "DEBUG message=not signed name=orders result=body \
             error=the body broke off before it was signed (orders) cause=reset",
            "DEBUG message=not signed name=orders result=unsignable \
             error=the request cannot be signed (orders) \
             cause=the message's id cannot be signed by this scheme",
        ]
    );
}
