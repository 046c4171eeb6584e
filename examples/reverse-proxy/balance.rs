//! Which endpoint a request goes to: the power of two choices, among those
//! whose circuit breaker lets it pass.
//!
//! Of two endpoints picked at random, the one with fewer requests in flight.
//! Nearly as even as asking all of them, without the herd that runs to the
//! emptiest one at once (Mitzenmacher, "The Power of Two Choices in Randomized
//! Load Balancing", 2001). A request is in flight until its response body has
//! ended, so that a slow download weighs as much as it should.

use std::{io, iter, sync::Arc, time::Duration};

use buttress::{
    circuit_breaker::{Breaker, CircuitOpen},
    classify::Verdict,
};

use crate::upstream::{Connection, Endpoint, InFlight};

/// The endpoints of a route.
#[derive(Clone, Debug)]
pub(crate) struct Balance {
    endpoints: Arc<[Arc<Endpoint>]>,
    /// Around all of them; `None` where each has its own, or none has.
    breaker: Option<Breaker>,
}

impl Balance {
    /// Of at least one endpoint.
    pub(crate) fn new(
        endpoints: impl IntoIterator<Item = Arc<Endpoint>>,
        breaker: Option<Breaker>,
    ) -> Self {
        Self {
            endpoints: endpoints.into_iter().collect(),
            breaker,
        }
    }

    pub(crate) fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// Picks an endpoint and counts the request there: one that the request
    /// has not been to yet, if there is one.
    ///
    /// Fails where no breaker lets it pass, with the one that will be the
    /// first to take a probe.
    pub(crate) fn pick(&self, tried: &Tried) -> Result<InFlight, CircuitOpen> {
        let permit = self
            .breaker
            .as_ref()
            .map(Breaker::try_acquire)
            .transpose()?;
        let new = self.candidates(|it| !tried.has(it));
        let known = iter::once_with(|| self.candidates(|it| tried.has(it))).flatten();
        // And then any: others may have taken the place that was seen.
        let candidates = new.chain(known).chain(&*self.endpoints);
        let mut refusals = Vec::new();
        for endpoint in candidates {
            match endpoint.enter() {
                Ok(mut in_flight) => {
                    in_flight.permit = in_flight.permit.take().or(permit);
                    return Ok(in_flight);
                }
                Err(open) => refusals.push(open),
            }
        }
        let wait = |open: &CircuitOpen| open.retry_after().unwrap_or(Duration::MAX);
        Err(refusals
            .into_iter()
            .min_by_key(wait)
            .expect("there is an endpoint"))
    }

    /// Why none of them takes a request now, if none does.
    pub(crate) fn refusal(&self) -> Option<CircuitOpen> {
        let around = self.breaker.as_ref().is_none_or(Breaker::would_pass);
        if around && self.endpoints.iter().any(|it| it.passes()) {
            return None;
        }
        // In earnest, so that it counts as a refusal. If one lets it pass after
        // all, its place is free again at once.
        self.pick(&Tried::default()).err()
    }

    /// The one that is due for a probe, and the lighter one of two.
    fn candidates(
        &self,
        among: impl Fn(&Arc<Endpoint>) -> bool,
    ) -> impl Iterator<Item = &Arc<Endpoint>> {
        let endpoints = || self.endpoints.iter().filter(|it| among(it));
        // A probe comes first: an endpoint with many old requests in flight
        // would never be the lighter one, and so never be probed.
        let probed = endpoints().find(|it| it.wants_probe());
        let passing = endpoints().filter(|it| it.passes());
        let lighter = fastrand::choose_multiple(passing, 2)
            .into_iter()
            .min_by_key(|it| (it.rests(), it.in_flight(), fastrand::u32(..)));
        probed.into_iter().chain(lighter)
    }

