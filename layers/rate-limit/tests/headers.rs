//! What clients read: the draft's fields as a structured-field parser reads
//! them, layers within layers, refunds, shadow mode.

use std::{convert::Infallible, time::Duration};

use buttress_core::{
    Head, Refusal,
    key::{self, ExtractKeyExt, Global, Key},
    testing::{Script, Scripted, Step, advance, web},
};
use buttress_rate_limit::{
    HeaderFormat, Limit, MissingKey, Quota, RateLimitBuilder, RateLimitInfo, RateLimitLayer,
    WhenFull,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use sfv::{BareItem, List, ListEntry, Parser};
use tower::{Layer, Service, ServiceExt};

type Body = Full<Bytes>;
type Inner = Scripted<Request<Body>, Response<Body>, Infallible>;

const X: HeaderFormat = HeaderFormat::XRateLimit;
const DRAFT: HeaderFormat = HeaderFormat::Draft11;

/// An inner service that answers with the status that the path names, and
/// sends back what the limiter told it.
fn inner() -> Inner {
    let (inner, _) = Script::new()
        .otherwise(|request: &Request<Body>| {
            let status = request.uri().path().trim_start_matches('/');
            let mut response = web::response(status.parse().unwrap_or(200), "");
            if let Some(info) = request.extensions().get::<RateLimitInfo>() {
                response.extensions_mut().insert(info.clone());
            }
            Step::ok(response)
        })
        .build();
    inner
}

fn limit(quota: Quota) -> RateLimitBuilder {
    RateLimitLayer::builder()
        .limit(Limit::new(quota))
        .wall_clock(|| Duration::from_secs(1000))
}

async fn send<S, B>(service: &S, request: Request<Body>) -> Response<()>
where
    S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone,
{
    let response = service.clone().oneshot(request).await.unwrap();
    response.map(drop)
}

/// The items of a field's list: name and parameters, all of them integers.
#[track_caller]
fn items(headers: &HeaderMap, field: &str) -> Vec<(String, Vec<(String, i64)>)> {
    let lines: Vec<_> = headers
        .get_all(field)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    let list: List = Parser::new(&lines.join(&b", "[..]))
        .parse()
        .unwrap_or_else(|error| panic!("{field}: {error}, of {headers:?}"));
    list.into_iter()
        .map(|entry| {
            let ListEntry::Item(item) = entry else {
                panic!("{field} holds an inner list");
            };
            let BareItem::String(name) = item.bare_item else {
                panic!("{field}'s item is no string: {:?}", item.bare_item);
            };
            let params = item.params.into_iter().map(|(key, value)| {
                let BareItem::Integer(value) = value else {
                    panic!("{field}: {key} is no integer");
                };
                (key.to_string(), value.into())
            });
            (name.to_string(), params.collect())
        })
        .collect()
}

fn item(name: &str, params: [(&str, i64); 2]) -> (String, Vec<(String, i64)>) {
    let params = params.map(|(key, value)| (key.to_owned(), value));
    (name.to_owned(), params.into())
}

/// The X- headers: limit, remaining, seconds from the wall clock's 1000.
#[track_caller]
fn x(response: &Response<()>) -> (u64, u64, u64) {
    let number = |name| {
        let mut values = response.headers().get_all(name).iter();
        let value = values.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(values.next().is_none(), "{name} twice");
        value.to_str().unwrap().parse::<u64>().unwrap()
    };
    (
        number("x-ratelimit-limit"),
        number("x-ratelimit-remaining"),
        number("x-ratelimit-reset") - 1000,
    )
}

#[tokio::test(start_paused = true)]
async fn the_draft_is_a_list_of_strings_with_integers() {
    let odd = r#"a "b\c"; d, e=f"#;
    let service = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(3).burst(5)).name(odd))
        .limit(Limit::new(Quota::per_hour(100)).name("hour"))
        .headers([DRAFT])
        .build()
        .unwrap()
        .layer(inner());
    let response = send(&service, web::get("/")).await;
    let headers = response.headers();
    assert_eq!(
        items(headers, "ratelimit-policy"),
        // 5 at 3 a second are back in 1.67 s.
        [
            item(odd, [("q", 5), ("w", 2)]),
            item("hour", [("q", 100), ("w", 3600)])
        ],
    );
    assert_eq!(
        items(headers, "ratelimit"),
        [
            item(odd, [("r", 4), ("t", 1)]),
            item("hour", [("r", 99), ("t", 36)])
        ],
    );
    // Only what was asked for.
    assert!(!headers.contains_key("x-ratelimit-limit"));
    assert!(!headers.contains_key("access-control-expose-headers"));

    for _ in 0..4 {
        send(&service, web::get("/")).await;
    }
    let refused = send(&service, web::get("/")).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(
        items(refused.headers(), "ratelimit"),
        [
            item(odd, [("r", 0), ("t", 1)]),
            item("hour", [("r", 95), ("t", 36)])
        ],
    );
    // Retry-After must not come before t.
    assert_eq!(refused.headers()["retry-after"], "1");
}

