use std::convert::Infallible;

use buttress_core::{
    key,
    testing::{advance, web},
};
use http::{Request, Response};
use tower::{Layer, Service, ServiceExt, service_fn};

use super::*;
use crate::{Limit, RateLimitLayer, WhenFull};

fn by_user() -> key::Header {
    key::header("x-user")
}

/// Sends `count` requests of `user`; how many passed.
async fn send(layer: &RateLimitLayer, user: &str, count: usize) -> usize {
    let inner = service_fn(async |_: Request<_>| Ok::<_, Infallible>(Response::new(())));
    let mut service = layer.layer(inner);
    let mut passed = 0;
    for _ in 0..count {
        let mut request = web::get("/");
        request
            .headers_mut()
            .insert("x-user", user.parse().unwrap());
        let response = service.ready().await.unwrap().call(request).await.unwrap();
        passed += usize::from(response.status() == 200);
    }
    passed
}

fn layer(limit: Limit) -> (RateLimitLayer, Handle) {
    let layer = RateLimitLayer::builder()
        .limit(limit.name("users").key(by_user()))
        .build()
        .unwrap();
    let handle = layer.handle();
    (layer, handle)
}

fn remaining(handle: &Handle, user: &str) -> u32 {
    handle
        .usage("users", &by_user().key(user))
        .unwrap()
        .remaining
}

#[tokio::test(start_paused = true)]
async fn usage_is_peeked_at_and_leaves_no_trace() {
    let (layer, handle) = layer(Limit::new(Quota::per_second(10)));
    let ann = by_user().key("ann");
    let fresh = handle.usage("users", &ann).unwrap();
    assert_eq!((fresh.limit, fresh.remaining), (10, 10));
    assert_eq!(fresh.reset_after, Duration::ZERO);
    assert_eq!(handle.keys("users"), Ok(0));

    send(&layer, "ann", 1).await;
    let usage = handle.usage("users", &ann).unwrap();
    assert_eq!(usage.remaining, 9);
    assert_eq!(usage.reset_after, Duration::from_millis(100));
    assert_eq!(usage.next_after, Duration::from_millis(100));
    assert_eq!(handle.keys("users"), Ok(1));

    // A key that is whole again is none.
    advance(Duration::from_millis(100)).await;
    assert_eq!(handle.keys("users"), Ok(0));
    assert_eq!(remaining(&handle, "ann"), 10);
}

#[tokio::test(start_paused = true)]
async fn keys_are_reset_and_charges_given_back() {
    let (layer, handle) = layer(Limit::new(Quota::per_minute(5)));
    assert_eq!(send(&layer, "ann", 9).await, 5);
    send(&layer, "bob", 3).await;
    let ann = by_user().key("ann");

    handle.refund("users", &ann, 2).unwrap();
    assert_eq!(send(&layer, "ann", 9).await, 2);
    assert_eq!(handle.reset("users", &ann), Ok(true));
    assert_eq!(handle.reset("users", &ann), Ok(false));
    assert_eq!(remaining(&handle, "ann"), 5);
    assert_eq!(remaining(&handle, "bob"), 2);

    handle.reset_all("users").unwrap();
    assert_eq!(remaining(&handle, "bob"), 5);
    assert_eq!(handle.keys("users"), Ok(0));
}

