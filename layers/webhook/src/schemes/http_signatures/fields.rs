//! Dictionaries of structured fields (RFC 9651), as they were received: a
//! parser that keeps the last of two would have each end read another one.

use std::{error, fmt};

use http::{HeaderMap, HeaderName};
use sfv::{
    BareItemFromInput, DictSerializer, KeyRef, ListSerializer, Parser,
    visitor::{DictionaryVisitor, EntryVisitor, InnerListVisitor, ItemVisitor, ParameterVisitor},
};

use crate::Reason;

/// What one of these can have: members, items of a list, parameters of one.
/// More would have them compared for long.
const MOST: usize = 64;

/// A member of a dictionary. The key may stand twice.
pub(super) struct Member<'de> {
    pub(super) key: &'de KeyRef,
    pub(super) value: Value<'de>,
    pub(super) parameters: Parameters<'de>,
}

pub(super) enum Value<'de> {
    Item(BareItemFromInput<'de>),
    List(Vec<Item<'de>>),
}

impl<'de> From<BareItemFromInput<'de>> for Value<'de> {
    fn from(item: BareItemFromInput<'de>) -> Self {
        Self::Item(item)
    }
}

pub(super) struct Item<'de> {
    pub(super) value: BareItemFromInput<'de>,
    pub(super) parameters: Parameters<'de>,
}

/// No key stands twice.
#[derive(Default)]
pub(super) struct Parameters<'de>(Vec<(&'de KeyRef, BareItemFromInput<'de>)>);

impl<'de> Parameters<'de> {
    pub(super) fn get(&self, key: &str) -> Option<&BareItemFromInput<'de>> {
        let mut all = self.0.iter();
        all.find(|(there, _)| there.as_str() == key)
            .map(|(_, value)| value)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = (&'de KeyRef, &BareItemFromInput<'de>)> {
        self.0.iter().map(|(key, value)| (*key, value))
    }
}

/// The members of all lines of this header.
pub(super) fn read<'r>(
    headers: &'r HeaderMap,
    name: &HeaderName,
    missing: Reason,
) -> Result<Vec<Member<'r>>, Reason> {
    let mut members = Vec::new();
    for line in headers.get_all(name) {
        Parser::new(line)
            .parse_dictionary_with_visitor(Reader(&mut members))
            .map_err(|_| Reason::Malformed)?;
    }
    if members.is_empty() {
        return Err(missing);
    }
    for (at, member) in members.iter().enumerate() {
        if members[..at].iter().any(|before| before.key == member.key) {
            return Err(Reason::DuplicateHeader);
        }
    }
    Ok(members)
}

/// A list with its parameters in the one way that it is serialized, as RFC 9421
/// §2.5 has them signed.
pub(super) fn canonical(items: &[Item<'_>], parameters: &Parameters<'_>) -> String {
    let mut text = String::new();
    let mut list = ListSerializer::with_buffer(&mut text);
    let mut inner = list.inner_list();
    for item in items {
        let item_serializer = inner.bare_item(&item.value);
        let _ = item_serializer.parameters(item.parameters.iter());
    }
    let _ = inner.finish().parameters(parameters.iter());
    text
}

/// Those members of this header that are not told to go, as one line; nothing
/// if there are none, or if they cannot be read.
pub(super) fn others(
    headers: &HeaderMap,
    name: &HeaderName,
    goes: impl Fn(&str) -> bool,
) -> String {
    let members = read(headers, name, Reason::MissingSignature).unwrap_or_default();
    let mut text = String::new();
    let mut dictionary = DictSerializer::with_buffer(&mut text);
    for member in members.iter().filter(|member| !goes(member.key.as_str())) {
        match &member.value {
            Value::Item(value) => {
                let item = dictionary.bare_item(member.key, value);
                let _ = item.parameters(member.parameters.iter());
            }
            Value::List(items) => {
                let mut inner = dictionary.inner_list(member.key);
                for item in items {
                    let serializer = inner.bare_item(&item.value);
                    let _ = serializer.parameters(item.parameters.iter());
                }
                let _ = inner.finish().parameters(member.parameters.iter());
            }
        }
    }
    text
}

/// Too much, or a parameter twice.
#[derive(Debug)]
struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too much, or something twice")
    }
}

