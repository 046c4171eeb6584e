use buttress_core::{classify::Verdict, clock, sync};

use crate::{Breaker, Settings, State, Window};

/// A call in flight fails while its breaker is taken for one that nothing is
/// lost by forgetting: either it has counted, and the breaker stays; or it has
/// not, and nobody ever sees it open.
#[test]
fn what_is_forgotten_was_never_opened() {
    for settings in [
        Settings::new().consecutive_failures(1),
        Settings::new().failure_rate(0.5).window(Window::Calls(1)),
    ] {
        sync::model(move || {
            let breaker = Breaker::builder("b")
                .settings(settings.clone())
                .build()
                .unwrap();
            let permit = breaker.try_acquire().unwrap();
            let call = sync::thread::spawn(move || permit.record(Verdict::Failure));
            let retired = breaker.retire(clock::now(), false);
            call.join().unwrap();
            let state = breaker.state();
            assert_eq!(retired, state == State::Closed, "{state}");
        });
    }
}
