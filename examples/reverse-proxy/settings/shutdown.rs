//! How the proxy stops.

use buttress::drain;
use serde::Deserialize;

use super::{Delay, Span};

/// How long each part of stopping may take.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Shutdown {
    /// All is still served, while whoever sends requests hears of it.
    pub(super) drain_delay: Delay,
    /// All of it, hooks included.
    pub(super) timeout: Span,
    /// What of that is the hooks' alone.
    pub(super) hook_reserve: Delay,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self {
            drain_delay: Delay(Span::secs(5).0),
            timeout: Span::secs(30),
            hook_reserve: Delay(Span::secs(5).0),
        }
    }
}

impl Shutdown {
    /// As the layer has it, which says what makes no sense.
    pub(crate) fn builder(&self) -> drain::ShutdownBuilder {
        drain::Shutdown::builder()
            .drain_delay(self.drain_delay.0)
            .timeout(self.timeout.0)
            .hook_reserve(self.hook_reserve.0)
    }
}
