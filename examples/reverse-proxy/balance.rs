//! Which endpoint a request goes to: the power of two choices.
//!
//! Of two endpoints picked at random, the one with fewer requests in flight.
//! Nearly as even as asking all of them, without the herd that runs to the
//! emptiest one at once (Mitzenmacher, "The Power of Two Choices in Randomized
//! Load Balancing", 2001). A request is in flight until its response body has
//! ended, so that a slow download weighs as much as it should.

use std::{io, sync::Arc};

use crate::upstream::{Connection, Endpoint, InFlight};

/// The endpoints of a route.
#[derive(Clone, Debug)]
pub(crate) struct Balance(Arc<[Arc<Endpoint>]>);

impl Balance {
    /// Of at least one endpoint.
    pub(crate) fn new(endpoints: impl IntoIterator<Item = Arc<Endpoint>>) -> Self {
        Self(endpoints.into_iter().collect())
    }

    pub(crate) fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.0
    }

    /// Picks an endpoint and counts the request there.
    pub(crate) fn pick(&self) -> InFlight {
        let count = self.0.len();
        if count == 1 {
            return self.0[0].enter();
        }
        let first = fastrand::usize(..count);
        // Any other one: a step of 1 to count - 1, around the circle.
        let second = (first + fastrand::usize(1..count)) % count;
        let load = |index: usize| {
            let endpoint = &self.0[index];
            (endpoint.rests(), endpoint.in_flight())
        };
        let lighter = if load(second) < load(first) {
            second
        } else {
            first
        };
        self.0[lighter].enter()
    }

    /// Picks an endpoint and connects to it. One that cannot be reached costs
    /// the request nothing while there are others: none of it has left yet.
    pub(crate) async fn connect(&self) -> (InFlight, io::Result<Connection>) {
        let mut in_flight = self.pick();
        for _ in 1..self.0.len() {
            let connection = in_flight.endpoint().connection(None).await;
            if connection.is_ok() {
                return (in_flight, connection);
            }
            // It rests now, and two picked at random could both be resting.
            let others = self.0.iter().filter(|endpoint| !endpoint.rests());
            match others.min_by_key(|endpoint| endpoint.in_flight()) {
                Some(other) => in_flight = other.enter(),
                None => return (in_flight, connection),
            }
        }
        let connection = in_flight.endpoint().connection(None).await;
        (in_flight, connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Balance {
        let endpoint =
            |port: u16| Endpoint::new(&format!("h2c://127.0.0.1:{port}").parse().unwrap());
        Balance::new([1, 2, 3].map(endpoint))
    }

    #[test]
    fn the_load_spreads_evenly() {
        let balance = three();
        let held: Vec<_> = (0..300).map(|_| balance.pick()).collect();
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
    fn the_fullest_is_never_chosen() {
        let balance = three();
        let _busy: Vec<_> = (0..10).map(|_| balance.endpoints()[1].enter()).collect();
        for _ in 0..100 {
            assert_ne!(&*balance.pick().endpoint().url, "h2c://127.0.0.1:2");
        }
    }
}