    /// Connects to the endpoint that was picked: anew where a pooled
    /// connection was stale. One that cannot be reached costs the request
    /// nothing while there are others: none of it has left yet.
    pub(crate) async fn connect(
        &self,
        in_flight: &mut InFlight,
        stale: Option<&Connection>,
        tried: &mut Tried,
    ) -> io::Result<Connection> {
        let mut connected = in_flight.endpoint().connection(stale).await;
        while connected.is_err() && self.turn_elsewhere(in_flight, tried) {
            connected = in_flight.endpoint().connection(None).await;
        }
        connected
    }

    /// Takes the request to an endpoint where this attempt has not been, if
    /// there is one. The one that it leaves has failed.
    pub(crate) fn turn_elsewhere(&self, in_flight: &mut InFlight, tried: &mut Tried) -> bool {
        tried.now.push(Arc::clone(in_flight.endpoint()));
        let is_left = |it: &&Arc<Endpoint>| !contains(&tried.now, it);
        let mut others: Vec<_> = self.endpoints.iter().filter(is_left).collect();
        // Those that rest come last, but may be back.
        others.sort_by_cached_key(|it| (tried.has(it), it.rests(), it.in_flight()));
        let mut passing = others.into_iter().filter(|it| it.passes());
        let Some(mut other) = passing.find_map(|it| it.enter().ok()) else {
            return false;
        };
        if self.breaker.is_some() {
            // What the route's breaker hears is how the request ends.
            other.permit = in_flight.permit.take();
        } else {
            in_flight.record(Verdict::Failure);
        }
        *in_flight = other;
        true
    }
}

/// Where a request has been in vain.
#[derive(Debug, Default)]
pub(crate) struct Tried {
    /// In the attempts before.
    before: Vec<Arc<Endpoint>>,
    /// In this one: it goes on elsewhere as long as nothing has left.
    now: Vec<Arc<Endpoint>>,
}

impl Tried {
    fn has(&self, endpoint: &Arc<Endpoint>) -> bool {
        contains(&self.before, endpoint)
    }

    /// The attempt has ended at this endpoint.
    pub(crate) fn ended(&mut self, endpoint: &Arc<Endpoint>) {
        for tried in self.now.drain(..).chain([Arc::clone(endpoint)]) {
            if !contains(&self.before, &tried) {
                self.before.push(tried);
            }
        }
    }
}

fn contains(endpoints: &[Arc<Endpoint>], endpoint: &Arc<Endpoint>) -> bool {
    endpoints.iter().any(|it| Arc::ptr_eq(it, endpoint))
}

#[cfg(test)]
mod tests {
    use buttress::circuit_breaker::Settings;

    use super::*;

    fn breaker(endpoint: &Endpoint) -> &Breaker {
        endpoint.breaker.as_ref().unwrap()
    }

    fn three() -> Balance {
        let endpoint = |port: u16| {
            let breaker = Breaker::builder(format!("test@{port}"))
                .settings(Settings::new().consecutive_failures(1))
                .build();
            let upstream = format!("h2c://127.0.0.1:{port}").parse().unwrap();
            Endpoint::new(&upstream, Some(breaker.unwrap()), Duration::MAX)
        };
        Balance::new([1, 2, 3].map(endpoint), None)
    }

    #[test]
    fn the_load_spreads_evenly() {
        let balance = three();
        let held: Vec<_> = (0..300)
            .map(|_| balance.pick(&Tried::default()).unwrap())
            .collect();
        for endpoint in balance.endpoints() {
            // The gap between the fullest and the emptiest grows as log log n.
            assert!((95..=105).contains(&endpoint.in_flight()), "{endpoint:?}");
        }
        drop(held);
        assert!(
            balance
                .endpoints()
                .iter()
                .all(|endpoint| endpoint.in_flight() == 0)
        );
    }

