//! What is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    deadline::Deadline,
    testing::web::{self, ScriptedBody},
};
use buttress_timeout::TimeoutLayer;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
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

#[tokio::test(start_paused = true)]
async fn what_is_logged_is_plain() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);

    let layer = TimeoutLayer::builder()
        .name("api")
        .limit(Duration::from_millis(1500))
        .to_the_end()
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |request: Request<Full<Bytes>>| {
        let body = match request.uri().path() {
            "/hangs" => pending().await,
            "/stalls" => ScriptedBody::new().hang(),
            _ => ScriptedBody::new(),
        };
        Ok::<_, Infallible>(Response::new(body))
    }));
    let mut late = web::get("/");
    Deadline::after(Duration::ZERO).attach(late.extensions_mut());
    for request in [
        web::get("/"),
        web::get("/hangs"),
        web::get("/stalls?secret"),
        late,
    ] {
        let response = service.clone().oneshot(request).await.unwrap();
        let _ = response.into_body().collect().await;
    }
    assert_eq!(
        *lines.lock().unwrap(),
        [
            "DEBUG message=timed out name=api stage=response after_ms=1500",
            "DEBUG message=timed out name=api stage=body after_ms=1500",
            "DEBUG message=timed out name=api stage=call after_ms=0",
        ]
    );
}
