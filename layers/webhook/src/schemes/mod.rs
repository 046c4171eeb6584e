//! The published ways of signing.

mod body;
mod slack;
mod standard;
mod stripe;

pub use self::{
    body::{GitHub, Sha256, Shopify},
    slack::Slack,
    standard::Standard,
    stripe::Stripe,
};
