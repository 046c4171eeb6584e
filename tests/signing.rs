//! A message that is sent again: `message id → retry → sign → transport`.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use buttress::{
    BoxError, Refusal, RefusalKind,
    retry::{RetryLayer, Settings},
    webhook::{
        MessageIdLayer, Reason, Secret, SignLayer, Signer, Standard, Verified, Verifier, WholeBody,
        sign::Cause,
    },
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

const NOW: u64 = 1_700_000_000;

fn secret() -> Secret {
    Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()
}

/// A clock that goes on by a second whenever it is read.
fn sign() -> SignLayer {
    let seconds = AtomicU64::new(NOW);
    let clock = move || Duration::from_secs(seconds.fetch_add(1, Ordering::Relaxed));
    let signer = Signer::new(Standard::new(), [secret()]).unwrap();
    let builder = SignLayer::builder(signer).wall_clock(clock).max_body(1000);
    builder.build().unwrap()
}

fn retry(told: &Arc<AtomicU64>) -> RetryLayer {
    let told = Arc::clone(told);
    RetryLayer::builder()
        .settings(Settings::standard().max_attempts(3))
        .on_retry(move |_, _, _| {
            told.fetch_add(1, Ordering::Relaxed);
        })
        .build()
        .unwrap()
}

/// What the receiver made of each attempt, which fails twice.
type Seen = Arc<Mutex<Vec<Result<Verified, Reason>>>>;

fn receiver(
    seen: &Seen,
) -> impl Service<Request<WholeBody>, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send>
+ Clone {
    let seen = Arc::clone(seen);
    service_fn(move |request: Request<WholeBody>| {
        let (parts, body) = request.into_parts();
        let verifier = Verifier::new(Standard::new(), [secret()]).unwrap();
        let now = Duration::from_secs(NOW);
        let verified = verifier.verify((&parts).into(), body.bytes(), now);
        let mut seen = seen.lock().unwrap();
        seen.push(verified);
        let mut response = Response::new(Full::default());
        if !seen.len().is_multiple_of(3) {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        std::future::ready(Ok(response))
    })
}

#[tokio::test(start_paused = true)]
async fn each_attempt_has_the_same_id_and_a_time_of_its_own() {
    let (seen, retries) = (Seen::default(), Arc::default());
    let service = ServiceBuilder::new()
        .layer(MessageIdLayer::new())
        .layer(retry(&retries))
        .layer(sign())
        .service(receiver(&seen));
    for message in 0..2 {
        let body = Full::new(Bytes::from(vec![message; 500]));
        let request = Request::put("/hooks").body(body).unwrap();
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let seen = seen.lock().unwrap();
    let seen: Vec<_> = seen.iter().map(|one| one.clone().unwrap()).collect();
    let times: Vec<_> = seen.iter().map(|one| one.timestamp.unwrap()).collect();
    assert_eq!(times, (NOW..NOW + 6).collect::<Vec<_>>());
    assert_eq!(seen[0].id, seen[1].id);
    assert_eq!(seen[0].id, seen[2].id);
    assert_eq!(seen[3].id, seen[5].id);
    assert_ne!(seen[0].id, seen[3].id);
    assert_eq!(retries.load(Ordering::Relaxed), 4);
}

/// It would be too large again.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_signed_is_not_sent_again() {
    let (seen, retries) = (Seen::default(), Arc::default());
    let service = ServiceBuilder::new()
        .layer(MessageIdLayer::new())
        .layer(retry(&retries))
        .layer(sign())
        .service(receiver(&seen));
    let request = Request::put("/hooks").body(Full::new(Bytes::from(vec![0; 1001])));
    let error = service.oneshot(request.unwrap()).await.unwrap_err();
    let cause = error.not_signed().unwrap().cause();
    assert!(matches!(cause, Cause::TooLarge { most: 1000 }));
    let error = BoxError::from(error);
    let refusal = Refusal::find(&*error).unwrap();
    assert_eq!(refusal.kind(), RefusalKind::BodyTooLarge);
    assert!(seen.lock().unwrap().is_empty());
    assert_eq!(retries.load(Ordering::Relaxed), 0);
}
