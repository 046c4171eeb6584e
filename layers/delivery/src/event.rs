//! What has happened, and the bytes that tell of it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use buttress_core::label;
use bytes::Bytes;
use http::HeaderValue;
use serde_json::Value;

use crate::{EmitError, pattern};

/// Something that has happened, for [`Webhooks::emit`](crate::Webhooks::emit).
///
/// ```
/// use buttress_delivery::Event;
/// use serde_json::json;
///
/// let event = Event::new("agent.done", json!({"tokens": 12}))
///     .request_id("req_7")
///     .id("msg_2KWPBgLlAfxdpx2AI54pPJ85f4W");
/// assert_eq!(event.name(), "agent.done");
/// ```
#[derive(Clone)]
pub struct Event {
    name: String,
    data: Data,
    request_id: Option<Arc<str>>,
    id: Option<Arc<str>>,
}

#[derive(Clone)]
enum Data {
    Json(Value),
    Raw { content_type: String, bytes: Bytes },
}

impl Event {
    /// An event of this name. What is sent is JSON, as Standard Webhooks has
    /// it: `{"type": name, "id": …, "timestamp": …, "data": data}`, with the
    /// time of [`emit`](crate::Webhooks::emit) as RFC 3339 writes it.
    ///
    /// The name: 1 to 128 letters, digits, `_`, `-`, `:` and `/` of ASCII, in
    /// segments between dots.
    pub fn new(name: impl Into<String>, data: impl Into<Value>) -> Self {
        Self {
            name: name.into(),
            data: Data::Json(data.into()),
            request_id: None,
            id: None,
        }
    }

    /// An event whose body is these very bytes, of this content type.
    pub fn raw(
        name: impl Into<String>,
        content_type: impl Into<String>,
        bytes: impl Into<Bytes>,
    ) -> Self {
        Self {
            name: name.into(),
            data: Data::Raw {
                content_type: content_type.into(),
                bytes: bytes.into(),
            },
            request_id: None,
            id: None,
        }
    }

    /// The request that it is of: registrations of that
    /// [scope](crate::Scope::Request) are told, beside the global ones. 1 to 256
    /// printable characters of ASCII.
    #[must_use]
    pub fn request_id(mut self, id: impl Into<Arc<str>>) -> Self {
        self.request_id = Some(id.into());
        self
    }