/// What the draft says of a limit that nothing was spent of.
#[tokio::test(start_paused = true)]
async fn a_whole_quota_in_the_draft() {
    let service = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_minute(6)).cost(0))
        .headers([X, DRAFT])
        .wall_clock(|| Duration::from_secs(1000))
        .build()
        .unwrap()
        .layer(inner());
    let response = send(&service, web::get("/")).await;
    assert_eq!(
        items(response.headers(), "ratelimit"),
        [item("default", [("r", 6), ("t", 0)])]
    );
    assert_eq!(x(&response), (6, 6, 0));
}

#[tokio::test(start_paused = true)]
async fn nested_layers_show_the_tightest_and_append_the_draft() {
    let layer = |name: &'static str, quota| {
        RateLimitLayer::builder()
            .limit(Limit::new(quota).name(name))
            .headers([X, DRAFT])
            .wall_clock(|| Duration::from_secs(1000))
            .build()
            .unwrap()
    };
    let tight = Quota::new(3, Duration::from_secs(30));
    let loose = Quota::new(10, Duration::from_secs(10));
    for (outer, inside) in [(tight, loose), (loose, tight)] {
        let service = layer("outer", outer).layer(layer("inner", inside).layer(inner()));
        for left in [2, 1, 0] {
            let response = send(&service, web::get("/")).await;
            assert_eq!(x(&response), (3, left, 10 * (3 - left)));
            let names = |field| -> Vec<_> {
                items(response.headers(), field)
                    .into_iter()
                    .map(|(name, _)| name)
                    .collect()
            };
            assert_eq!(names("ratelimit"), ["inner", "outer"]);
            assert_eq!(names("ratelimit-policy"), ["inner", "outer"]);
        }
        let refused = send(&service, web::get("/")).await;
        assert_eq!(refused.status(), 429);
        assert_eq!(x(&refused), (3, 0, 30));
        assert_eq!(refused.headers()["retry-after"], "10");
        assert_eq!(refused.headers().get_all("retry-after").iter().count(), 1);
    }
}

/// As many left: what takes longer to be whole is the tighter.
#[tokio::test(start_paused = true)]
async fn ties_go_to_the_later_reset() {
    let (minute, hour) = (Quota::per_minute(2), Quota::per_hour(2));
    for (outer, inside) in [(minute, hour), (hour, minute)] {
        let nested = limit(outer)
            .build()
            .unwrap()
            .layer(limit(inside).build().unwrap().layer(inner()));
        assert_eq!(x(&send(&nested, web::get("/")).await), (2, 1, 1800));

        let together = RateLimitLayer::builder()
            .limit(Limit::new(outer).name("outer"))
            .limit(Limit::new(inside).name("inner"))
            .wall_clock(|| Duration::from_secs(1000))
            .build()
            .unwrap()
            .layer(inner());
        assert_eq!(x(&send(&together, web::get("/")).await), (2, 1, 1800));
    }
}

