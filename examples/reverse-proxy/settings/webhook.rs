//! The sections `verify_webhook` and `sign_webhook` of a route.

use std::{fmt, str::FromStr};

use buttress::webhook::{
    self, GitHub, Scheme, SecretError, Sha256, Signer, Slack, Standard, Stripe, VerifyBuilder,
    VerifyLayer,
};
use http::HeaderName;
use serde::{Deserialize, Deserializer};

use super::{
    OnStoreError, Secret, Span, present,
    scalar::{from_scalar, words},
};

words!(
    /// How requests are signed.
    By {
        Sha256 = "sha256",
        Standard = "standard",
        GitHub = "github",
        Stripe = "stripe",
        Slack = "slack"
    }
);

from_scalar!(By);

impl By {
    fn scheme(self) -> Box<dyn Scheme> {
        match self {
            Self::Sha256 => Box::new(Sha256::new()),
            Self::Standard => Box::new(Standard::new()),
            Self::GitHub => Box::new(GitHub),
            Self::Stripe => Box::new(Stripe),
            Self::Slack => Box::new(Slack),
        }
    }
}

/// Only what is signed by who has a secret goes upstream, and only once.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct VerifyWebhook {
    pub(crate) scheme: By,
    pub(crate) secrets: Vec<Secret>,
    #[serde(default = "five_minutes")]
    pub(crate) tolerance: Span,
    #[serde(default, deserialize_with = "present")]
    pub(crate) replay_protection: Option<bool>,
    #[serde(default = "deny")]
    pub(crate) on_store_error: OnStoreError,
}

const fn deny() -> OnStoreError {
    OnStoreError::Deny
}

const fn five_minutes() -> Span {
    Span::secs(300)
}

impl VerifyWebhook {
    /// Unless it is set, where the scheme signs an id or a time.
    pub(crate) fn effective_replay_protection(&self) -> bool {
        let scheme = self.scheme.scheme();
        let knows = scheme.signs_id() || scheme.signs_time();
        self.replay_protection.unwrap_or(knows)
    }

    /// The layer, without what all routes have in common. Of settings that have
    /// been checked.
    pub(crate) fn builder(&self) -> VerifyBuilder {
        let secrets = self.secrets.iter().map(Secret::of_webhook);
        let secrets: Result<Vec<_>, _> = secrets.collect();
        VerifyLayer::builder(self.scheme.scheme())
            .secrets(secrets.expect("checked in the settings"))
            .tolerance(self.tolerance.0)
            .replay_protection(self.effective_replay_protection())
            .on_store_error(match self.on_store_error {
                OnStoreError::Local => webhook::OnStoreError::Local,
                OnStoreError::Allow => webhook::OnStoreError::Allow,
                OnStoreError::Deny => webhook::OnStoreError::Deny,
            })
    }

    /// The key that makes no sense, as a path from here, and why.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        for (index, secret) in self.secrets.iter().enumerate() {
            if let Err(error) = self.scheme.check(secret) {
                let expected = format!("expected a secret of {}: {error}", self.scheme);
                return Err((format!(".secrets[{index}]"), expected));
            }
        }
        if self.secrets.is_empty() {
            let expected = "expected at least one secret".to_owned();
            return Err((".secrets".to_owned(), expected));
        }
        self.builder().build().map(drop).map_err(|error| {
            // All else has been looked at.
            let key = match self.secrets.len() {
                0..=16 => ".tolerance",
                _ => ".secrets",
            };
            (key.to_owned(), format!("expected less: {error}"))
        })
    }
}

/// Each attempt that goes upstream is signed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct SignWebhook {
    pub(crate) scheme: By,
    pub(crate) secret: Secret,
}

impl SignWebhook {
    /// Of settings that have been checked.
    pub(crate) fn signer(&self) -> Signer {
        let secret = self.secret.of_webhook().expect("checked in the settings");
        Signer::new(self.scheme.scheme(), [secret]).expect("checked in the settings")
    }

    /// Where the message's id stands, if the scheme has a header for it.
    pub(crate) fn id_header(&self) -> Option<HeaderName> {
        self.scheme.scheme().id_header().cloned()
    }

    /// The key that makes no sense, as a path from here, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        self.scheme.check(&self.secret).map_err(|error| {
            let expected = format!("expected a secret of {}: {error}", self.scheme);
            (".secret", expected)
        })
    }
}

impl By {
    fn check(self, secret: &Secret) -> Result<(), SecretError> {
        self.scheme().key(&secret.of_webhook()?).map(drop)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