    #[test]
    fn idle_ones_get_the_same() {
        let balance = three();
        let mut counts = [0; 3];
        for _ in 0..3000 {
            let in_flight = balance.pick(&Tried::default()).unwrap();
            let same = |it: &Arc<Endpoint>| Arc::ptr_eq(it, in_flight.endpoint());
            counts[balance.endpoints().iter().position(same).unwrap()] += 1;
        }
        // Six standard deviations.
        assert!(
            counts.iter().all(|count| (845..=1155).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn the_fullest_is_never_chosen() {
        let balance = three();
        let _busy: Vec<_> = (0..10)
            .map(|_| balance.endpoints()[1].enter().unwrap())
            .collect();
        for _ in 0..100 {
            let picked = balance.pick(&Tried::default()).unwrap();
            assert_ne!(&*picked.endpoint().url, "h2c://127.0.0.1:2");
        }
    }

    #[test]
    fn an_open_one_is_passed_over_however_empty_it_is() {
        let balance = three();
        let fail = |index: usize| {
            let mut in_flight = balance.endpoints()[index].enter().unwrap();
            in_flight.record(Verdict::Failure);
        };
        let _busy: Vec<_> = [0, 2, 2, 0, 0]
            .map(|index| balance.endpoints()[index].enter().unwrap())
            .into();
        fail(1);
        for _ in 0..100 {
            let picked = balance.pick(&Tried::default()).unwrap();
            assert_ne!(&*picked.endpoint().url, "h2c://127.0.0.1:2");
        }
        fail(0);
        fail(2);
        let open = balance.pick(&Tried::default()).unwrap_err();
        // The soonest, not the last.
        assert_eq!(open.name().as_deref(), Some("test@2"));
    }

    #[test]
    fn a_probe_comes_before_all_else_and_only_one() {
        let balance = three();
        let sick = &balance.endpoints()[1];
        let _busy: Vec<_> = (0..10).map(|_| sick.enter().unwrap()).collect();
        sick.enter().unwrap().record(Verdict::Failure);
        breaker(sick).half_open().unwrap();
        let probe = balance.pick(&Tried::default()).unwrap();
        assert!(Arc::ptr_eq(probe.endpoint(), sick));
        for _ in 0..100 {
            assert!(!Arc::ptr_eq(
                balance.pick(&Tried::default()).unwrap().endpoint(),
                sick
            ));
        }
        // Its client went away: the next one is the probe.
        drop(probe);
        assert!(Arc::ptr_eq(
            balance.pick(&Tried::default()).unwrap().endpoint(),
            sick
        ));
    }

    #[test]
    fn what_is_switched_off_is_no_probe() {
        let balance = three();
        let busy = &balance.endpoints()[1];
        let _busy: Vec<_> = (0..10).map(|_| busy.enter().unwrap()).collect();
        breaker(busy).force_closed();
        for _ in 0..100 {
            assert!(!Arc::ptr_eq(
                balance.pick(&Tried::default()).unwrap().endpoint(),
                busy
            ));
        }
    }

    #[test]
    fn around_all_of_them_it_decides_for_all() {
        let around = Breaker::builder("test").build().unwrap();
        let balance = Balance {
            breaker: Some(around.clone()),
            ..three()
        };
        assert!(balance.pick(&Tried::default()).unwrap().permit.is_some());
        around.force_open();
        let open = balance.pick(&Tried::default()).unwrap_err();
        assert_eq!(open.name().as_deref(), Some("test"));
    }

    #[test]
    fn another_attempt_goes_where_none_has_been_while_there_is_such_a_place() {
        let balance = three();
        let mut tried = Tried::default();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let picked = balance.pick(&tried).unwrap();
            assert!(!contains(&seen, picked.endpoint()));
            seen.push(Arc::clone(picked.endpoint()));
            tried.ended(picked.endpoint());
        }
        balance.pick(&tried).unwrap();

        // Better one that is known than one whose breaker is open.
        let mut tried = Tried::default();
        tried.ended(&seen[0]);
        for sick in &seen[1..] {
            sick.enter().unwrap().record(Verdict::Failure);
        }
        let picked = balance.pick(&tried).unwrap();
        assert!(Arc::ptr_eq(picked.endpoint(), &seen[0]));
        // And one that is due for a probe before one that is known.
        breaker(&seen[1]).half_open().unwrap();
        let picked = balance.pick(&tried).unwrap();
        assert!(Arc::ptr_eq(picked.endpoint(), &seen[1]));
    }
}
