use std::convert::Infallible;

use super::*;
use Verdict::{Failure, Ignored, Success};

type Head = Result<Response<()>, &'static str>;

fn http(status: u16) -> Head {
    Ok(Response::builder().status(status).body(()).unwrap())
}

fn grpc(content_type: &str, status: Option<&str>) -> Head {
    let mut response = Response::builder().header("content-type", content_type);
    if let Some(status) = status {
        response = response.header("grpc-status", status);
    }
    Ok(response.body(()).unwrap())
}

fn trailers(status: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert(GRPC_STATUS, status.parse().unwrap());
    trailers
}

/// The head's verdict, and if it was a success, that of an end with these
/// trailers.
fn judge(
    classifier: &impl Classify<Response<()>, &'static str>,
    head: &Head,
    trailers: Option<&HeaderMap>,
) -> (Verdict, Option<Verdict>) {
    let verdict = classifier.classify(head.as_ref());
    let end = (verdict == Success)
        .then(|| classifier.expects(head.as_ref().unwrap()))
        .map(|expected| classifier.classify_body(expected, BodyEnd::Complete { trailers }));
    (verdict, end)
}

#[test]
fn server_errors_are_failures_and_every_status_has_its_bit() {
    let classifier = StatusClassifier::new();
    for status in 100..1000 {
        let expected = if (500..600).contains(&status) {
            Failure
        } else {
            Success
        };
        let verdict = classifier.classify(http(status).as_ref());
        assert_eq!(verdict, expected, "{status}");
    }
    assert_eq!(classifier.classify(Err::<&Response<()>, _>(&"io")), Failure);
}

#[test]
fn statuses_are_configured() {
    let classifier = StatusClassifier::new()
        .failures([StatusCode::BAD_GATEWAY, StatusCode::TOO_MANY_REQUESTS])
        .ignored([StatusCode::BAD_GATEWAY]);
    assert_eq!(judge(&classifier, &http(429), None).0, Failure);
    assert_eq!(judge(&classifier, &http(500), None).0, Success);
    assert_eq!(judge(&classifier, &http(502), None).0, Ignored);
}

#[test]
fn grpc_codes_and_their_defaults() {
    let failures = [2, 4, 13, 14, 15];
    for (number, code) in GrpcCode::ALL.into_iter().enumerate() {
        assert_eq!(code as usize, number);
        let expected = match number {
            1 => Ignored,
            n if failures.contains(&n) => Failure,
            _ => Success,
        };
        let text = number.to_string();
        let head = grpc("application/grpc", Some(&text));
        let verdict = judge(&HttpClassifier::new(), &head, None);
        assert_eq!(verdict.0, expected, "{number} in the headers");
        let head = grpc("application/grpc+proto", None);
        let verdict = judge(&HttpClassifier::new(), &head, Some(&trailers(&text)));
        assert_eq!(verdict, (Success, Some(expected)), "{number} in trailers");
    }
}

#[test]
fn nonsense_for_a_status_is_unknown() {
    for text in ["", "x", "17", "-1", "99999999999999999999999"] {
        assert_eq!(
            GrpcCode::of(&trailers(text)),
            Some(GrpcCode::Unknown),
            "{text}"
        );
    }
    assert_eq!(GrpcCode::of(&HeaderMap::new()), None);
}

#[test]
fn trailers_only_is_final_at_the_head() {
    // What said OK in its head has no trailers to miss.
    let head = grpc("application/grpc", Some("0"));
    assert_eq!(
        judge(&HttpClassifier::new(), &head, None),
        (Success, Some(Success))
    );
    assert_eq!(
        judge(&GrpcClassifier::new(), &head, None),
        (Success, Some(Success))
    );
}

#[test]
fn grpc_without_its_trailers_was_cut_short() {
    let empty = HeaderMap::new();
    for content_type in ["application/grpc", "application/grpc;x=1"] {
        let head = grpc(content_type, None);
        for trailers in [None, Some(&empty)] {
            let verdict = judge(&HttpClassifier::new(), &head, trailers);
            assert_eq!(verdict, (Success, Some(Failure)));
        }
    }
    // Without the content-type only the gRPC classifier expects trailers.
    assert_eq!(
        judge(&GrpcClassifier::new(), &http(200), None).1,
        Some(Failure)
    );
    assert_eq!(
        judge(&HttpClassifier::new(), &http(200), None).1,
        Some(Success)
    );
}

