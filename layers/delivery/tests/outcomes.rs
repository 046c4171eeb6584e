//! What becomes of a delivery: answers, timeouts, retries, dead letters.

mod common;

use std::time::Duration;

use buttress_core::testing::{
    Step, advance, settle,
    web::{BodyFate, ScriptedBody},
};
use buttress_delivery::{Cause, Status, Webhooks};
use buttress_webhook::{GitHub, Signer, Standard};
use common::*;
use http::StatusCode;

/// One registration at a receiver that answers so.
fn hooked(answer: impl Fn(&Sent) -> Answer + Send + Sync + 'static) -> (Webhooks, Receiver) {
    let (transport, receiver) = receiver(answer);
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/hook")).unwrap();
    (webhooks, receiver)
}

#[tokio::test(start_paused = true)]
async fn it_arrives_signed_by_all_schemes_and_is_over() {
    let (transport, receiver) = receiver(|_| with(204, &[], ScriptedBody::new()));
    let webhooks = builder().build(transport).unwrap();
    let signer = Signer::new(Standard::new(), [secret()]).unwrap();
    let signer = signer.and(GitHub, [secret()]).unwrap();
    let registration = hook("https://a.example/hook?x=1")
        .signer(signer)
        .headers([("authorization", "Bearer x")]);
    webhooks.register(registration).unwrap();
    let _worker = webhooks.start().unwrap();

    assert_eq!(webhooks.emit(event("a.b").id("msg_1")).await.unwrap(), 1);
    settle().await;
    let sent = receiver.requests().remove(0);
    assert_eq!(
        (sent.method().as_str(), sent.uri().to_string().as_str()),
        ("POST", "https://a.example/hook?x=1")
    );
    let header = |name: &str| sent.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("webhook-id"), "msg_1");
    assert_eq!(header("webhook-timestamp"), EPOCH.to_string());
    assert_eq!(header("content-type"), "application/json");
    assert_eq!(header("authorization"), "Bearer x");
    assert!(is_signed(Standard::new(), &sent, secs(EPOCH)));
    assert!(is_signed(GitHub, &sent, secs(EPOCH)));
    assert_eq!(
        sent.body().bytes(),
        r#"{"type":"a.b","id":"msg_1","timestamp":"2023-11-14T22:13:20.000Z","data":{"text":"hello"}}"#
    );

    let result = newest(&webhooks);
    assert_eq!((result.status, result.attempt), (Status::Delivered, 1));
    assert_eq!(result.response_status, Some(StatusCode::NO_CONTENT));
    let status = webhooks.status();
    assert_eq!(
        (status.queued, status.in_flight, status.dead_letters),
        (0, 0, 0)
    );
    receiver.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn always_500_is_four_calls_a_failure_and_a_dead_letter() {
    let (webhooks, receiver) = hooked(|_| status(500));
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    assert_eq!(standings(&webhooks), [(Status::Retrying, 1, failing(500))]);
    assert_eq!(newest(&webhooks).retry_in, Some(secs(1)));
    assert_eq!(webhooks.status().queued, 1);

    advance(secs(20)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(1), secs(3), secs(7)]);
    assert_eq!(standings(&webhooks), [(Status::Failed, 4, failing(500))]);
    let letters = webhooks.dead_letters();
    assert_eq!(letters.len(), 1);
    assert_eq!(
        (letters[0].record.attempts, Some(letters[0].cause.clone())),
        (4, failing(500))
    );
    assert_eq!(letters[0].died, secs(EPOCH + 7));
    assert_eq!(webhooks.status().queued, 0);

    // The same id each time, and each time a timestamp of its own.
    let requests = receiver.requests();
    let of = |name: &str| -> Vec<String> {
        let values = requests.iter().map(|request| &request.headers()[name]);
        values
            .map(|value| value.to_str().unwrap().to_owned())
            .collect()
    };
    let ids = of("webhook-id");
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let times = [0, 1, 3, 7].map(|after| (EPOCH + after).to_string());
    assert_eq!(of("webhook-timestamp"), times);
    let first = requests[0].body().bytes();
    assert!(requests.iter().all(|sent| sent.body().bytes() == first));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_comes_back_is_told() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(500));
    receiver.push(Step::err("connection reset by peer"));
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/hook")).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(millis(1500)).await;
    let reset = Cause::Transport("connection reset by peer".into());
    assert_eq!(standings(&webhooks), [(Status::Retrying, 2, Some(reset))]);
    advance(secs(5)).await;
    assert_eq!(standings(&webhooks), [(Status::Delivered, 3, None)]);
    assert_eq!(receiver.arrivals(), [secs(0), secs(1), secs(3)]);
    assert!(webhooks.dead_letters().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_hangs_has_its_time() {
    let (webhooks, receiver) = hooked(|_| Step::hang());
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(29)).await;
    assert_eq!(standings(&webhooks), [(Status::Pending, 0, None)]);
    assert_eq!(webhooks.status().in_flight, 1);
    advance(secs(1)).await;
    assert_eq!(
        standings(&webhooks),
        [(Status::Retrying, 1, Some(Cause::Timeout))]
    );
    assert_eq!(newest(&webhooks).duration, Some(secs(30)));
    assert_eq!(newest(&webhooks).time, secs(EPOCH + 30));
    advance(secs(200)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(31), secs(63), secs(97)]);
    assert_eq!(receiver.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_trickles_has_the_same_time() {
    fn trickle() -> ScriptedBody {
        (0..100).fold(ScriptedBody::new(), |body, _| body.data("x").wait(secs(4)))
    }
    let (webhooks, receiver) = hooked(|_| with(200, &[], trickle()));
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(30)).await;
    let result = newest(&webhooks);
    assert_eq!(
        (result.status, result.error.clone()),
        (Status::Retrying, Some(Cause::Timeout))
    );
    // What was seen of it counts.
    assert_eq!(result.response_status, Some(StatusCode::OK));
    assert_eq!(result.body, "x".repeat(8));
    assert_eq!(receiver.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_good_head_whose_body_breaks_is_no_delivery() {
    let (webhooks, _receiver) =
        hooked(|_| with(200, &[], ScriptedBody::new().data("ok").fail("reset")));
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    let broken = Cause::Broken("reset".into());
    assert_eq!(standings(&webhooks), [(Status::Retrying, 1, Some(broken))]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_end_is_cut_and_delivered() {
    let watches = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&watches);
    let (webhooks, _receiver) = hooked(move |_| {
        let endless = (0..100).fold(ScriptedBody::new(), |body, _| body.data(vec![b'x'; 1024]));
        let endless = endless.hang();
        seen.lock().unwrap().push(endless.watch());
        with(200, &[], endless)
    });
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    let result = newest(&webhooks);
    assert_eq!(
        (result.status, result.body.len()),
        (Status::Delivered, 4096)
    );
    assert_eq!(result.duration, Some(Duration::ZERO));
    assert_eq!(watches.lock().unwrap()[0].fate(), BodyFate::Dropped);
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_not_followed() {
    for code in [301, 302, 303, 307, 308] {
        let (webhooks, receiver) = hooked(move |_| {
            with(
                code,
                &[("location", "http://169.254.169.254/")],
                ScriptedBody::new(),
            )
        });
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        advance(secs(60)).await;
        let cause = Cause::Redirected(StatusCode::from_u16(code).unwrap());
        assert_eq!(standings(&webhooks), [(Status::Failed, 1, Some(cause))]);
        assert_eq!(
            (receiver.call_count(), webhooks.dead_letters().len()),
            (1, 1)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn gone_disables_and_takes_back_what_is_queued() {
    let (transport, receiver) = receiver(|_| status(410).after(secs(1)));
    let webhooks = builder().lane_concurrency(1).build(transport).unwrap();
    let gone = webhooks.register(hook("https://a.example/gone")).unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..3 {
        webhooks.emit(event("a")).await.unwrap();
    }
    advance(secs(60)).await;
    assert_eq!(receiver.call_count(), 1);
    let gone_by = |attempt| (Status::Failed, attempt, Some(Cause::Gone));
    assert_eq!(standings(&webhooks), [gone_by(1), gone_by(0), gone_by(0)]);
    assert_eq!(webhooks.list()[0].disabled, Some(Cause::Gone));
    assert_eq!(webhooks.status().queued, 0);
    // It hears of nothing any more, until somebody says that it shall.
    assert_eq!(webhooks.emit(event("a")).await.unwrap(), 0);
    let letter = webhooks.dead_letters().remove(0).record.id;
    let refused = webhooks.redrive(letter).await.unwrap_err();
    assert!(matches!(refused, buttress_delivery::RedriveError::Disabled));
    assert!(webhooks.enable(&gone));
    receiver.push(status(200));
    assert_eq!(webhooks.emit(event("a")).await.unwrap(), 1);
    settle().await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_under_way_when_its_registration_is_disabled_is_the_last() {
    // The second is under way when the first is told that all is over.
    let (transport, receiver) = receiver(|_| status(500).after(secs(2)));
    receiver.push(status(410).after(secs(1)));
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/gone")).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(60)).await;
    assert_eq!(receiver.call_count(), 2);
    assert_eq!(
        standings(&webhooks),
        [
            (Status::Failed, 1, Some(Cause::Gone)),
            (Status::Failed, 1, Some(Cause::Gone))
        ]
    );
    assert_eq!(webhooks.status().queued, 0);
}

#[tokio::test(start_paused = true)]
async fn the_endpoint_has_a_word() {
    for (word, code, expected, disabled) in [
        (
            "disable",
            500,
            (Status::Failed, Some(Cause::Disabled)),
            true,
        ),
        ("disable", 200, (Status::Delivered, None), true),
        (
            "abort-message",
            503,
            (Status::Failed, Some(Cause::Aborted)),
            false,
        ),
        ("abort-message", 200, (Status::Delivered, None), false),
    ] {
        let (webhooks, receiver) =
            hooked(move |_| with(code, &[("webhook-delivery", word)], ScriptedBody::new()));
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        advance(secs(60)).await;
        let result = newest(&webhooks);
        assert_eq!(
            (result.status, result.error.clone()),
            expected,
            "{word} {code}"
        );
        assert_eq!(receiver.call_count(), 1);
        assert_eq!(webhooks.list()[0].disabled.is_some(), disabled);
    }
}

#[tokio::test(start_paused = true)]
async fn client_errors_are_tried_again_unless_they_are_permanent() {
    for (code, calls_by_default, calls_strictly) in [
        (400, 4, 1),
        (404, 4, 1),
        (408, 4, 4),
        (425, 4, 4),
        (429, 4, 4),
        (500, 4, 4),
    ] {
        for strict in [false, true] {
            let (transport, receiver) = receiver(move |_| status(code));
            let webhooks = builder().build(transport).unwrap();
            let mut registration = hook("https://a.example/hook");
            if strict {
                registration = registration.permanent_client_errors();
            }
            webhooks.register(registration).unwrap();
            let _worker = webhooks.start().unwrap();
            webhooks.emit(event("a")).await.unwrap();
            advance(secs(60)).await;
            let expected = if strict {
                calls_strictly
            } else {
                calls_by_default
            };
            assert_eq!(receiver.call_count(), expected, "{code} {strict}");
            assert_eq!(webhooks.dead_letters().len(), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_a_floor_under_a_ceiling() {
    for (asked, code, second) in [
        ("20", 429, 20),
        ("20", 503, 20),
        // Less than the backoff.
        ("0", 503, 1),
        // Not asked for where it means something else.
        ("20", 500, 1),
        // An hour at most.
        ("86400", 429, 3600),
        // A date: 20 seconds after the test's beginning.
        ("Tue, 14 Nov 2023 22:13:40 GMT", 429, 20),
    ] {
        let (webhooks, receiver) =
            hooked(move |_| with(code, &[("retry-after", asked)], ScriptedBody::new()));
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        settle().await;
        assert_eq!(
            newest(&webhooks).retry_in,
            Some(secs(second)),
            "{asked} {code}"
        );
        advance(secs(second)).await;
        assert_eq!(
            receiver.arrivals(),
            [secs(0), secs(second)],
            "{asked} {code}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn who_asks_to_be_left_alone_is() {
    let (webhooks, receiver) = hooked(|_| status(200));
    receiver.push(with(429, &[("retry-after", "20")], ScriptedBody::new()));
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    // Nor is the next one sent, which would lose an attempt by it.
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(19)).await;
    assert_eq!(receiver.call_count(), 1);
    advance(secs(1)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(20), secs(20)]);
    assert!(
        webhooks
            .results(None, None)
            .iter()
            .all(|result| result.status == Status::Delivered)
    );
}

#[tokio::test(start_paused = true)]
async fn a_transport_that_panics_is_one_that_fails() {
    for answer in [
        || Step::panic("in the future"),
        || Step::panic_in_call("in the call"),
    ] {
        let (webhooks, receiver) = hooked(|_| status(200));
        receiver.push(answer());
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        settle().await;
        assert_eq!(
            standings(&webhooks),
            [(Status::Retrying, 1, Some(Cause::Panicked))]
        );
        advance(secs(2)).await;
        assert_eq!(standings(&webhooks), [(Status::Delivered, 2, None)]);
    }
}

#[tokio::test(start_paused = true)]
async fn waits_are_jittered_by_half() {
    let (transport, receiver) = receiver(|_| status(500));
    let webhooks = builder().random(|| 0).build(transport).unwrap();
    let registration = hook("https://a.example/")
        .retry_delay(secs(4))
        .max_retry_delay(secs(10));
    webhooks.register(registration).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(60)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(2), secs(6), secs(11)]);
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_sent_again_or_dropped() {
    let (transport, receiver) = receiver(|_| status(302));
    let webhooks = builder().build(transport).unwrap();
    let id = webhooks
        .register(hook("https://a.example/a").id("mine"))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    for name in ["a", "b", "c"] {
        webhooks
            .emit(event(name).id(format!("msg_{name}")))
            .await
            .unwrap();
    }
    settle().await;
    let letters = webhooks.dead_letters();
    let names: Vec<&str> = letters
        .iter()
        .map(|letter| &*letter.record.message.event)
        .collect();
    assert_eq!(names, ["a", "b", "c"]);

    receiver.push(status(200));
    let again = webhooks.redrive(letters[1].record.id).await.unwrap();
    settle().await;
    let result = newest(&webhooks);
    assert_eq!(
        (result.id, result.status, result.attempt),
        (again, Status::Delivered, 1)
    );
    let requests = receiver.requests();
    assert_eq!(requests[3].headers()["webhook-id"], "msg_b");
    assert_eq!(requests[3].body().bytes(), requests[1].body().bytes());
    assert!(webhooks.redrive(letters[1].record.id).await.is_err());

    assert!(webhooks.drop_letter(letters[0].record.id).await);
    assert!(!webhooks.drop_letter(letters[0].record.id).await);
    assert_eq!(webhooks.dead_letters().len(), 1);

    let other = buttress_delivery::RegistrationId::from("other");
    assert_eq!(webhooks.redrive_all(Some(&other)).await.queued, 0);
    receiver.push(status(200));
    let redriven = webhooks.redrive_all(Some(&id)).await;
    assert_eq!((redriven.queued, redriven.left), (1, 0));
    settle().await;
    assert!(webhooks.dead_letters().is_empty());
    assert_eq!(webhooks.status().queued, 0);
}

#[tokio::test(start_paused = true)]
async fn dead_letters_have_a_ceiling_and_the_newest_are_kept() {
    let (transport, _receiver) = receiver(|_| status(302));
    let webhooks = builder().max_dead_letters(2).build(transport).unwrap();
    webhooks.register(hook("https://a.example/a")).unwrap();
    let _worker = webhooks.start().unwrap();
    for name in ["a", "b", "c"] {
        webhooks.emit(event(name)).await.unwrap();
        settle().await;
    }
    let letters = webhooks.dead_letters();
    let names: Vec<&str> = letters
        .iter()
        .map(|letter| &*letter.record.message.event)
        .collect();
    assert_eq!(names, ["b", "c"]);
}

#[tokio::test(start_paused = true)]
async fn no_secret_is_shown_anywhere() {
    let (transport, _receiver) =
        receiver(|_| Step::err("no route to https://a.example/T0KEN?key=K3Y"));
    let webhooks = builder().build(transport).unwrap();
    let registration = hook("https://a.example/T0KEN?key=K3Y")
        .signed_by(Standard::new(), [secret()])
        .unwrap()
        .headers([("authorization", "B3ARER")])
        .max_retries(0);
    webhooks.register(registration).unwrap();
    let mut subscriber = webhooks.subscribe(None);
    let worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    let letters = webhooks.dead_letters();
    assert_eq!(letters.len(), 1);
    let shown = format!(
        "{webhooks:#?} {worker:#?} {:#?} {:#?} {letters:#?} {:#?} {}",
        webhooks.list(),
        webhooks.results(None, None),
        subscriber.try_recv(),
        letters[0].cause,
    );
    assert!(shown.contains("no route to"));
    for secret in ["T0KEN", "K3Y", "B3ARER", "MfKQ", "hello"] {
        assert!(!shown.contains(secret), "{secret} in {shown}");
    }
}