/// What an upstream or a handler sends under these names is a limit further
/// in, or else junk.
#[tokio::test(start_paused = true)]
async fn headers_of_the_inner_service() {
    for (theirs, expected) in [
        (
            [("limit", "7"), ("remaining", "1"), ("reset", "5000")],
            (7, 1, 4000),
        ),
        (
            [("limit", "7"), ("remaining", "60"), ("reset", "5000")],
            (10, 9, 1),
        ),
        (
            [("limit", "x"), ("remaining", "many"), ("reset", "soon")],
            (10, 9, 1),
        ),
    ] {
        let service = limit(Quota::per_second(10))
            .build()
            .unwrap()
            .layer(tower::service_fn(move |_: Request<Body>| async move {
                let mut response = web::response(200, "");
                for (name, value) in theirs {
                    let name = format!("x-ratelimit-{name}");
                    let name: ::http::HeaderName = name.parse().unwrap();
                    response.headers_mut().append(name, value.parse().unwrap());
                }
                Ok::<_, Infallible>(response)
            }));
        assert_eq!(x(&send(&service, web::get("/")).await), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn headers_are_exposed_to_scripts_beside_what_is_exposed_already() {
    let layer = |formats: &[HeaderFormat]| {
        RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_minute(1)))
            .headers(formats.iter().copied())
            .expose_headers(true)
            .build()
            .unwrap()
    };
    let exposing = tower::service_fn(async |_: Request<Body>| {
        let mut response = web::response(200, "");
        let exposed = "etag".parse().unwrap();
        response
            .headers_mut()
            .insert("access-control-expose-headers", exposed);
        Ok::<_, Infallible>(response)
    });
    let exposed = |response: &Response<()>| -> Vec<String> {
        let lines = response
            .headers()
            .get_all("access-control-expose-headers")
            .iter();
        let names = lines.flat_map(|line| line.to_str().unwrap().split(','));
        names.map(|name| name.trim().to_ascii_lowercase()).collect()
    };
    let service = layer(&[X, DRAFT]).layer(exposing);
    for status in [200, 429] {
        let response = send(&service, web::get("/")).await;
        assert_eq!(response.status(), status);
        let names = exposed(&response);
        // Whatever is sent can be read.
        for name in response.headers().keys().map(::http::HeaderName::as_str) {
            let ours = name.contains("ratelimit") || name == "retry-after";
            assert!(
                !ours || names.iter().any(|exposed| exposed == name),
                "{name}"
            );
        }
        assert_eq!(names.contains(&"etag".to_owned()), status == 200);
    }
}

/// Only failed logins count: five of them.
#[tokio::test(start_paused = true)]
async fn five_failed_logins() {
    let layer = limit(Quota::new(5, Duration::from_secs(50)))
        .headers([X, DRAFT])
        .refund_if(|status, _| status.is_success())
        .build()
        .unwrap();
    let (handle, service) = (layer.handle(), layer.layer(inner()));
    // What succeeds is free, and the headers say so.
    for _ in 0..20 {
        let response = send(&service, web::get("/200")).await;
        assert_eq!(x(&response), (5, 5, 0));
        assert_eq!(
            items(response.headers(), "ratelimit"),
            [item("default", [("r", 5), ("t", 0)])]
        );
    }
    assert_eq!(handle.keys("default").unwrap(), 0);
    for left in (0..5).rev() {
        let response = send(&service, web::get("/401")).await;
        assert_eq!(response.status(), 401);
        assert_eq!(x(&response), (5, left, 10 * (5 - left)));
        if left == 2 {
            let response = send(&service, web::get("/204")).await;
            assert_eq!(x(&response), (5, 2, 30));
        }
    }
    // The right password comes too late.
    let refused = send(&service, web::get("/200")).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "10");
    advance(Duration::from_secs(10)).await;
    let response = send(&service, web::get("/200")).await;
    assert_eq!(x(&response), (5, 1, 40));
}

/// A refund gives back no more than was charged, to all limits, and not to
/// those that did not apply.
#[tokio::test(start_paused = true)]
async fn refunds_go_to_every_limit_that_was_charged() {
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_hour(10)).name("a").cost(3))
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("b")
                .key(key::header("x-b"))
                .missing_key(MissingKey::Skip),
        )
        .refund_if(|status, _| status == 304)
        .build()
        .unwrap();
    let (handle, service) = (layer.handle(), layer.layer(inner()));
    let left = |limit, key: &Key| handle.usage(limit, key).unwrap().remaining;
    let b = key::header("x-b").key("1");
    let with_b = |path| {
        let mut request = web::get(path);
        request.headers_mut().insert("x-b", "1".parse().unwrap());
        request
    };
    send(&service, with_b("/200")).await;
    assert_eq!((left("a", &Key::global()), left("b", &b)), (7, 9));
    send(&service, with_b("/304")).await;
    assert_eq!((left("a", &Key::global()), left("b", &b)), (7, 9));
    send(&service, web::get("/304")).await;
    assert_eq!((left("a", &Key::global()), left("b", &b)), (7, 9));
    handle.refund("b", &b, 100).unwrap();
    assert_eq!(left("b", &b), 10);
}

