//! What clients are told: `X-RateLimit-*` and the IETF draft's fields.

use std::{cmp::Reverse, fmt::Write, num::NonZeroU64, time::Duration};

use buttress_core::respond::integer;
use http::{HeaderMap, HeaderName, HeaderValue, header::ACCESS_CONTROL_EXPOSE_HEADERS};

use crate::store::{Standing, Table};

/// `X-RateLimit-Limit`: the burst.
pub(crate) const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
/// `X-RateLimit-Remaining`: how many of it are left.
pub(crate) const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
/// `X-RateLimit-Reset`: Unix seconds, rounded up, when all of it is back.
pub(crate) const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
/// `RateLimit` of the IETF draft.
pub(crate) const DRAFT: HeaderName = HeaderName::from_static("ratelimit");
/// `RateLimit-Policy` of the IETF draft.
pub(crate) const DRAFT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

const NANOS: u64 = 1_000_000_000;

/// A set of header fields that tell clients how they stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HeaderFormat {
    /// `X-RateLimit-Limit` (the burst), `X-RateLimit-Remaining` and
    /// `X-RateLimit-Reset` (Unix seconds, rounded up), of the tightest limit.
    XRateLimit,
    /// `RateLimit` and `RateLimit-Policy` as structured fields, one item a
    /// limit, after draft-ietf-httpapi-ratelimit-headers-11 (May 2026; -10 has
    /// the same shape). A draft may still change, so the variant has its
    /// number. The problem document of a 429 names the limit that refused
    /// among its `violated-policies`.
    Draft11,
}

/// The three X- headers of one response, as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XRateLimit {
    burst: u32,
    remaining: u32,
    /// Never zero, so that one that may not be there is no larger.
    reset: NonZeroU64,
}

impl XRateLimit {
    /// `unix_now` is the wall clock at the decision.
    pub(crate) fn new(standing: &Standing, unix_now: Duration) -> Self {
        // ⌈now + until⌉ in whole seconds, carried over the fractions of both.
        let nanos = u64::from(unix_now.subsec_nanos()) + standing.until_full % NANOS;
        let reset = unix_now.as_secs() + standing.until_full / NANOS + nanos.div_ceil(NANOS);
        Self {
            burst: standing.burst,
            remaining: standing.remaining,
            reset: NonZeroU64::new(reset).unwrap_or(NonZeroU64::MIN),
        }
    }

    /// Writes the headers, unless an inner layer has written tighter ones:
    /// fewer remaining, or as many and a later reset.
    pub(crate) fn write(self, headers: &mut HeaderMap) {
        // Responses without them are by far the most: one look-up then.
        if let Some(remaining) = headers.get(REMAINING) {
            let read = |value: &HeaderValue| value.to_str().ok()?.parse::<u64>().ok();
            if let (Some(remaining), Some(reset)) =
                (read(remaining), headers.get(RESET).and_then(read))
                && (remaining, Reverse(reset)) <= (self.remaining.into(), Reverse(self.reset.get()))
            {
                return;
            }
        } else {
            headers.reserve(3);
        }
        headers.insert(LIMIT, integer(self.burst.into()));
        headers.insert(REMAINING, integer(self.remaining.into()));
        headers.insert(RESET, integer(self.reset.get()));
    }
}

/// The draft's two fields for all limits of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    standing: HeaderValue,
    policy: HeaderValue,
}

impl Draft {
    pub(crate) fn new(tables: &[Table], all: &[Standing]) -> Self {
        let mut standing = String::with_capacity(32 * all.len());
        let mut policy = String::with_capacity(32 * all.len());
        for item in all {
            let comma = if standing.is_empty() { "" } else { ", " };
            standing.push_str(comma);
            policy.push_str(comma);
            let name = &tables[item.limit].name;
            quote(&mut standing, name);
            quote(&mut policy, name);
            let (left, more) = (item.remaining, item.until_more.div_ceil(NANOS));
            let (burst, window) = (item.burst, item.window.div_ceil(NANOS));
            write!(standing, ";r={left};t={more}").expect("a string takes all");
            write!(policy, ";q={burst};w={window}").expect("a string takes all");
        }
        let value = |text| HeaderValue::try_from(text).expect("names are printable ASCII");
        Self {
            standing: value(standing),
            policy: value(policy),
        }
    }

    /// Appends the fields: an inner layer's items stay.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        headers.append(DRAFT, self.standing.clone());
        headers.append(DRAFT_POLICY, self.policy.clone());
    }
}

/// A structured field's String (RFC 9651 §4.1.6); the name was checked to be
/// printable ASCII.
fn quote(out: &mut String, name: &str) {
    out.push('"');
    for c in name.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
}

/// Lets scripts of another origin read the headers.
pub(crate) fn expose(headers: &mut HeaderMap, formats: &[HeaderFormat]) {
    let mut names = Vec::with_capacity(2);
    for format in formats {
        names.push(match format {
            HeaderFormat::XRateLimit => {
                "x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset"
            }
            HeaderFormat::Draft11 => "ratelimit, ratelimit-policy",
        });
    }
    names.push("retry-after");
    let value = HeaderValue::try_from(names.join(", ")).expect("names are ASCII");
    headers.append(ACCESS_CONTROL_EXPOSE_HEADERS, value);
}
