//! Which events a registration is for, and finding the registrations of an
//! event without asking all of them.

use std::collections::hash_map::Entry;

use crate::{error::Problem, map::Map};

/// The longest name of an event, in bytes.
const LONGEST: usize = 128;

/// What a registration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// `*`
    All,
    /// `agent.done`
    Exact(Box<str>),
    /// `agent.*`, without the `.*`.
    Under(Box<str>),
}

/// Segments between dots, of letters, digits, `_`, `-`, `:` and `/`: what can
/// be shown anywhere, and holds no wildcard.
pub(crate) fn is_event(name: &str) -> bool {
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"_-:/".contains(&byte);
    name.len() <= LONGEST
        && name
            .split('.')
            .all(|segment| !segment.is_empty() && segment.bytes().all(sound))
}

impl Pattern {
    pub(crate) fn parse(text: &str) -> Result<Self, Problem> {
        if text == "*" {
            return Ok(Self::All);
        }
        let (name, under) = match text.strip_suffix(".*") {
            Some(name) => (name, true),
            None => (text, false),
        };
        if !is_event(name) {
            return Err(Problem::Pattern(text.into()));
        }
        Ok(if under {
            Self::Under(name.into())
        } else {
            Self::Exact(name.into())
        })
    }

    /// By itself: what the index is tested against.
    #[cfg(test)]
    fn matches(&self, event: &str) -> bool {
        match self {
            Self::All => true,
            Self::Exact(name) => **name == *event,
            Self::Under(name) => event
                .strip_prefix(&**name)
                .is_some_and(|rest| rest.starts_with('.')),
        }
    }
}

/// Registrations by what they ask for. A look-up costs a hash for each dot in
/// the event's name, and what it finds: nothing grows with the others.
#[derive(Debug, Default)]
pub(crate) struct Index {
    all: Vec<u64>,
    exact: Map<Box<str>, Vec<u64>>,
    under: Map<Box<str>, Vec<u64>>,
}

impl Index {
    pub(crate) fn insert(&mut self, pattern: &Pattern, number: u64) {
        let list = match pattern {
            Pattern::All => &mut self.all,
            Pattern::Exact(name) => self.exact.entry(name.clone()).or_default(),
            Pattern::Under(name) => self.under.entry(name.clone()).or_default(),
        };
        list.push(number);
    }

    pub(crate) fn remove(&mut self, pattern: &Pattern, number: u64) {
        fn take(list: &mut Vec<u64>, number: u64) {
            if let Some(at) = list.iter().rposition(|other| *other == number) {
                list.swap_remove(at);
            }
        }
        let (map, name) = match pattern {
            Pattern::All => return take(&mut self.all, number),
            Pattern::Exact(name) => (&mut self.exact, name),
            Pattern::Under(name) => (&mut self.under, name),
        };
        if let Entry::Occupied(mut entry) = map.entry(name.clone()) {
            take(entry.get_mut(), number);
            if entry.get().is_empty() {
                entry.remove();
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.exact.is_empty() && self.under.is_empty()
    }

    /// Adds those that want this event; one with several patterns that match,
    /// several times.
    pub(crate) fn find(&self, event: &str, found: &mut Vec<u64>) {
        found.extend(&self.all);
        found.extend(self.exact.get(event).into_iter().flatten());
        if self.under.is_empty() {
            return;
        }
        for (at, _) in event.match_indices('.') {
            found.extend(self.under.get(&event[..at]).into_iter().flatten());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pattern_is_a_name_everything_or_all_under_a_name() {
        let parsed = |text| Pattern::parse(text).ok();
        assert_eq!(parsed("*"), Some(Pattern::All));
        assert_eq!(parsed("a.b"), Some(Pattern::Exact("a.b".into())));
        assert_eq!(parsed("a.b.*"), Some(Pattern::Under("a.b".into())));
        let long = "x".repeat(129);
        for text in [
            "", ".", "a.", ".a", "a..b", "a*", "*.a", "a.*.b", "**", "a.**", ".*", "a b", "ä",
            "a\n", &long,
        ] {
            assert_eq!(parsed(text), None, "{text:?}");
        }
        assert!(is_event(&long[1..]));
    }

    #[test]
    fn what_is_under_a_name_is_under_it_however_deep() {
        let under = Pattern::parse("agent.*").unwrap();
        assert!(under.matches("agent.a") && under.matches("agent.a.b"));
        assert!(!under.matches("agent") && !under.matches("agents.a"));
    }

    fn name() -> impl Strategy<Value = String> {
        proptest::collection::vec("[ab]{1,2}", 1..4).prop_map(|segments| segments.join("."))
    }

    fn pattern() -> impl Strategy<Value = Pattern> {
        let text = prop_oneof![
            Just("*".to_owned()),
            name(),
            name().prop_map(|name| name + ".*"),
        ];
        text.prop_map(|text| Pattern::parse(&text).unwrap())
    }

    proptest! {
        /// The index finds what asking each pattern would, and after all are
        /// gone holds nothing.
        #[test]
        fn it_finds_what_matches(
            registered in proptest::collection::vec((pattern(), 0..8_u64, any::<bool>()), 0..40),
            events in proptest::collection::vec(name(), 1..10),
        ) {
            let mut index = Index::default();
            for (pattern, number, _) in &registered {
                index.insert(pattern, *number);
            }
            let (gone, stay): (Vec<_>, Vec<_>) =
                registered.into_iter().partition(|(_, _, gone)| *gone);
            for (pattern, number, _) in &gone {
                index.remove(pattern, *number);
            }
            for event in events {
                let mut found = Vec::new();
                index.find(&event, &mut found);
                found.sort_unstable();
                let matching = stay.iter().filter(|(pattern, ..)| pattern.matches(&event));
                let mut expected: Vec<u64> = matching.map(|(_, number, _)| *number).collect();
                expected.sort_unstable();
                prop_assert_eq!(found, expected);
            }
            for (pattern, number, _) in &stay {
                index.remove(pattern, *number);
            }
            prop_assert!(index.is_empty());
        }
    }
}
