//! Breakers that open and close in all processes of a fleet.
//!
//! ```text
//! cell ──▶ link ──▶ hub ──▶ script ──▶ record, index, channel
//!  ▲        │ ▲      │                              │
//!  └────────┘ └──────┴──── messages, pulls ◀────────┘
//! ```

mod config;
mod hub;
mod link;
mod record;
mod script;
#[cfg(all(test, not(buttress_loom)))]
mod sim;

pub(crate) use config::Membership;
pub use config::{FleetStatus, Sharing};
pub(crate) use hub::Hub;
pub(crate) use link::Link;
pub(crate) use record::{Op, Verdict};