#[tokio::test(start_paused = true)]
async fn a_replaced_quota_keeps_what_was_spent() {
    let (layer, handle) = layer(Limit::new(Quota::per_minute(100)));
    assert_eq!(send(&layer, "ann", 60).await, 60);
    handle.set_quota("users", Quota::per_minute(200)).unwrap();
    assert_eq!(remaining(&handle, "ann"), 140);
    handle.set_quota("users", Quota::per_minute(20)).unwrap();
    assert_eq!(remaining(&handle, "ann"), 0);
    assert_eq!(remaining(&handle, "bob"), 20);

    // At a third of a second each, one is back when it should be.
    assert_eq!(send(&layer, "ann", 1).await, 0);
    advance(Duration::from_secs(3)).await;
    assert_eq!(send(&layer, "ann", 2).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_may_have_a_quota_of_its_own() {
    let gold = by_user().key("gold");
    let limit = Limit::new(Quota::per_minute(5)).quota_for(gold.clone(), Quota::per_minute(50));
    let (layer, handle) = layer(limit);
    assert_eq!(send(&layer, "gold", 60).await, 50);
    assert_eq!(send(&layer, "ann", 60).await, 5);

    // What is everyone's does not change what is theirs.
    handle.set_quota("users", Quota::per_minute(10)).unwrap();
    assert_eq!(
        (remaining(&handle, "gold"), remaining(&handle, "ann")),
        (0, 5)
    );
    handle
        .set_quota_for("users", &gold, Some(Quota::per_minute(80)))
        .unwrap();
    assert_eq!(remaining(&handle, "gold"), 30);
    handle.set_quota_for("users", &gold, None).unwrap();
    assert_eq!(handle.usage("users", &gold).unwrap().limit, 10);
    assert_eq!(remaining(&handle, "gold"), 0);
}

#[tokio::test(start_paused = true)]
async fn quotas_chosen_by_a_closure_are_not_the_handles() {
    let quota = Quota::per_minute(3).check().unwrap();
    let (layer, handle) = layer(Limit::new(Quota::per_minute(1)).quota_by(move |_| quota));
    assert_eq!(send(&layer, "ann", 9).await, 3);
    assert_eq!(
        handle.set_quota("users", Quota::per_minute(9)),
        Err(HandleError::QuotaIsChosen("users".to_owned()))
    );
}

/// It used to be converted as if it had been spent of the limit's own quota,
/// which nobody has: nearly all of it was forgotten.
#[tokio::test(start_paused = true)]
async fn what_was_spent_of_a_chosen_quota_is_still_owed_under_ones_own() {
    let quota = Quota::per_minute(600).check().unwrap();
    let (layer, handle) = layer(Limit::new(Quota::per_minute(1)).quota_by(move |_| quota));
    let ann = by_user().key("ann");
    assert_eq!(send(&layer, "ann", 300).await, 300);
    let own = Quota::per_minute(1_000);
    handle.set_quota_for("users", &ann, Some(own)).unwrap();
    assert_eq!(remaining(&handle, "ann"), 500);
    assert_eq!(send(&layer, "ann", 100).await, 100);
    // 36 of 60 seconds are owed: 240 of 600 are left.
    handle.set_quota_for("users", &ann, None).unwrap();
    assert_eq!(send(&layer, "ann", 600).await, 240);
}

#[tokio::test(start_paused = true)]
async fn the_ceiling_is_kept_and_counted() {
    let limit = Limit::new(Quota::per_minute(1)).max_keys(10);
    let (evicting, handle) = layer(limit);
    for user in 0..100 {
        assert_eq!(send(&evicting, &user.to_string(), 1).await, 1);
        assert!(handle.keys("users").unwrap() <= 10);
    }
    assert_eq!(handle.evicted("users"), Ok(90));

    let limit = Limit::new(Quota::per_minute(1))
        .max_keys(10)
        .when_full(WhenFull::Refuse);
    let (refusing, handle) = layer(limit);
    let mut passed = 0;
    for user in 0..100 {
        passed += send(&refusing, &user.to_string(), 1).await;
    }
    assert_eq!(
        (passed, handle.keys("users"), handle.evicted("users")),
        (10, Ok(10), Ok(0))
    );
    advance(Duration::from_secs(60)).await;
    assert_eq!(send(&refusing, "new", 1).await, 1);
}

#[test]
fn mistakes_are_named() {
    let (_, handle) = layer(Limit::new(Quota::per_second(1)));
    assert_eq!(handle.limits().collect::<Vec<_>>(), ["users"]);
    let error = handle.keys("user").unwrap_err();
    assert_eq!(error.to_string(), "there is no limit named \"user\"");
    let error = handle.set_quota("users", Quota::per_second(0)).unwrap_err();
    assert_eq!(error, HandleError::Quota(ConfigError::ZeroLimit));
    assert_eq!(
        error.source().unwrap().to_string(),
        "a quota's limit must be at least 1"
    );
}

/// Two that replaced a quota at once overtook each other on their way through
/// the shards, and keys of one limit were left with different quotas.
#[test]
fn quotas_replaced_at_once_leave_one() {
    let (_layer, handle) = layer(Limit::new(Quota::per_second(10)));
    let start = std::sync::Barrier::new(8);
    for _ in 0..100 {
        std::thread::scope(|scope| {
            for thread in 1..=8 {
                let (handle, start) = (&handle, &start);
                scope.spawn(move || {
                    start.wait();
                    handle
                        .set_quota("users", Quota::per_second(thread))
                        .unwrap();
                });
            }
        });
        let limit = |n: u64| handle.usage("users", &Key::from(n)).unwrap().limit;
        let first = limit(0);
        assert!((1..1_000).all(|n| limit(n) == first));
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_is_asked_without_a_service() {
    let gold = by_user().key("gold");
    let limit = Limit::new(Quota::per_minute(3));
    let (layer, handle) = layer(limit);
    let limit = handle.limit("users").unwrap();
    let ann = by_user().key("ann");
    assert_eq!(send(&layer, "ann", 1).await, 1);
    limit.charge(&ann, 2).unwrap();
    // One quota for both.
    assert_eq!(send(&layer, "ann", 1).await, 0);
    let refusal = limit.check(&ann).unwrap_err();
    assert_eq!(refusal.retry_after(), Some(Duration::from_secs(20)));
    assert_eq!(limit.charge(&ann, 0), Ok(()));
    assert_eq!(limit.charge(&ann, 4).unwrap_err().retry_after(), None);

    handle
        .set_quota_for("users", &gold, Some(Quota::per_minute(5)))
        .unwrap();
    let passed = (0..9).filter(|_| limit.check(&gold).is_ok()).count();
    assert_eq!(passed, 5);
    assert!(handle.limit("nobody").is_err());
}
