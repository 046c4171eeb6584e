//! What is worth another attempt over HTTP, and what may be sent twice.

use std::{collections::BTreeSet, error::Error, fmt, io, sync::Arc};

use buttress_core::{
    Head, Refusal, RefusalKind,
    classify::{GrpcCode, Trailers, Verdict},
    clock::SharedWallClock,
    retry_after::{self, Pushback},
};
use http::{Extensions, HeaderMap, HeaderName, Method, StatusCode};

use crate::{
    Cause,
    session::{Hint, Seen},
};

/// `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// How an attempt went, as closures are shown it.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// The head of a response.
    Response {
        /// Its status.
        status: StatusCode,
        /// Its header fields.
        headers: &'a HeaderMap,
        /// What layers further in attached: the [`Refusal`] that it was made
        /// of, for one ([`Refusal::of`]).
        extensions: &'a Extensions,
    },
    /// An error, or `None` where its type cannot be looked at.
    Error(Option<&'a (dyn Error + 'static)>),
}

impl<'a> Outcome<'a> {
    /// What a layer further in has refused it with. Who has made a good answer
    /// of that since has the last word.
    fn refusal(self, head: Head<'_>) -> Option<&'a Refusal> {
        match self {
            Self::Error(error) => error.and_then(Refusal::find),
            Self::Response {
                status,
                headers,
                extensions,
            } => {
                let refusal = Refusal::of(extensions)?;
                let is_bad = if head.is_grpc() {
                    grpc_code(status, headers).is_some_and(|code| code != GrpcCode::Ok)
                } else {
                    status.is_client_error() || status.is_server_error()
                };
                is_bad.then_some(refusal)
            }
        }
    }
}

/// The code of a response that has one in its head; `None` where there is a
/// body to come.
fn grpc_code(status: StatusCode, headers: &HeaderMap) -> Option<GrpcCode> {
    match GrpcCode::of(headers) {
        Some(code) => Some(code),
        None if status == StatusCode::OK => None,
        None => Some(GrpcCode::from_http(status)),
    }
}

/// Which requests may be sent twice though the callee may have acted on the
/// first. (What was surely not begun may always be.)
#[derive(Clone, Default)]
pub(crate) enum Repeat {
    /// By method, or any with `Idempotency-Key`.
    #[default]
    ByMethod,
    Always,
    Never,
    By(Arc<dyn Fn(Head<'_>) -> bool + Send + Sync>),
}

type Asked = Arc<dyn Fn(Head<'_>, Outcome<'_>) -> Option<bool> + Send + Sync>;

/// The rules of a layer over HTTP.
#[derive(Clone)]
pub(crate) struct Rules {
    pub(crate) methods: Vec<Method>,
    pub(crate) repeat: Repeat,
    pub(crate) statuses: BTreeSet<u16>,
    pub(crate) codes: Vec<GrpcCode>,
    pub(crate) asked: Option<Asked>,
    pub(crate) wall_clock: SharedWallClock,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            methods: vec![
                Method::GET,
                Method::HEAD,
                Method::OPTIONS,
                Method::TRACE,
                Method::PUT,
                Method::DELETE,
            ],
            repeat: Repeat::ByMethod,
            statuses: [408, 425, 429, 500, 502, 503, 504].into(),
            codes: vec![GrpcCode::Unavailable],
            asked: None,
            wall_clock: SharedWallClock::default(),
        }
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules")
            .field("methods", &self.methods)
            .field("statuses", &self.statuses)
            .field("codes", &self.codes)
            .finish_non_exhaustive()
    }
}

impl Rules {
    /// Whether the request may be sent twice whatever became of it.
    ///
    /// gRPC is POST throughout: there the codes say what may be.
    pub(crate) fn may_repeat(&self, head: Head<'_>) -> bool {
        let by_code = matches!(self.repeat, Repeat::ByMethod) && head.is_grpc();
        by_code || self.may_send_twice(head)
    }

    /// Whether it may be sent again before anything became of it.
    pub(crate) fn may_send_twice(&self, head: Head<'_>) -> bool {
        match &self.repeat {
            Repeat::Always => true,
            Repeat::Never => false,
            Repeat::By(asked) => asked(head),
            Repeat::ByMethod => {
                self.methods.contains(head.method) || head.headers.contains_key(IDEMPOTENCY_KEY)
            }
        }
    }

    /// What there is to another attempt; `None` where the result stands.
    /// `refusal` is what an error is that does not show it.
    pub(crate) fn judge(
        &self,
        head: Head<'_>,
        outcome: Outcome<'_>,
        refusal: Option<&Refusal>,
    ) -> Option<Seen> {
        let seen = match refusal {
            Some(refusal) => of_refusal(refusal),
            None => self.see(head, outcome),
        };
        let seen = seen.filter(|seen| !head.is_grpc() || self.has_code_of(seen.cause));
        match self.asked.as_ref().and_then(|asked| asked(head, outcome)) {
            None => seen,
            Some(false) => None,
            Some(true) => Some(seen.unwrap_or_else(|| {
                let cause = match (refusal.or_else(|| outcome.refusal(head)), outcome) {
                    (Some(refusal), _) => return self.refused(head, outcome, refusal),
                    (None, Outcome::Response { status, .. }) => Cause::Status(status),
                    (None, Outcome::Error(_)) => Cause::Error,
                };
                let hint = self.hint(head, outcome);
                Seen { cause, hint }
            })),
        }
    }

