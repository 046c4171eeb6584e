#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod collect;
mod current;
mod error;
mod keyring;
mod mac;
mod scheme;
mod schemes;
mod secret;
pub mod sign;
mod signer;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
mod verifier;
pub mod verify;

pub use collect::WholeBody;
pub use error::{SecretError, SignError};
pub use keyring::Keyring;
pub use mac::{Key, TAG, Tag};
pub use scheme::{Envelope, LONGEST_ID, MOST_SIGNATURES, Message, Reason, Scheme, Statement};
#[cfg(feature = "http-signatures")]
pub use schemes::{Component, HttpSignatures, ParameterError};
pub use schemes::{GitHub, Sha256, Shopify, Slack, Standard, Stripe};
pub use secret::Secret;
pub use sign::{
    MessageId, MessageIdLayer, MessageIds, Sign, SignBuilder, SignConfigError, SignHandle,
    SignLayer,
};
pub use signer::Signer;
pub use verifier::{Verified, Verifier};
#[cfg(feature = "redis")]
pub use verify::RedisReplays;
pub use verify::{
    Claim, ClaimKey, ClaimToken, Lookup, LookupFn, OnStoreError, Repeat, ReplayStore, Settle,
    StoreFuture, Verify, VerifyBody, VerifyBuilder, VerifyConfigError, VerifyFuture, VerifyHandle,
    VerifyLayer, lookup_fn,
};