#[test]
fn grpc_web_has_its_trailers_in_the_body() {
    let head = grpc("application/grpc-web+proto", None);
    assert_eq!(judge(&HttpClassifier::new(), &head, None).1, Some(Success));
    assert_eq!(judge(&GrpcClassifier::new(), &head, None).1, Some(Success));
    let head = grpc("application/grpc-web", Some("14"));
    assert_eq!(judge(&HttpClassifier::new(), &head, None).0, Failure);
}

#[test]
fn plain_http_may_have_any_trailers() {
    for content_type in ["text/plain", "application/grpcx"] {
        let head = grpc(content_type, None);
        let verdict = judge(&HttpClassifier::new(), &head, Some(&trailers("14")));
        assert_eq!(verdict, (Success, Some(Success)));
    }
}

#[test]
fn an_http_status_stands_in_for_a_missing_grpc_one() {
    let classifier = GrpcClassifier::new();
    for (status, expected) in [
        (400, Failure),
        (401, Success),
        (404, Success),
        (429, Failure),
        (503, Failure),
        (500, Failure),
    ] {
        assert_eq!(judge(&classifier, &http(status), None).0, expected);
    }
    // And then there are no trailers to wait for.
    assert_eq!(
        judge(&classifier, &http(404), None),
        (Success, Some(Success))
    );
}

#[test]
fn bodies_that_break_fail_and_those_that_are_dropped_say_nothing() {
    let classifier = |result: Result<&Response<()>, &Infallible>| match result {
        Ok(_) => Success,
        Err(never) => match *never {},
    };
    let end = |end| Classify::classify_body(&classifier, Expect::End, end);
    assert_eq!(end(BodyEnd::Complete { trailers: None }), Success);
    assert_eq!(end(BodyEnd::Failed), Failure);
    assert_eq!(end(BodyEnd::Dropped), Ignored);
}

#[test]
fn closures_and_shared_ones_judge_too() {
    let over_two = |result: Result<&u32, &()>| match result {
        Ok(0..=2) => Success,
        Ok(_) => Failure,
        Err(()) => Ignored,
    };
    let shared: Arc<dyn Classify<u32, ()>> = Arc::new(over_two);
    assert_eq!(shared.classify(Ok(&2)), Success);
    assert_eq!(shared.classify(Ok(&3)), Failure);
    assert_eq!(shared.classify(Err(&())), Ignored);

    let shared = Arc::new(GrpcClassifier::new());
    let head = grpc("application/grpc", None);
    assert_eq!(judge(&shared, &head, None), (Success, Some(Failure)));
}

#[test]
fn classifiers_are_cheap_to_copy() {
    assert_eq!(size_of::<StatusClassifier>(), size_of::<usize>());
    assert!(size_of::<HttpClassifier>() <= 24);
    let build = || {
        StatusClassifier::new()
            .failures([StatusCode::NOT_IMPLEMENTED])
            .ignored([StatusCode::NOT_FOUND])
    };
    // The same content is kept once, however it was reached.
    let detour = build().failures([]).failures([StatusCode::NOT_IMPLEMENTED]);
    assert!(std::ptr::eq(build().table(), detour.table()));
    assert_eq!(build(), detour);
    assert_ne!(build(), StatusClassifier::new());
    let server_errors = (500..600).filter_map(|status| StatusCode::from_u16(status).ok());
    let default = build().ignored([]).failures(server_errors);
    assert!(std::ptr::eq(
        default.table(),
        StatusClassifier::new().table()
    ));

    let streaming = |types: &[&str]| HttpClassifier::new().streaming(types);
    assert_eq!(
        streaming(&["a/b", "c/d"]),
        streaming(&["C/D;x", "a/b ", "c/d"])
    );
    assert_ne!(streaming(&["a/b"]), streaming(&["a/c"]));
    assert_eq!(streaming(&["", " ;x"]), HttpClassifier::new());
}

