//! Strict: what passes was charged in Redis.

use std::sync::Arc;

use super::{
    ask::FleetAsk,
    ground::{Ground, Unanswered},
};
use crate::{
    gcra::Tat,
    store::{Decision, Detail},
};

/// Every check that may pass is one of a script's in Redis.
pub(crate) struct Strict {
    ground: Arc<Ground>,
}

impl Strict {
    pub(crate) fn new(ground: Arc<Ground>) -> Self {
        Self { ground }
    }

    /// Refuses what is refused as far as this process knows.
    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        self.ground.foresee(asks, detail)
    }

    pub(crate) async fn decide(
        &self,
        _asks: &[FleetAsk],
        _detail: Detail,
    ) -> Result<Decision, Unanswered> {
        Err(Unanswered(None))
    }

    pub(crate) async fn refund(&self, _asks: &[FleetAsk]) -> Result<(), Unanswered> {
        Err(Unanswered(None))
    }

    pub(crate) async fn peek(&self, _ask: &FleetAsk) -> Result<(Tat, u64), Unanswered> {
        Err(Unanswered(None))
    }

    pub(crate) async fn reset(&self, _ask: &FleetAsk) -> Result<bool, Unanswered> {
        Err(Unanswered(None))
    }
}
