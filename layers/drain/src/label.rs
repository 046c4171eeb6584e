//! Names for what is counted.

use std::{fmt, sync::Arc};

/// What something in flight is called in the report: a route's pattern, the
/// name of a job.
///
/// Meant to be one of a few: never a path with an identifier in it, a query
/// string or a key. Cheap to clone; from a `&'static str` it costs nothing.
/// More than 128 bytes are not kept.
#[derive(Clone)]
pub struct Label(Kind);

#[derive(Clone)]
enum Kind {
    Static(&'static str),
    Shared(Arc<str>),
}

/// The bytes that are kept.
const LONGEST: usize = 128;

fn cut(text: &str) -> &str {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Label {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Kind::Static(text) => text,
            Kind::Shared(text) => text,
        }
    }
}

impl From<&'static str> for Label {
    fn from(text: &'static str) -> Self {
        Self(Kind::Static(cut(text)))
    }
}

impl From<Arc<str>> for Label {
    fn from(text: Arc<str>) -> Self {
        if text.len() > LONGEST {
            return Self(Kind::Shared(cut(&text).into()));
        }
        Self(Kind::Shared(text))
    }
}

impl From<String> for Label {
    fn from(text: String) -> Self {
        Self(Kind::Shared(cut(&text).into()))
    }
}

impl PartialEq for Label {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Label {}

impl PartialEq<str> for Label {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Label {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_cut_between_characters() {
        let long = "é".repeat(100);
        for label in [Label::from(long.clone()), Label::from(Arc::from(&*long))] {
            assert_eq!(label.as_str(), "é".repeat(64));
        }
        let odd = format!("x{long}");
        assert_eq!(Label::from(odd).as_str().len(), 127);
        assert_eq!(Label::from("/orders/{id}"), "/orders/{id}");
    }
}