impl error::Error for Refused {}

fn push<T>(to: &mut Vec<T>, value: T) -> Result<&mut T, Refused> {
    if to.len() == MOST {
        return Err(Refused);
    }
    to.push(value);
    Ok(to.last_mut().expect("just pushed"))
}

/// What stands there until its value is read.
const UNREAD: BareItemFromInput<'static> = BareItemFromInput::Boolean(true);

struct Reader<'a, 'de>(&'a mut Vec<Member<'de>>);

impl<'de> DictionaryVisitor<'de> for Reader<'_, 'de> {
    type Out = ();
    type Error = Refused;

    fn entry(&mut self, key: &'de KeyRef) -> Result<impl EntryVisitor<'de>, Refused> {
        let member = Member {
            key,
            value: Value::Item(UNREAD),
            parameters: Parameters::default(),
        };
        push(self.0, member).map(EntryReader)
    }

    fn finish(self) -> Result<(), Refused> {
        Ok(())
    }
}

struct EntryReader<'a, 'de>(&'a mut Member<'de>);

impl<'de> EntryVisitor<'de> for EntryReader<'_, 'de> {
    type Error = Refused;

    fn item(self) -> Result<impl ItemVisitor<'de>, Refused> {
        let Member {
            value, parameters, ..
        } = self.0;
        Ok(ItemReader { value, parameters })
    }

    fn inner_list(self) -> Result<impl InnerListVisitor<'de>, Refused> {
        let Member {
            value, parameters, ..
        } = self.0;
        *value = Value::List(Vec::new());
        match value {
            Value::List(items) => Ok(ListReader { items, parameters }),
            Value::Item(_) => Err(Refused),
        }
    }
}

struct ListReader<'a, 'de> {
    items: &'a mut Vec<Item<'de>>,
    parameters: &'a mut Parameters<'de>,
}

impl<'de> InnerListVisitor<'de> for ListReader<'_, 'de> {
    type Error = Refused;

    fn item(&mut self) -> Result<impl ItemVisitor<'de>, Refused> {
        let item = Item {
            value: UNREAD,
            parameters: Parameters::default(),
        };
        let Item { value, parameters } = push(self.items, item)?;
        Ok(ItemReader { value, parameters })
    }

    fn finish(self) -> Result<impl ParameterVisitor<'de>, Refused> {
        Ok(ParameterReader(self.parameters))
    }
}

struct ItemReader<'a, 'de, T> {
    value: &'a mut T,
    parameters: &'a mut Parameters<'de>,
}

impl<'de, T: From<BareItemFromInput<'de>>> ItemVisitor<'de> for ItemReader<'_, 'de, T> {
    type Out = ();
    type Error = Refused;

    fn bare_item(
        self,
        read: BareItemFromInput<'de>,
    ) -> Result<impl ParameterVisitor<'de, Out = ()>, Refused> {
        *self.value = read.into();
        Ok(ParameterReader(self.parameters))
    }
}

struct ParameterReader<'a, 'de>(&'a mut Parameters<'de>);

impl<'de> ParameterVisitor<'de> for ParameterReader<'_, 'de> {
    type Out = ();
    type Error = Refused;

    fn parameter(
        &mut self,
        key: &'de KeyRef,
        value: BareItemFromInput<'de>,
    ) -> Result<(), Refused> {
        if self.0.get(key.as_str()).is_some() {
            return Err(Refused);
        }
        push(&mut self.0.0, (key, value)).map(|_| ())
    }

    fn finish(self) -> Result<(), Refused> {
        Ok(())
    }
}