    /// Its id: what a receiver knows a repeat by, sent as `webhook-id` with
    /// each attempt to each registration. 1 to 256 printable characters of
    /// ASCII, without spaces and dots. Default: one is made, unlike all others.
    ///
    /// It is not looked for: an event that is emitted twice is sent twice, with
    /// the same id, and the receiver drops the second.
    #[must_use]
    pub fn id(mut self, id: impl Into<Arc<str>>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn request(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    pub(crate) fn check(&self) -> Result<(), EmitError> {
        if !pattern::is_event(&self.name) {
            return Err(EmitError::Name);
        }
        let sound = |byte: u8| byte.is_ascii_graphic() && byte != b'.';
        if self.request().is_some_and(|id| !label::is_sound(id, 256)) {
            return Err(EmitError::RequestId);
        }
        match &self.id {
            Some(id) if id.is_empty() || id.len() > 256 || !id.bytes().all(sound) => {
                Err(EmitError::Id)
            }
            _ => Ok(()),
        }
    }

    /// The message: the same bytes for all who are told.
    pub(crate) fn seal(
        self,
        unix_now: Duration,
        most: usize,
        make_id: impl FnOnce() -> Arc<str>,
    ) -> Result<Message, EmitError> {
        let id = self.id.unwrap_or_else(make_id);
        let (content_type, body) = match self.data {
            Data::Raw {
                content_type,
                bytes,
            } => {
                let content_type =
                    HeaderValue::try_from(content_type).map_err(|_| EmitError::ContentType)?;
                (content_type, bytes)
            }
            Data::Json(data) => {
                let body = envelope(&self.name, &id, unix_now, &data);
                (HeaderValue::from_static("application/json"), body)
            }
        };
        if body.len() > most {
            return Err(EmitError::TooLarge { most });
        }
        Ok(Message {
            event: self.name.into(),
            id,
            request_id: self.request_id,
            content_type,
            body,
            emitted: unix_now,
        })
    }
}

fn envelope(name: &str, id: &str, unix_now: Duration, data: &Value) -> Bytes {
    // Far beyond what the format writes; a wall clock may say anything.
    let unix_now = unix_now.min(Duration::from_secs(253_402_300_799));
    let time = humantime::format_rfc3339_millis(UNIX_EPOCH + unix_now).to_string();
    let mut body = Vec::with_capacity(128);
    let mut part = |key: &str, value: &Value| {
        body.extend_from_slice(key.as_bytes());
        serde_json::to_writer(&mut body, value).expect("a value and a vector do not fail");
    };
    part("{\"type\":", &name.into());
    part(",\"id\":", &id.into());
    part(",\"timestamp\":", &time.into());
    part(",\"data\":", data);
    body.push(b'}');
    body.into()
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("name", &self.name)
            .field("request_id", &self.request_id)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// An event as it is sent: shared by all of its deliveries.
#[derive(Clone)]
pub struct Message {
    /// The event's name.
    pub event: Arc<str>,
    /// Its id: `webhook-id`.
    pub id: Arc<str>,
    /// The request that it is of.
    pub request_id: Option<Arc<str>>,
    /// The body's content type.
    pub content_type: HeaderValue,
    /// The very bytes that are signed and sent.
    pub body: Bytes,
    /// When it was emitted, since the Unix epoch.
    pub emitted: Duration,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What it tells of is the receiver's alone.
        f.debug_struct("Message")
            .field("event", &self.event)
            .field("id", &self.id)
            .field("request_id", &self.request_id)
            .field("length", &self.body.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_body_is_that_of_standard_webhooks() {
        let event = Event::new("a.b", json!({"text": "\"ä\""})).id("msg_1");
        let sealed = event.seal(Duration::from_millis(1_614_265_330_250), 1000, || panic!());
        let message = sealed.unwrap();
        assert_eq!(
            message.body,
            r#"{"type":"a.b","id":"msg_1","timestamp":"2021-02-25T15:02:10.250Z","data":{"text":"\"ä\""}}"#
        );
        assert_eq!(message.content_type, "application/json");
    }

    #[test]
    fn bytes_are_sent_as_they_are() {
        let bytes = Bytes::from_static(b"\xff\0");
        let event = Event::raw("a", "application/cbor", bytes.clone());
        let message = event.seal(Duration::MAX, 2, || "made".into()).unwrap();
        assert_eq!(message.body.as_ptr(), bytes.as_ptr());
        assert_eq!(
            (&*message.id, message.content_type),
            ("made", "application/cbor".parse().unwrap())
        );
        let event = Event::raw("a", "a\nb", bytes.clone());
        let refused = event.seal(Duration::ZERO, 2, || "made".into());
        assert!(matches!(refused, Err(EmitError::ContentType)));
        let refused = Event::raw("a", "a/b", bytes).seal(Duration::ZERO, 1, || "made".into());
        assert!(matches!(refused, Err(EmitError::TooLarge { most: 1 })));
        // No year has so many digits.
        let _ = Event::new("a", 1)
            .seal(Duration::MAX, 200, || "made".into())
            .unwrap();
    }

    #[test]
    fn a_name_and_an_id_that_can_be_signed() {
        assert!(Event::new("a.b", 1).id("msg_1").check().is_ok());
        assert!(matches!(Event::new("a.*", 1).check(), Err(EmitError::Name)));
        for id in ["", "a\nb", &"x".repeat(257)] {
            let event = Event::new("a", 1).request_id(id);
            assert!(matches!(event.check(), Err(EmitError::RequestId)), "{id:?}");
        }
        for id in ["", "a.b", "a b", "ä", &"x".repeat(257)] {
            let event = Event::new("a", 1).id(id);
            assert!(matches!(event.check(), Err(EmitError::Id)), "{id:?}");
        }
    }
}
