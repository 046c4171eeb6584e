//! One store for a fleet: whichever mode, one face.

use std::sync::Arc;

use super::{
    Mode,
    ask::FleetAsk,
    ground::{Ground, Stand, Unanswered},
    lease::Leased,
    strict::Strict,
};
use crate::store::{Decision, Detail};

/// How a fleet shares its limits.
pub(crate) enum Fleet {
    Strict(Strict),
    Leased(Leased),
}

impl Fleet {
    pub(crate) fn new(ground: Arc<Ground>, mode: Mode) -> Self {
        match mode {
            Mode::Strict => Self::Strict(Strict::new(ground)),
            Mode::Leased(lease) => Self::Leased(Leased::new(ground, lease)),
        }
    }

    /// Decides here and now, where no one else need be asked.
    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        match self {
            Self::Strict(strict) => strict.decide_now(asks, detail),
            Self::Leased(leased) => leased.decide_now(asks, detail),
        }
    }

    /// Decides all of `asks`, of which there is one: charges all or none.
    ///
    /// Dropped, it has charged once or not at all.
    pub(crate) async fn decide(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
    ) -> Result<Decision, Unanswered> {
        match self {
            Self::Strict(strict) => strict.decide(asks, detail).await,
            // It seldom has to wait: all wait in what is no larger for it.
            Self::Leased(leased) => Box::pin(leased.decide(asks, detail)).await,
        }
    }

    /// Gives the charges back, forgets what was known of the keys, and tells
    /// how they stand then.
    pub(crate) async fn refund(&self, asks: &[FleetAsk]) -> Result<Vec<Stand>, Unanswered> {
        match self {
            Self::Strict(strict) => strict.refund(asks).await,
            Self::Leased(leased) => leased.refund(asks).await,
        }
    }

    /// When the key's quota is whole again, and what time it is.
    pub(crate) async fn peek(&self, ask: &FleetAsk) -> Result<Stand, Unanswered> {
        match self {
            Self::Strict(strict) => strict.peek(ask).await,
            Self::Leased(leased) => leased.peek(ask).await,
        }
    }

    /// Makes the key's quota whole. Whether it was not.
    pub(crate) async fn reset(&self, ask: &FleetAsk) -> Result<bool, Unanswered> {
        match self {
            Self::Strict(strict) => strict.reset(ask).await,
            Self::Leased(leased) => leased.reset(ask).await,
        }
    }

    /// Gives back what was taken ahead, and takes nothing more so.
    pub(crate) async fn give_back(&self) {
        if let Self::Leased(leased) = self {
            leased.give_back().await;
        }
    }
}
