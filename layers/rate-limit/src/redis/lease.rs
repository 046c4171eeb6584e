//! Leased: tokens are taken ahead and charged here.

use std::sync::Arc;

use super::{
    ask::FleetAsk,
    ground::{Ground, Stand, Unanswered},
    strict::Strict,
};
use crate::store::{Decision, Detail};

/// How much is taken ahead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease(());

pub(crate) struct Leased(Strict);

impl Leased {
    pub(crate) fn new(ground: Arc<Ground>, _: Lease) -> Self {
        Self(Strict::new(ground))
    }

    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        self.0.decide_now(asks, detail)
    }

    pub(crate) async fn decide(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
    ) -> Result<Decision, Unanswered> {
        self.0.decide(asks, detail).await
    }

    pub(crate) async fn refund(&self, asks: &[FleetAsk]) -> Result<Vec<Stand>, Unanswered> {
        self.0.refund(asks).await
    }

    pub(crate) async fn peek(&self, ask: &FleetAsk) -> Result<Stand, Unanswered> {
        self.0.peek(ask).await
    }

    pub(crate) async fn reset(&self, ask: &FleetAsk) -> Result<bool, Unanswered> {
        self.0.reset(ask).await
    }
}
