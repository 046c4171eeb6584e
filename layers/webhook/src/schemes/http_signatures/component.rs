//! What of a request is signed (RFC 9421 §2).

use buttress_core::Head;
use http::{
    HeaderName, HeaderValue, Version,
    header::HOST,
    uri::{Authority, Scheme},
};

use crate::{Reason, SignError};

pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// A part of a request that a [`HttpSignatures`](crate::HttpSignatures) covers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Component {
    /// `@method`: the method, as it is.
    Method,
    /// `@authority`: host and port in small letters, without the port that is
    /// the scheme's own.
    Authority,
    /// `@scheme`: `https`, say.
    Scheme,
    /// `@target-uri`: scheme, authority, path and query.
    TargetUri,
    /// `@path`: the path, at least `/`.
    Path,
    /// `@query`: `?` and the query; `?` alone where there is none.
    Query,
    /// A header field: all its lines, with `, ` between.
    Field(HeaderName),
}

impl Component {
    /// The body, by its SHA-256: `content-digest` (RFC 9530), which is written
    /// when a message is signed, and compared with the body when it is
    /// verified.
    #[must_use]
    pub const fn content_digest() -> Self {
        Self::Field(CONTENT_DIGEST)
    }

    /// Its name, as it is signed.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Method => "@method",
            Self::Authority => "@authority",
            Self::Scheme => "@scheme",
            Self::TargetUri => "@target-uri",
            Self::Path => "@path",
            Self::Query => "@query",
            Self::Field(name) => name.as_str(),
        }
    }

    pub(super) fn named(name: &str) -> Result<Self, Reason> {
        Ok(match name {
            "@method" => Self::Method,
            "@authority" => Self::Authority,
            "@scheme" => Self::Scheme,
            "@target-uri" => Self::TargetUri,
            "@path" => Self::Path,
            "@query" => Self::Query,
            name if name.starts_with('@') => return Err(Reason::UnsupportedScheme),
            // It would be taken for the same in small letters, which is signed
            // in another way.
            name if name.bytes().any(|byte| byte.is_ascii_uppercase()) => {
                return Err(Reason::Malformed);
            }
            name => {
                let name = HeaderName::from_bytes(name.as_bytes());
                Self::Field(name.map_err(|_| Reason::Malformed)?)
            }
        })
    }
}

/// Which end it is.
#[derive(Clone, Copy)]
pub(super) enum End<'a> {
    /// With the digest that goes with the request.
    Sender(Option<&'a HeaderValue>),
    Receiver,
}

/// A request, and what is known better of where it goes than it says.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) request: Head<'a>,
    pub(super) scheme: Option<&'a Scheme>,
    pub(super) authority: Option<&'a Authority>,
    pub(super) end: End<'a>,
}

impl Target<'_> {
    /// Appends the value of a component.
    pub(super) fn write(&self, component: &Component, to: &mut Vec<u8>) -> Result<(), SignError> {
        let uri = self.request.uri;
        match component {
            Component::Method => to.extend(self.request.method.as_str().bytes()),
            Component::Authority => self.write_authority(to)?,
            Component::Scheme => to.extend(self.scheme().bytes()),
            Component::TargetUri => {
                to.extend(self.scheme().bytes());
                to.extend(b"://");
                self.write_authority(to)?;
                self.write_path(to);
                if let Some(query) = uri.query() {
                    to.push(b'?');
                    to.extend(query.bytes());
                }
            }
            Component::Path => self.write_path(to),
            Component::Query => {
                to.push(b'?');
                to.extend(uri.query().unwrap_or_default().bytes());
            }
            Component::Field(name) => self.write_field(name, to)?,
        }
        Ok(())
    }

    /// A server is told its scheme by nobody: what is signed goes by TLS, most
    /// often.
    fn scheme(&self) -> String {
        let scheme = self.scheme.or(self.request.uri.scheme());
        scheme.map_or("https", Scheme::as_str).to_ascii_lowercase()
    }

    fn write_path(&self, to: &mut Vec<u8>) {
        let path = self.request.uri.path();
        to.extend(if path.is_empty() { "/" } else { path }.bytes());
    }

    fn write_authority(&self, to: &mut Vec<u8>) -> Result<(), SignError> {
        let host;
        let authority = match self.authority {
            Some(authority) => authority,
            None => {
                let from_uri = self.request.uri.authority();
                let over_host = match self.end {
                    // What goes as HTTP/1 goes with the `Host` that is set.
                    End::Sender(_) => {
                        self.request.version >= Version::HTTP_2
                            || !self.request.headers.contains_key(HOST)
                    }
                    // RFC 9112 §3.2.2, and HTTP/2's `:authority`.
                    End::Receiver => true,
                };
                match from_uri {
                    Some(authority) if over_host => authority,
                    _ => {
                        host = self.host()?;
                        &host
                    }
                }
            }
        };
        let name = authority.host();
        let after_name = authority.as_str().rsplit('@').next().unwrap_or_default();
        let port = match after_name.get(name.len()..) {
            None | Some("" | ":") => None,
            Some(_) => Some(authority.port_u16().ok_or(SignError::Authority)?),
        };
        if name.is_empty() {
            return Err(SignError::Authority);
        }
        to.extend(name.bytes().map(|byte| byte.to_ascii_lowercase()));
        let usual = match &*self.scheme() {
            "https" => Some(443),
            "http" => Some(80),
            _ => None,
        };
        if let Some(port) = port
            && Some(port) != usual
        {
            to.push(b':');
            to.extend(itoa::Buffer::new().format(port).bytes());
        }
        Ok(())
    }

    fn host(&self) -> Result<Authority, SignError> {
        let mut values = self.request.headers.get_all(HOST).iter();
        let value = values.next().ok_or(SignError::Authority)?;
        if values.next().is_some() {
            return Err(SignError::Authority);
        }
        Authority::try_from(value.as_bytes()).map_err(|_| SignError::Authority)
    }

    /// RFC 9421 §2.1.
    fn write_field(&self, name: &HeaderName, to: &mut Vec<u8>) -> Result<(), SignError> {
        if let End::Sender(Some(digest)) = self.end
            && *name == CONTENT_DIGEST
        {
            to.extend_from_slice(digest.as_bytes());
            return Ok(());
        }
        let mut values = self.request.headers.get_all(name).iter();
        let first = values.next().ok_or(SignError::Field)?;
        to.extend_from_slice(trimmed(first));
        for value in values {
            to.extend_from_slice(b", ");
            to.extend_from_slice(trimmed(value));
        }
        Ok(())
    }
}

fn trimmed(value: &HeaderValue) -> &[u8] {
    value.as_bytes().trim_ascii()
}
