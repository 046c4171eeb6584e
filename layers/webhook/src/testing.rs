//! What every [`ReplayStore`] must do, as one test that each is put through.

use std::{sync::Arc, time::Duration};

use crate::{Claim, ClaimKey, ClaimToken, ReplayStore};

/// How long completed claims count in the test.
pub const KEEP: Duration = Duration::from_millis(600);

/// Puts a store through what the layer relies on. The keys begin with `prefix`;
/// none of them may be known to the store. `pass` has the store's time go by: it
/// advances a paused clock, or sleeps.
///
/// On a tokio runtime. A store that frees what is in progress after a while
/// takes more than two seconds for it here.
///
/// # Panics
///
/// If the store fails, or does something else.
pub async fn check_replay_store<S: ReplayStore>(
    store: S,
    prefix: &str,
    pass: impl AsyncFn(Duration),
) {
    let store = Arc::new(store);
    let key = |name: &str| ClaimKey::new(format!("{prefix}{name}"));
    let claim = async |key: &ClaimKey| match store.claim(key, KEEP).await {
        Ok(claim) => claim,
        Err(error) => panic!("the store fails: {error}"),
    };
    let complete = async |key: &ClaimKey, token| {
        let done = store.complete(key, token, KEEP).await;
        done.unwrap_or_else(|error| panic!("the store fails: {error}"));
    };
    let release = async |key: &ClaimKey, token| {
        let done = store.release(key, token).await;
        done.unwrap_or_else(|error| panic!("the store fails: {error}"));
    };

    // One has it, and others have others.
    let (first, other) = (key("first"), key("other"));
    let token = granted(claim(&first).await);
    assert_eq!(claim(&first).await, Claim::InProgress);
    let others = granted(claim(&other).await);

    // In progress it does not end by itself.
    pass(KEEP * 2).await;
    assert_eq!(claim(&first).await, Claim::InProgress);

    // What is released is new again, under another token.
    release(&first, token).await;
    let second = granted(claim(&first).await);
    assert_ne!(second, token, "each claim has a token of its own");

    // What comes too late from the first changes nothing.
    release(&first, token).await;
    assert_eq!(claim(&first).await, Claim::InProgress, "released too late");
    complete(&first, token).await;
    assert_eq!(claim(&first).await, Claim::InProgress, "completed too late");

    // Nor does what comes after the end.
    complete(&first, second).await;
    assert_eq!(claim(&first).await, Claim::Completed);
    release(&first, second).await;
    assert_eq!(claim(&first).await, Claim::Completed, "it stays completed");
    assert_eq!(claim(&other).await, Claim::InProgress, "each by itself");

    // It counts from its completion, for as long as was said.
    pass(KEEP / 2).await;
    assert_eq!(claim(&first).await, Claim::Completed);
    complete(&other, others).await;
    pass(KEEP / 2 + KEEP / 6).await;
    let third = granted(claim(&first).await);
    assert_eq!(claim(&other).await, Claim::Completed);
    complete(&first, second).await;
    assert_eq!(claim(&first).await, Claim::InProgress, "an older token");
    release(&first, third).await;

    // A key that nobody has: nothing to do.
    let nobody = key("nobody");
    release(&nobody, third).await;
    granted(claim(&nobody).await);

    // A prefix of a key is another one, and so is a long one of the same start.
    let long = "x".repeat(700);
    granted(claim(&key(&format!("{long}1"))).await);
    granted(claim(&key(&format!("{long}2"))).await);
    granted(claim(&key(&long)).await);

    // Many at once: one has it.
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (store, key) = (Arc::clone(&store), key("many"));
            tokio::spawn(async move { store.claim(&key, KEEP).await })
        })
        .collect();
    let mut new = 0;
    for task in tasks {
        match task.await {
            Ok(Ok(Claim::New(_))) => new += 1,
            Ok(Ok(Claim::InProgress)) => {}
            other => panic!("one of many at once: {other:?}"),
        }
    }
    assert_eq!(new, 1, "of many at once one has it");
}

#[track_caller]
fn granted(claim: Claim) -> ClaimToken {
    match claim {
        Claim::New(token) => token,
        other => panic!("it should be new: {other:?}"),
    }
}