    /// Whether a gRPC request that failed so may be sent again: an error is no
    /// better than the code that it would have been.
    fn has_code_of(&self, cause: Cause) -> bool {
        let has = |number: u8| self.codes.iter().any(|code| *code as u8 == number);
        cause.was_never_begun()
            || match cause {
                Cause::Refused(kind) => has(kind.grpc_code()),
                Cause::Reset => has(GrpcCode::Unavailable as u8),
                _ => true,
            }
    }

    fn see(&self, head: Head<'_>, outcome: Outcome<'_>) -> Option<Seen> {
        let (status, headers) = match outcome {
            Outcome::Error(error) => return error.and_then(of_error),
            Outcome::Response {
                status,
                headers,
                extensions,
            } if head.is_grpc() => (status, Trailers::or_headers(headers, extensions)),
            Outcome::Response {
                status, headers, ..
            } => (status, headers),
        };
        let is_listed = || self.statuses.contains(&status.as_u16());
        if let Some(refusal) = outcome.refusal(head)
            && passes(refusal.kind())
            // Of what may have begun, the status counts too.
            && (head.is_grpc() || refusal.was_never_sent() || is_listed())
        {
            return Some(self.refused(head, outcome, refusal));
        }
        let cause = if head.is_grpc() {
            let code = grpc_code(status, headers)?;
            self.codes.contains(&code).then_some(Cause::Grpc(code))?
        } else {
            is_listed().then_some(Cause::Status(status))?
        };
        let hint = self.hint(head, outcome);
        Some(Seen { cause, hint })
    }

    /// Of a refusal. Its own word of when counts, and the header, which is
    /// rounded, only where it has none.
    fn refused(&self, head: Head<'_>, outcome: Outcome<'_>, refusal: &Refusal) -> Seen {
        let seen = told_by(refusal);
        match seen.hint {
            Hint::None => Seen {
                hint: self.hint(head, outcome),
                ..seen
            },
            _ => seen,
        }
    }

    /// When the callee would like to be asked again.
    fn hint(&self, head: Head<'_>, outcome: Outcome<'_>) -> Hint {
        let Outcome::Response {
            headers,
            extensions,
            ..
        } = outcome
        else {
            return Hint::None;
        };
        if head.is_grpc() {
            match retry_after::pushback(Trailers::or_headers(headers, extensions)) {
                Some(Pushback::After(wait)) => return Hint::At(wait),
                Some(Pushback::Never) => return Hint::Never,
                None => {}
            }
        }
        match retry_after::parse(headers, self.wall_clock.unix_now()) {
            Some(wait) => Hint::After(wait),
            None => Hint::None,
        }
    }
}

/// What an answer that stands is to a budget: a success brings leave back, a
/// server's error that is not retried (501, gRPC's INTERNAL) does not, and
/// gRPC's word not to come again counts as a failure (gRFC A6).
pub(crate) fn verdict(
    head: Head<'_>,
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Verdict {
    if !head.is_grpc() {
        return if status.is_server_error() {
            Verdict::Ignored
        } else {
            Verdict::Success
        };
    }
    let fields = Trailers::or_headers(headers, extensions);
    if grpc_code(status, fields).is_none_or(|code| code == GrpcCode::Ok) {
        Verdict::Success
    } else if retry_after::pushback(fields) == Some(Pushback::Never) {
        Verdict::Failure
    } else {
        Verdict::Ignored
    }
}

/// What there is to an error: refusals of our own layers, and what the
/// transport says. Others stand.
pub(crate) fn of_error(error: &(dyn Error + 'static)) -> Option<Seen> {
    if let Some(refusal) = Refusal::find(error) {
        return of_refusal(refusal);
    }
    let mut next = Some(error);
    for _ in 0..=32 {
        let error = next?;
        if let Some(cause) = of_transport(error) {
            return Some(Seen::new(cause));
        }
        next = error.source();
    }
    None
}

pub(crate) fn of_refusal(refusal: &Refusal) -> Option<Seen> {
    passes(refusal.kind()).then(|| told_by(refusal))
}

/// Whether what is refused so may be let through another time.
const fn passes(kind: RefusalKind) -> bool {
    matches!(
        kind,
        RefusalKind::RateLimited
            | RefusalKind::CircuitOpen
            | RefusalKind::Overloaded
            | RefusalKind::TimedOut
            | RefusalKind::StoreUnavailable
            | RefusalKind::Draining
            | RefusalKind::BadGateway
            | RefusalKind::Unavailable
    )
}

fn told_by(refusal: &Refusal) -> Seen {
    let kind = refusal.kind();
    let cause = if refusal.was_never_sent() && !kind.is_before_sending() {
        Cause::Unsent(kind)
    } else {
        Cause::Refused(kind)
    };
    let hint = match refusal.retry_after() {
        Some(wait) => Hint::After(wait),
        // Open until someone says otherwise.
        None if kind == RefusalKind::CircuitOpen => Hint::Never,
        None => Hint::None,
    };
    Seen { cause, hint }
}

fn of_transport(error: &(dyn Error + 'static)) -> Option<Cause> {
    #[cfg(feature = "hyper")]
    if let Some(cause) = crate::hyper_errors::cause(error) {
        return Some(cause);
    }
    use io::ErrorKind::{
        AddrNotAvailable, BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset,
        HostUnreachable, NetworkDown, NetworkUnreachable, NotConnected, TimedOut, UnexpectedEof,
    };
    Some(match error.downcast_ref::<io::Error>()?.kind() {
        // Only connecting says so.
        ConnectionRefused | AddrNotAvailable => Cause::Connect,
        ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof | NotConnected
        | TimedOut | HostUnreachable | NetworkUnreachable | NetworkDown => Cause::Reset,
        _ => return None,
    })
}
