//! What both ends know and nobody else.

use std::{env, fmt, fs::File, io::Read, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use zeroize::Zeroizing;

use crate::SecretError;

/// Shorter ones are guessed.
const SHORTEST: usize = 8;
/// Larger than any key, and small enough to be read from a file by mistake.
const LONGEST: usize = 4096;

/// A secret that is shared with the other end: from it a
/// [scheme](crate::Scheme) makes its [`Key`](crate::Key).
///
/// What its characters mean is the scheme's to say: `whsec_…` is base64 with a
/// prefix to Standard Webhooks, and 38 plain characters to Stripe. At least 8
/// bytes, and what the scheme asks for beyond.
///
/// Cheap to clone. It is wiped when the last clone is dropped, and never shown:
/// [`Debug`](fmt::Debug) prints `***`.
///
/// ```
/// use buttress_webhook::Secret;
///
/// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// assert_eq!(format!("{secret:?}"), "Secret(***)");
/// assert!(Secret::new("").is_err());
/// # Ok::<(), buttress_webhook::SecretError>(())
/// ```
#[derive(Clone)]
pub struct Secret {
    bytes: Arc<Zeroizing<Vec<u8>>>,
    raw: bool,
    id: Option<Arc<str>>,
}

impl Secret {
    /// A secret as it is written down, to be read as its scheme says.
    ///
    /// A [`String`] is taken over and wiped in the end; of a `&str` the copy
    /// is.
    ///
    /// # Errors
    ///
    /// Unless it has 8 to 4096 bytes.
    pub fn new(text: impl Into<String>) -> Result<Self, SecretError> {
        Self::checked(Zeroizing::new(text.into().into_bytes()), false)
    }

    /// A secret that is the key's bytes themselves, whatever the scheme.
    ///
    /// # Errors
    ///
    /// Unless there are 8 to 4096 of them.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self, SecretError> {
        Self::checked(Zeroizing::new(bytes.into()), true)
    }

    /// The key's bytes in base64 (RFC 4648, padded), whatever the scheme.
    ///
    /// # Errors
    ///
    /// If it is not that, or not 8 to 4096 bytes.
    pub fn from_base64(text: impl Into<String>) -> Result<Self, SecretError> {
        let text = Zeroizing::new(text.into());
        let bytes = Zeroizing::new(
            BASE64_STANDARD
                .decode(text.as_bytes())
                .map_err(|_| SecretError::NotBase64)?,
        );
        Self::checked(bytes, true)
    }

    /// A secret as configuration names it: `env:NAME` is the value of an
    /// environment variable, `file:PATH` what a file holds (without the line
    /// break at its end), and anything else the secret itself.
    ///
    /// Reads the file at once, and blocks for it.
    ///
    /// # Errors
    ///
    /// If there is no such variable or file, or it does not hold a secret. The
    /// error names the variable or the file, never what it holds.
    pub fn load(source: &str) -> Result<Self, SecretError> {
        if let Some(name) = source.strip_prefix("env:") {
            let value = env::var(name).map_err(|_| SecretError::NoVariable(name.into()))?;
            return Self::new(value);
        }
        let Some(path) = source.strip_prefix("file:") else {
            return Self::new(source);
        };
        let unreadable = |error: std::io::Error| SecretError::NoFile {
            path: path.into(),
            error: Arc::new(error),
        };
        // No more than there is room for, whatever the file says of itself: some
        // have no end, and what grows leaves its bytes where it was.
        let most = LONGEST + 3;
        let mut bytes = Zeroizing::new(Vec::with_capacity(most));
        File::open(path)
            .and_then(|file| file.take(most as u64).read_to_end(&mut bytes))
            .map_err(unreadable)?;
        if bytes.ends_with(b"\n") {
            bytes.pop();
            if bytes.ends_with(b"\r") {
                bytes.pop();
            }
        }
        Self::checked(bytes, false)
    }

    /// The same secret under a name that the other end knows it by: what RFC
    /// 9421 calls `keyid`. Not secret.
    ///
    /// # Errors
    ///
    /// Unless it is 1 to 128 printable characters of ASCII, without `"` and
    /// `\`.
    pub fn with_id(mut self, id: impl Into<Arc<str>>) -> Result<Self, SecretError> {
        let id = id.into();
        let sound = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\';
        if id.is_empty() || id.len() > 128 || !id.bytes().all(sound) {
            return Err(SecretError::Id);
        }
        self.id = Some(id);
        Ok(self)
    }

    /// The name that [`with_id`](Self::with_id) gave it.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// The secret itself, for a scheme to make a key of it: do not keep it.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether these are the key's bytes, and no text to be read first.
    #[must_use]
    pub const fn is_raw(&self) -> bool {
        self.raw
    }

    pub(crate) fn shared_id(&self) -> Option<Arc<str>> {
        self.id.clone()
    }

    fn checked(bytes: Zeroizing<Vec<u8>>, raw: bool) -> Result<Self, SecretError> {
        match bytes.len() {
            0 => Err(SecretError::Empty),
            length if length < SHORTEST => Err(SecretError::TooShort { least: SHORTEST }),
            length if length > LONGEST => Err(SecretError::TooLong),
            _ => Ok(Self {
                bytes: Arc::new(bytes),
                raw,
                id: None,
            }),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn loaded(source: &str) -> Result<Vec<u8>, SecretError> {
        Secret::load(source).map(|secret| secret.expose().to_vec())
    }

    #[test]
    fn it_is_neither_empty_nor_short_nor_endless() {
        assert!(matches!(Secret::new(""), Err(SecretError::Empty)));
        let short = Secret::from_bytes([1; 7]);
        assert!(matches!(short, Err(SecretError::TooShort { least: 8 })));
        assert!(Secret::from_bytes([1; 8]).is_ok());
        let long = Secret::from_bytes([1; 4097]);
        assert!(matches!(long, Err(SecretError::TooLong)));
        assert!(matches!(
            Secret::from_base64("not base64!"),
            Err(SecretError::NotBase64)
        ));
    }

    #[test]
    fn it_is_read_from_where_configuration_says() {
        let folder = env::temp_dir().join(format!("buttress-secret-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("secret");
        let source = format!("file:{}", path.display());

        fs::write(&path, "correct horse\r\n").unwrap();
        assert_eq!(loaded(&source).unwrap(), b"correct horse");
        fs::write(&path, "correct horse\n\n").unwrap();
        assert_eq!(loaded(&source).unwrap(), b"correct horse\n");
        fs::write(&path, "\n").unwrap();
        assert!(matches!(loaded(&source), Err(SecretError::Empty)));
        fs::write(&path, [b'x'; 5000]).unwrap();
        assert!(matches!(loaded(&source), Err(SecretError::TooLong)));
        // One byte more than any, but for the line break.
        for (length, fits) in [(4096, true), (4097, false), (4098, false), (4099, false)] {
            let text = "x".repeat(length) + "\r\n";
            fs::write(&path, text).unwrap();
            assert_eq!(loaded(&source).is_ok(), fits, "{length}");
        }
        fs::remove_dir_all(&folder).unwrap();
        // It says that it is empty, and never ends.
        #[cfg(unix)]
        assert!(matches!(
            loaded("file:/dev/zero"),
            Err(SecretError::TooLong)
        ));
        let error = loaded(&source).unwrap_err();
        assert!(error.to_string().contains("secret"), "{error}");

        let error = loaded("env:BUTTRESS_NO_SUCH_SECRET").unwrap_err();
        assert!(error.to_string().contains("BUTTRESS_NO_SUCH_SECRET"));
        // One that every process has.
        assert!(loaded("env:CARGO_MANIFEST_DIR").unwrap().len() > 8);
        assert_eq!(loaded("plain text").unwrap(), b"plain text");
    }

    #[test]
    fn its_name_is_a_string_of_structured_fields() {
        let secret = Secret::new("correct horse").unwrap();
        assert_eq!(secret.clone().with_id("key 1").unwrap().id(), Some("key 1"));
        for id in ["", "a\"b", "a\\b", "a\nb", "ä", &"x".repeat(129)] {
            assert!(secret.clone().with_id(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn it_is_never_shown() {
        let secret = Secret::new("correct horse").unwrap();
        assert!(!format!("{secret:?} {secret:#?}").contains("horse"));
    }
}
