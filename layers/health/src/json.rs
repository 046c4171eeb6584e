//! JSON with its members in the order in which they are written.

use std::fmt::Write;

use serde_json::Value;

/// An object being written.
#[derive(Debug)]
pub(crate) struct Object(String);

impl Object {
    pub(crate) fn new() -> Self {
        Self(String::from("{"))
    }

    /// The name is a word of ours, which needs no escaping.
    pub(crate) fn put(&mut self, name: &'static str, value: impl Into<Value>) {
        self.name(name);
        write!(self.0, "{}", value.into()).expect("a string takes all");
    }

    pub(crate) fn list(&mut self, name: &'static str, items: impl IntoIterator<Item = Self>) {
        self.name(name);
        let items: Vec<String> = items.into_iter().map(Self::end).collect();
        write!(self.0, "[{}]", items.join(",")).expect("a string takes all");
    }

    fn name(&mut self, name: &'static str) {
        let comma = if self.0.len() > 1 { "," } else { "" };
        write!(self.0, "{comma}\"{name}\":").expect("a string takes all");
    }

    pub(crate) fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_was_put_in_order() {
        assert_eq!(Object::new().end(), "{}");
        let mut inner = Object::new();
        inner.put("name", "say \"so\"\n");
        let mut object = Object::new();
        object.put("ready", true);
        object.put("score", 1.0);
        object.put("age_ms", Value::Null);
        object.list("none", []);
        object.list("list", [inner, Object::new()]);
        let text = object.end();
        assert_eq!(
            text,
            r#"{"ready":true,"score":1.0,"age_ms":null,"none":[],"list":[{"name":"say \"so\"\n"},{}]}"#
        );
        assert!(serde_json::from_str::<Value>(&text).is_ok());
    }
}