/// An inner service that fails, or a client that goes away, gets nothing back.
#[tokio::test(start_paused = true)]
async fn without_a_response_there_is_no_refund() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, &str>::new()
        .then(Step::err("reset"))
        .then(Step::hang())
        .build();
    let layer = limit(Quota::per_hour(5))
        .refund_if(|_, _| true)
        .build()
        .unwrap();
    let mut service = layer.layer(inner);
    assert_eq!(
        service
            .ready()
            .await
            .unwrap()
            .call(web::get("/"))
            .await
            .err(),
        Some("reset")
    );
    drop(service.ready().await.unwrap().call(web::get("/")));
    let usage = layer.handle().usage("default", &Key::global()).unwrap();
    assert_eq!(usage.remaining, 3);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn shadow_mode_charges_and_refuses_nobody_and_says_nothing() {
    let layer = limit(Quota::per_hour(2))
        .shadow(true)
        .headers([X, DRAFT])
        .expose_headers(true)
        .info(true)
        .build()
        .unwrap();
    let service = layer.layer(inner());
    for sent in 1..10 {
        let response = send(&service, web::get("/")).await;
        assert_eq!(response.status(), 200);
        assert!(response.headers().is_empty(), "{:?}", response.headers());
        let usage = layer.handle().usage("default", &Key::global()).unwrap();
        assert_eq!(usage.remaining, 2_u32.saturating_sub(sent));
    }
}

/// What would be refused for another reason passes, too.
#[tokio::test(start_paused = true)]
async fn shadow_mode_lets_everything_by() {
    for limit in [
        Limit::new(Quota::per_hour(1)).cost_by(|_| 2),
        Limit::new(Quota::per_hour(1))
            .key(key::header("x-user"))
            .missing_key(MissingKey::Refuse),
    ] {
        let layer = RateLimitLayer::builder().limit(limit).shadow(true);
        let service = layer.build().unwrap().layer(inner());
        let response = send(&service, web::get("/")).await;
        assert_eq!(response.status(), 200);
        assert!(response.headers().is_empty());
    }
}

/// Shadow mode tries a rule out, the whole of it.
#[tokio::test(start_paused = true)]
async fn shadow_mode_gives_refunds() {
    let layer = limit(Quota::per_hour(2))
        .shadow(true)
        .refund_if(|status, _| status == 200)
        .build()
        .unwrap();
    let service = layer.layer(inner());
    for (path, left) in [
        ("/200", 2),
        ("/401", 1),
        ("/200", 1),
        ("/401", 0),
        ("/200", 0),
    ] {
        let response = send(&service, web::get(path)).await;
        assert!(response.headers().is_empty());
        let usage = layer.handle().usage("default", &Key::global()).unwrap();
        assert_eq!(usage.remaining, left);
    }
}

#[tokio::test(start_paused = true)]
async fn handlers_are_told_where_asked() {
    let told = |info| {
        let service = limit(Quota::per_minute(6))
            .info(info)
            .headers([])
            .build()
            .unwrap();
        let service = service.layer(inner());
        async move {
            send(&service, web::get("/")).await;
            let response = send(&service, web::get("/")).await;
            assert!(response.headers().is_empty());
            response.extensions().get::<RateLimitInfo>().cloned()
        }
    };
    let info = told(true).await.unwrap();
    assert_eq!((&*info.name, info.limit, info.remaining), ("default", 6, 4));
    assert_eq!(info.reset_after, Duration::from_secs(20));
    assert_eq!(told(false).await, None);
}

#[tokio::test(start_paused = true)]
async fn who_has_no_key() {
    for (missing, statuses) in [
        (MissingKey::Share, [200, 429]),
        (MissingKey::Refuse, [400, 400]),
        (MissingKey::Skip, [200, 200]),
    ] {
        let by_user = Limit::new(Quota::per_hour(1))
            .key(key::header("x-user"))
            .missing_key(missing);
        let service = RateLimitLayer::builder()
            .limit(by_user)
            .build()
            .unwrap()
            .layer(inner());
        for status in statuses {
            let response = send(&service, web::get("/")).await;
            assert_eq!(response.status(), status, "{missing:?}");
            // Where nothing was decided, nothing is told.
            let decided = missing == MissingKey::Share;
            assert_eq!(
                response.headers().contains_key("x-ratelimit-limit"),
                decided
            );
        }
        // A value that says so does not share with those who have none.
        let mut request = web::get("/");
        request.headers_mut().insert("x-user", "u".parse().unwrap());
        assert_eq!(send(&service, request).await.status(), 200);
    }
}

