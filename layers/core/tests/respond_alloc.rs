//! What it costs that someone may want to be told of a refusal: nothing where
//! nobody does, and nothing where nothing is refused.

use std::time::Duration;

use buttress_core::{
    Head, ProblemResponder, Refusal, RefusalKind, Responder,
    deadline::Deadline,
    refusal::Tell,
    respond::{KeptHead, SharedResponder},
};
use http::{Extensions, Request};

/// Runs it twice, for what is made once, and counts the second.
fn allocations(mut work: impl FnMut()) -> u64 {
    work();
    allocation_counter::measure(work).count_total
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
}

#[test]
fn to_ask_costs_nothing_where_there_is_a_deadline() {
    let with = |tell: bool| {
        allocations(|| {
            let mut extensions = Extensions::new();
            Deadline::after(Duration::from_secs(1)).attach(&mut extensions);
            if tell {
                Tell::attach(&mut extensions);
            }
            drop(extensions.clone());
        })
    };
    let without = with(false);
    assert!(without > 0);
    assert_eq!(with(true), without);
}

#[test]
fn a_little_head_is_kept_without_an_allocation() {
    let responder = SharedResponder::default();
    let mut request = Request::new(());
    Tell::attach(request.extensions_mut());
    let cost = allocations(|| {
        let kept: KeptHead = responder.keep(Head::from(&request));
        assert!(Tell::is_in(kept.head().extensions));
    });
    assert_eq!(cost, 0);
}

#[test]
fn a_refusal_that_nobody_asked_for_costs_what_its_responder_does() {
    let refusal = Refusal::new(RefusalKind::RateLimited).with_retry_after(Duration::from_secs(1));
    let shared = SharedResponder::default();
    let mut request = Request::new(());
    let bare = allocations(|| drop(ProblemResponder.respond(&refusal, Head::from(&request))));
    let untold = allocations(|| drop(shared.respond(&refusal, Head::from(&request))));
    assert_eq!(untold, bare);
    Tell::attach(request.extensions_mut());
    let told = allocations(|| drop(shared.respond(&refusal, Head::from(&request))));
    assert!(told > bare);
}