#[test]
fn rules_can_be_read_in_a_log() {
    let text = format!("{:?}", StatusClassifier::new());
    assert_eq!(
        text,
        "StatusClassifier { failures: {500..=599}, ignored: {} }"
    );
    let mixed = [100, 501, 502, 504, 999].map(|status| StatusCode::from_u16(status).unwrap());
    let text = format!("{:?}", StatusClassifier::new().ignored(mixed));
    assert_eq!(
        text,
        "StatusClassifier { failures: {500..=599}, ignored: {100, 501..=502, 504, 999} }"
    );
    let text = format!(
        "{:?}",
        HttpClassifier::new().streaming(["Text/Event-Stream"])
    );
    assert!(
        text.contains("streaming: {\"text/event-stream\"}"),
        "{text}"
    );
}

/// What the end of this head's body must tell.
fn expects(
    classifier: &impl Classify<Response<()>, &'static str>,
    status: u16,
    content_type: Option<&'static str>,
) -> Expect {
    let Ok(mut response) = http(status) else {
        unreachable!("it was built")
    };
    if let Some(value) = content_type {
        let value = http::HeaderValue::from_static(value);
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    classifier.expects(&response)
}

#[test]
fn an_upgrade_is_final_at_its_head() {
    let status = StatusClassifier::new();
    assert_eq!(expects(&status, 101, None), Expect::Nothing);
    assert_eq!(expects(&status, 200, None), Expect::End);
    let any = HttpClassifier::new();
    assert_eq!(expects(&any, 101, None), Expect::Nothing);
    assert_eq!(
        expects(&any, 101, Some("application/grpc")),
        Expect::Nothing
    );
    assert_eq!(expects(&any, 200, None), Expect::End);
    let grpc = GrpcClassifier::new();
    assert_eq!(expects(&grpc, 101, None), Expect::Nothing);
    assert_eq!(expects(&grpc, 200, None), Expect::GrpcStatus);
}

#[test]
fn streams_are_final_at_their_head_where_they_are_named() {
    let classifier = HttpClassifier::new().streaming(["text/event-stream", "application/x-ndjson"]);
    for (content_type, expected) in [
        ("text/event-stream", Expect::Nothing),
        ("Text/Event-Stream", Expect::Nothing),
        ("text/event-stream;charset=utf-8", Expect::Nothing),
        ("text/event-stream ; charset=utf-8", Expect::Nothing),
        ("application/x-ndjson", Expect::Nothing),
        ("text/event-streams", Expect::End),
        ("text/event", Expect::End),
        ("", Expect::End),
        ("application/grpc", Expect::GrpcStatus),
    ] {
        let told = expects(&classifier, 200, Some(content_type));
        assert_eq!(told, expected, "{content_type}");
        let told = expects(&HttpClassifier::new(), 200, Some(content_type));
        assert_ne!(told, Expect::Nothing, "{content_type}");
    }
    assert_eq!(expects(&classifier, 200, None), Expect::End);
}

#[test]
fn what_breaks_off_after_a_final_head_is_no_failure() {
    let failed = trailers("14");
    for end in [
        BodyEnd::Complete { trailers: None },
        BodyEnd::Complete {
            trailers: Some(&failed),
        },
        BodyEnd::Failed,
        BodyEnd::Dropped,
    ] {
        let verdict = |classifier: &dyn Classify<Response<()>, ()>| {
            classifier.classify_body(Expect::Nothing, end)
        };
        assert_eq!(verdict(&HttpClassifier::new()), Success);
        assert_eq!(verdict(&StatusClassifier::new()), Success);
        assert_eq!(verdict(&GrpcClassifier::new()), Success);
    }
    let end = Classify::<Response<()>, ()>::classify_end(
        &GrpcClassifier::new(),
        Expect::Nothing,
        Some(&failed),
    );
    assert_eq!(end, Success);
}
