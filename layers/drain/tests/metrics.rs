//! What is counted, under the name that the documentation gives.

use std::convert::Infallible;

use buttress_core::testing::web::{self, ScriptedBody};
use buttress_drain::{ConnectionState, DrainLayer, Hook, Shutdown};
use http::Response;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, and the value.
fn values(snapshotter: &Snapshotter) -> Vec<(String, String)> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot.into_iter().map(|(key, _, description, value)| {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        let value = match value {
            DebugValue::Counter(count) => count.to_string(),
            DebugValue::Gauge(value) => value.to_string(),
            DebugValue::Histogram(values) => format!("{values:?}"),
        };
        (name, value)
    });
    let mut values: Vec<_> = values.filter(|(_, value)| value != "[]").collect();
    values.sort();
    values
}

/// The debugging recorder starts each snapshot's numbers anew, gauges too.
#[tokio::test(start_paused = true)]
async fn in_flight_and_cut() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let shutdown = Shutdown::builder().name("orders").build().unwrap();
    // One that nobody named, and that counts for itself.
    let other = Shutdown::builder().build().unwrap();
    let idle = other.connection();
    let own = [
        ("drain_connections_open{name=default}", "1"),
        ("drain_requests_in_flight{name=default}", "0"),
    ];
    let all = values(&snapshotter);
    for (name, value) in own {
        assert!(all.contains(&(name.into(), value.into())), "{all:?}");
    }
    drop((idle, other));
    let values = |snapshotter: &_| {
        let mut values = values(snapshotter);
        values.retain(|(name, _)| !name.contains("name=default"));
        values
    };
    let handler = service_fn(async |_: http::Request<_>| {
        Ok::<_, Infallible>(Response::new(ScriptedBody::new().hang()))
    });
    let named = DrainLayer::new(&shutdown).route("/").layer(handler);
    let plain = DrainLayer::new(&shutdown).layer(handler);
    let told = |requests: &str, connections: &str, cut: [&str; 5], took: Option<&str>| {
        let kinds = ["connection", "guard", "hook", "request", "tunnel"];
        let cut = kinds.into_iter().zip(cut);
        let mut all: Vec<_> = cut
            .map(|(kind, count)| {
                (
                    format!("drain_cut_total{{name=orders,kind={kind}}}"),
                    count.to_owned(),
                )
            })
            .collect();
        all.push((
            "drain_connections_open{name=orders}".into(),
            connections.into(),
        ));
        all.extend(took.map(|took| ("drain_duration_seconds{name=orders}".into(), took.into())));
        all.push((
            "drain_requests_in_flight{name=orders}".into(),
            requests.into(),
        ));
        all.sort();
        all
    };
    let none = ["0"; 5];
    assert_eq!(values(&snapshotter), told("0", "0", none, None));

    let first = named.clone().oneshot(web::get("/")).await.unwrap();
    let _second = named.oneshot(web::get("/")).await.unwrap();
    let _third = plain.oneshot(web::get("/")).await.unwrap();
    let (connection, _idle) = (shutdown.connection(), shutdown.connection());
    connection.set_state(ConnectionState::Busy);
    assert_eq!(values(&snapshotter), told("3", "2", none, None));
    drop(first);
    let _job = shutdown.guard("job");
    shutdown.hook(Hook::new("hangs", std::future::pending::<()>));
    shutdown.trigger("test");
    let _ = shutdown.run().await;
    let cut = ["1", "1", "1", "2", "0"];
    assert_eq!(values(&snapshotter), told("-1", "0", cut, Some("[30.0]")));
    drop(connection);
    assert_eq!(
        values(&snapshotter)[0],
        ("drain_connections_open{name=orders}".into(), "-1".into())
    );
}
