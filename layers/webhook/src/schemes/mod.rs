//! The published ways of signing.

mod body;
#[cfg(feature = "http-signatures")]
mod http_signatures;
mod slack;
mod standard;
mod stripe;

#[cfg(feature = "http-signatures")]
pub use self::http_signatures::{Component, HttpSignatures, ParameterError};
pub use self::{
    body::{GitHub, Sha256, Shopify},
    slack::Slack,
    standard::Standard,
    stripe::Stripe,
};
