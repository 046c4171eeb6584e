//! What can be wrong before anything is signed, and what is when it is.

use std::{error, fmt, io, sync::Arc};

/// A secret that cannot be one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SecretError {
    /// There is nothing: anyone could forge.
    Empty,
    /// It has fewer bytes than are safe.
    TooShort {
        /// How many it takes.
        least: usize,
    },
    /// It has more bytes than its scheme allows.
    TooLong,
    /// It, or what follows its prefix, is not base64.
    NotBase64,
    /// It is of a kind that its scheme does not sign with: a public key, say.
    WrongKind,
    /// Its name is not 1 to 128 printable characters of ASCII.
    Id,
    /// There is no such environment variable, or it is not Unicode.
    NoVariable(
        /// The variable's name.
        Box<str>,
    ),
    /// The file cannot be read.
    NoFile {
        /// The file.
        path: Box<str>,
        /// Why.
        error: Arc<io::Error>,
    },
    /// There is no secret at all.
    None,
    /// There are more secrets than are tried for a request.
    TooMany {
        /// How many may be.
        most: usize,
    },
    /// The scheme has room for one signature, so it signs with one secret.
    OneOnly {
        /// The scheme's name.
        scheme: &'static str,
    },
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a secret must not be empty"),
            Self::TooShort { least } => write!(f, "a secret must have at least {least} bytes"),
            Self::TooLong => f.write_str("the secret is too long"),
            Self::NotBase64 => f.write_str("the secret is not base64"),
            Self::WrongKind => f.write_str("the secret is not of a kind that this scheme uses"),
            Self::Id => {
                f.write_str("a secret's name must be 1 to 128 printable characters without quotes")
            }
            Self::NoVariable(name) => {
                write!(f, "there is no secret in the environment variable {name}")
            }
            Self::NoFile { path, .. } => write!(f, "the secret's file {path} cannot be read"),
            Self::None => f.write_str("at least one secret is needed"),
            Self::TooMany { most } => write!(f, "there may be at most {most} secrets"),
            Self::OneOnly { scheme } => {
                write!(
                    f,
                    "{scheme} has room for one signature, so it signs with one secret"
                )
            }
        }
    }
}

impl error::Error for SecretError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::NoFile { error, .. } => Some(&**error),
            _ => None,
        }
    }
}

/// A message that a scheme cannot sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SignError {
    /// Its id is not 1 to 256 printable characters of ASCII, or has a character
    /// that the scheme keeps for itself.
    Id,
    /// The request says too little of where it goes: no authority, in neither
    /// its target nor `Host`.
    Authority,
    /// It has none of a header field that is to be signed, or something in it
    /// that cannot be.
    Field,
}

impl fmt::Display for SignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Id => "the message's id cannot be signed by this scheme",
            Self::Authority => "the request has no authority that could be signed",
            Self::Field => "a header field that is to be signed is not there",
        })
    }
}

impl error::Error for SignError {}