#[tokio::test(start_paused = true)]
async fn when_there_is_no_room_for_a_new_key() {
    let by_user = Limit::new(Quota::per_hour(2))
        .key(key::header("x-user").or(Global))
        .max_keys(1)
        .when_full(WhenFull::Refuse);
    let layer = RateLimitLayer::builder().limit(by_user).build().unwrap();
    let service = layer.layer(inner());
    let by = |user: &str| {
        let mut request = web::get("/");
        request
            .headers_mut()
            .insert("x-user", user.parse().unwrap());
        send(&service, request)
    };
    assert_eq!(by("first").await.status(), 200);
    let refused = by("second").await;
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(by("first").await.status(), 200);
    assert_eq!(layer.handle().evicted("default").unwrap(), 0);
    // The first is whole again, and makes room.
    advance(Duration::from_secs(3600)).await;
    assert_eq!(by("second").await.status(), 200);
}

#[tokio::test(start_paused = true)]
async fn grpc_is_refused_in_its_own_words() {
    let service = limit(Quota::new(1, Duration::from_micros(1_234_500)))
        .build()
        .unwrap();
    let service = service.layer(inner());
    send(&service, web::grpc("/200")).await;
    let refused = send(&service, web::grpc("/200")).await;
    assert_eq!(refused.status(), 200);
    let headers = refused.headers();
    assert_eq!(headers["grpc-status"], "8");
    assert_eq!(headers["grpc-retry-pushback-ms"], "1235");
    assert!(!headers.contains_key("retry-after"));
    assert_eq!(x(&refused), (1, 0, 2));
}

#[tokio::test(start_paused = true)]
async fn a_responder_of_ones_own_gets_the_headers_added() {
    let layer = limit(Quota::per_minute(1))
        .responder(|refusal: &Refusal, request: Head<'_>| {
            let text = format!(
                "{} {}",
                request.uri.path(),
                refusal.retry_after_secs().unwrap()
            );
            Response::builder()
                .status(420)
                .header("x-own", "1")
                .body(text.into())
                .unwrap()
        })
        .build()
        .unwrap();
    let service = layer.layer(inner());
    send(&service, web::get("/a")).await;
    let refused = service.clone().oneshot(web::get("/b")).await.unwrap();
    assert_eq!(refused.status(), 420);
    assert_eq!(refused.headers()["x-own"], "1");
    assert_eq!(refused.headers()["x-ratelimit-remaining"], "0");
    assert_eq!(web::text(refused).await, "/b 60");
}

/// The draft's problem type has a member for it; without the draft's headers
/// nobody was told of policies, and the document is the shorter one.
#[tokio::test(start_paused = true)]
async fn the_problem_names_the_policy_that_was_violated() {
    let violated = async |formats: &[HeaderFormat]| {
        let layer = RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_second(9)).name("wide"))
            .limit(Limit::new(Quota::per_second(1)).name("tight"))
            .headers(formats.iter().copied())
            .build()
            .unwrap();
        let service = layer.layer(inner());
        send(&service, web::get("/")).await;
        let refused = service.oneshot(web::get("/")).await.unwrap();
        assert_eq!(refused.status(), 429);
        let body = refused.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        problem["violated-policies"].clone()
    };
    assert_eq!(violated(&[X, DRAFT]).await, serde_json::json!(["tight"]));
    assert_eq!(violated(&[X]).await, serde_json::Value::Null);
}

/// A responder that says nothing of when to come back used to have the last
/// word.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_ones_own_tells_when_to_come_back() {
    let refused = async |responder: fn(&Refusal, Head<'_>) -> Response<Bytes>, content_type| {
        let layer = limit(Quota::per_minute(1)).responder(responder).build();
        let service = layer.unwrap().layer(inner());
        send(&service, web::get("/")).await;
        let mut request = web::get("/");
        let content_type = HeaderValue::from_static(content_type);
        request.headers_mut().insert("content-type", content_type);
        let response = send(&service, request).await;
        response.headers().get("retry-after").cloned()
    };
    let silent = |_: &Refusal, _: Head<'_>| Response::new(Bytes::new());
    assert_eq!(refused(silent, "text/plain").await.unwrap(), "60");
    assert_eq!(refused(silent, "application/grpc").await, None);
    let telling = |_: &Refusal, _: Head<'_>| {
        let response = Response::builder().header("retry-after", "99");
        response.body(Bytes::new()).unwrap()
    };
    assert_eq!(refused(telling, "text/plain").await.unwrap(), "99");
}
