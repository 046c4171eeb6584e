//! Content types whose bodies go on for as long as somebody listens.

use std::fmt;

use super::intern::Interned;

/// A set of media types, without their parameters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamingTypes(&'static Types);

/// In lower case, sorted, each once: equal sets are equal.
type Types = Vec<Box<str>>;

static NONE: Types = Vec::new();
static CUSTOM: Interned<Types> = Interned::new();

impl StreamingTypes {
    pub(super) fn new(types: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let mut types: Types = types
            .into_iter()
            .map(|name| {
                let name = name.as_ref();
                let essence = name.split(';').next().unwrap_or(name);
                essence.trim_ascii().to_ascii_lowercase().into_boxed_str()
            })
            .filter(|name| !name.is_empty())
            .collect();
        types.sort_unstable();
        types.dedup();
        if types.is_empty() {
            Self::default()
        } else {
            Self(CUSTOM.get(types))
        }
    }

    /// Whether this content-type's essence is one of them.
    pub(super) fn has(self, content_type: Option<&[u8]>) -> bool {
        let Some(value) = content_type.filter(|_| !self.0.is_empty()) else {
            return false;
        };
        let end = value.iter().position(|byte| *byte == b';');
        let essence = value[..end.unwrap_or(value.len())].trim_ascii();
        self.0
            .iter()
            .any(|name| essence.eq_ignore_ascii_case(name.as_bytes()))
    }
}

impl Default for StreamingTypes {
    fn default() -> Self {
        Self(&NONE)
    }
}

impl fmt::Debug for StreamingTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0).finish()
    }
}
