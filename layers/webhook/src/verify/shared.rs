//! What a layer, its services and their calls have in common.

use std::{
    error::Error,
    fmt::Display,
    future::Future,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Refusal, RefusalKind,
    clock::{self, Instant, SharedWallClock},
    respond::SharedResponder,
    sync::Mutex,
};
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use tokio::runtime;
use tracing::{debug, info, warn};

use super::{
    VerifyConfigError,
    claim::has_grpc_failed,
    error::Problem,
    lookup::Tenants,
    metrics::{Kind, Metrics, Verdict},
    replay::{Claim, ClaimKey, ClaimToken, Memory, OnStoreError, Repeat, ReplayStore},
};
use crate::{Key, Keyring, Reason, Scheme, Verified, current::Current, mac::sha256, verifier};

const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
/// When to ask again about what is in progress.
const SOON: Duration = Duration::from_secs(1);
/// What sets claims apart is kept whole up to this many bytes.
const LONGEST_PART: usize = 128;

pub(crate) struct Shared {
    pub(crate) name: Arc<str>,
    pub(crate) scheme: Arc<dyn Scheme>,
    pub(crate) secrets: Secrets,
    /// In seconds.
    tolerance: AtomicU64,
    /// A longer one of before, in seconds, for as long as what passed by it may
    /// pass again; else 0.
    earlier: AtomicU64,
    earlier_until: Mutex<Option<Instant>>,
    max_body: AtomicUsize,
    clock: SharedWallClock,
    responder: SharedResponder,
    pub(crate) replays: Option<Replays>,
    metrics: Metrics,
    store_fails: AtomicBool,
    lookup_fails: AtomicBool,
    /// What an unknown tenant's requests are tried with.
    nobody: Keyring,
}

/// Where the secrets come from.
pub(crate) enum Secrets {
    Given(Current<Keyring>),
    LookedUp(Box<dyn Tenants>),
}

pub(crate) type Endpoint = Box<dyn Fn(Head<'_>) -> String + Send + Sync>;
pub(crate) type Completes = Box<dyn Fn(StatusCode, &HeaderMap) -> bool + Send + Sync>;

/// How repeats are known, and what they get.
pub(crate) struct Replays {
    pub(crate) memory: Mutex<Memory>,
    pub(crate) store: Option<Arc<dyn ReplayStore>>,
    pub(crate) on_store_error: OnStoreError,
    pub(crate) completed: Repeat,
    pub(crate) in_progress: Repeat,
    pub(crate) completes: Option<Completes>,
    pub(crate) endpoint: Option<Endpoint>,
}

pub(crate) struct Parts {
    pub(crate) name: Arc<str>,
    pub(crate) scheme: Arc<dyn Scheme>,
    pub(crate) secrets: Secrets,
    pub(crate) tolerance: Duration,
    pub(crate) max_body: usize,
    pub(crate) clock: SharedWallClock,
    pub(crate) responder: SharedResponder,
    pub(crate) replays: Option<Replays>,
}

/// A message that is genuine, and what it is known by where repeats matter.
pub(crate) struct Genuine {
    pub(crate) verified: Verified,
    pub(crate) key: Option<ClaimKey>,
}

fn seconds(tolerance: Duration) -> Result<u64, VerifyConfigError> {
    let sound = tolerance.subsec_nanos() == 0 && !tolerance.is_zero() && tolerance <= LONGEST;
    match sound {
        true => Ok(tolerance.as_secs()),
        false => Err(Problem::Tolerance.into()),
    }
}

fn body_length(bytes: usize) -> Result<usize, VerifyConfigError> {
    match bytes {
        0 => Err(Problem::MaxBody.into()),
        bytes => Ok(bytes),
    }
}

/// By a tolerance of so many seconds a message passes from as long before its
/// timestamp to as long after, both in whole seconds: so it may pass for a
/// second more.
fn remembered(tolerance: u64) -> Duration {
    Duration::from_secs(tolerance * 2 + 1)
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Result<Self, VerifyConfigError> {
        // Its first reading takes a while.
        let _ = clock::now();
        let nobody = Keyring::of(Key::new(&[0; 32])?);
        Ok(Self {
            metrics: Metrics::new(&parts.name, parts.scheme.name()),
            name: parts.name,
            scheme: parts.scheme,
            secrets: parts.secrets,
            tolerance: AtomicU64::new(seconds(parts.tolerance)?),
            earlier: AtomicU64::new(0),
            earlier_until: Mutex::new(None),
            max_body: AtomicUsize::new(body_length(parts.max_body)?),
            clock: parts.clock,
            responder: parts.responder,
            replays: parts.replays,
            store_fails: AtomicBool::new(false),
            lookup_fails: AtomicBool::new(false),
            nobody,
        })
    }

    pub(crate) fn max_body(&self) -> usize {
        self.max_body.load(Relaxed)
    }

    pub(crate) fn set_max_body(&self, bytes: usize) -> Result<(), VerifyConfigError> {
        self.max_body.store(body_length(bytes)?, Relaxed);
        Ok(())
    }

    pub(crate) fn tolerance(&self) -> Duration {
        Duration::from_secs(self.tolerance.load(Relaxed))
    }

    pub(crate) fn set_tolerance(&self, tolerance: Duration) -> Result<(), VerifyConfigError> {
        let new = seconds(tolerance)?;
        // One at a time.
        let mut until = self.earlier_until.lock();
        let old = self.tolerance.load(Relaxed);
        let earlier = self.earlier(&mut until).max(old);
        // Remembered for longer first, and only then is less let in.
        if new < earlier {
            self.earlier.store(earlier, Relaxed);
            if new < old {
                *until = Some(clock::now() + remembered(earlier));
            }
        }
        self.tolerance.store(new, Release);
        Ok(())
    }

    /// How long what is done is remembered: by the longest tolerance by which
    /// it may have passed.
    pub(crate) fn keep(&self) -> Duration {
        // Whoever sees a shorter one sees the earlier one, too.
        let tolerance = self.tolerance.load(Acquire);
        let earlier = match self.earlier.load(Relaxed) {
            0 => 0,
            _ => self.earlier(&mut self.earlier_until.lock()),
        };
        remembered(tolerance.max(earlier))
    }

    /// What still counts of an earlier tolerance.
    fn earlier(&self, until: &mut Option<Instant>) -> u64 {
        if until.is_none_or(|until| clock::now() >= until) {
            *until = None;
            self.earlier.store(0, Relaxed);
        }
        self.earlier.load(Relaxed)
    }

    /// Whether the request could be genuine, as far as can be told without a
    /// key.
    pub(crate) fn screen(&self, request: Head<'_>) -> Result<(), Reason> {
        let mut read = self.scheme.read(request);
        verifier::screen(&mut read, self.tolerance(), self.clock.unix_now()).map(drop)
    }

    /// Whether the request is genuine; by no keys it is not.
    pub(crate) fn verify(
        &self,
        keys: Option<&Keyring>,
        tenant: Option<&str>,
        request: Head<'_>,
        body: &[u8],
    ) -> Result<Genuine, Reason> {
        let mut read = self.scheme.read(request);
        let envelope = verifier::screen(&mut read, self.tolerance(), self.clock.unix_now())?;
        let secrets = keys.unwrap_or(&self.nobody);
        let judged = verifier::judge(&*self.scheme, secrets, envelope, body)?;
        // Whatever that key says: everybody has it.
        if keys.is_none() {
            return Err(Reason::SignatureMismatch);
        }
        self.metrics.judged(Verdict::Verified);
        let key = self.replays.as_ref().map(|replays| {
            let endpoint = replays.endpoint.as_ref().map(|endpoint| endpoint(request));
            let digest = || judged.digest(envelope, body);
            let id = judged.verified.id.as_deref();
            self.claim_key(endpoint.as_deref(), tenant, id, digest)
        });
        let verified = judged.verified;
        Ok(Genuine { verified, key })
    }

    /// Each part says how long it is, or is of a length of its own: no two
    /// messages have one key.
    fn claim_key(
        &self,
        endpoint: Option<&str>,
        tenant: Option<&str>,
        id: Option<&str>,
        digest: impl FnOnce() -> [u8; 32],
    ) -> ClaimKey {
        let mut text = String::with_capacity(128);
        for part in [Some(&*self.name), endpoint, tenant] {
            let part = part.unwrap_or_default();
            if part.len() <= LONGEST_PART {
                text.push_str(itoa::Buffer::new().format(part.len()));
                text.push(':');
                text.push_str(part);
            } else {
                text.push('#');
                text.push_str(&const_hex::encode(sha256(&[part.as_bytes()])));
            }
            text.push(',');
        }
        match id {
            Some(id) => {
                text.push_str("id:");
                text.push_str(id);
            }
            None => {
                text.push_str("sha256:");
                text.push_str(&const_hex::encode(digest()));
            }
        }
        ClaimKey::new(text)
    }

    /// Counts why a request is not handed on, tells of it, and answers it.
    #[cold]
    pub(crate) fn refuse(&self, verdict: Verdict, request: Head<'_>) -> Response<Bytes> {
        self.metrics.judged(verdict);
        let refusal = match verdict {
            Verdict::TooLarge => Refusal::new(RefusalKind::BodyTooLarge),
            Verdict::Broken => Refusal::new(RefusalKind::BadRequest)
                .with_reason(verdict.as_str())
                .with_detail("the request body broke off"),
            Verdict::LookupFailed => Refusal::new(RefusalKind::StoreUnavailable)
                .with_reason(verdict.as_str())
                .with_detail("the secrets cannot be looked up"),
            Verdict::Refused(reason) => Refusal::new(RefusalKind::Unauthenticated)
                .with_reason(reason.as_str())
                .with_detail(reason.to_string()),
            Verdict::Verified => Refusal::new(RefusalKind::Internal),
        };
        self.respond(refusal, request)
    }

    /// The same where the body broke off: who ended it may have said why, by a
    /// refusal.
    #[cold]
    pub(crate) fn broken(
        &self,
        error: &(dyn Error + 'static),
        request: Head<'_>,
    ) -> Response<Bytes> {
        let Some(refusal) = Refusal::find(error) else {
            return self.refuse(Verdict::Broken, request);
        };
        self.metrics.judged(Verdict::Broken);
        self.respond(refusal.clone(), request)
    }

    fn respond(&self, refusal: Refusal, request: Head<'_>) -> Response<Bytes> {
        debug!(
            name = &*self.name,
            scheme = self.scheme.name(),
            reason = refusal.reason(),
            "webhook refused"
        );
        let refusal = refusal.with_origin(self.name.to_string()).before_sending();
        self.responder.respond(&refusal, request)
    }

    /// What a message gets that could not be claimed; `None` lets it pass.
    #[cold]
    pub(crate) fn repeated(
        &self,
        replays: &Replays,
        claim: Claim,
        request: Head<'_>,
    ) -> Option<Response<Bytes>> {
        let (kind, repeat) = match claim {
            Claim::InProgress => (Kind::InProgress, replays.in_progress),
            Claim::Full { .. } => (Kind::Full, Repeat::Refuse),
            Claim::Completed | Claim::New(_) => (Kind::Completed, replays.completed),
        };
        self.metrics.repeated(kind);
        if kind != Kind::Full {
            debug!(name = &*self.name, kind = kind.as_str(), "webhook repeated");
        }
        match repeat {
            Repeat::Pass => return None,
            // An empty answer of gRPC is an error of its own.
            Repeat::Acknowledge if !request.is_grpc() => {
                return Some(Response::new(Bytes::new()));
            }
            Repeat::Acknowledge | Repeat::Refuse => {}
        }
        let refusal = match claim {
            Claim::InProgress => Refusal::new(RefusalKind::Replayed)
                .with_reason("in_progress")
                .with_detail("the same message is being served")
                .with_retry_after(SOON),
            Claim::Full { retry_after } => Refusal::new(RefusalKind::Overloaded)
                .with_reason("replays_full")
                .with_detail("there is no room to tell a repeat of this message")
                .with_retry_after(retry_after),
            Claim::Completed | Claim::New(_) => Refusal::new(RefusalKind::Replayed),
        };
        Some(self.respond(refusal, request))
    }

    /// Whether what the handler answers is done, as far as its head tells.
    pub(crate) fn completes(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let closure = self.replays.as_ref().and_then(|all| all.completes.as_ref());
        match closure {
            Some(completes) => completes(status, headers),
            None => status.is_success() && !has_grpc_failed(headers),
        }
    }

    pub(crate) fn claim_here(&self, replays: &Replays, key: &ClaimKey) -> Claim {
        // Before: it may take a lock of its own.
        let keep = self.keep();
        self.on_memory(replays, |memory| memory.claim(key, clock::now(), keep))
    }

    pub(crate) fn complete_here(&self, token: ClaimToken) {
        if let Some(replays) = &self.replays {
            self.on_memory(replays, |memory| memory.complete(token, clock::now()));
        }
    }

    pub(crate) fn release_here(&self, token: ClaimToken) {
        if let Some(replays) = &self.replays {
            self.on_memory(replays, |memory| memory.release(token));
        }
    }

    fn on_memory<T>(&self, replays: &Replays, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = replays.memory.lock();
        let before = memory.len();
        let changed = change(&mut memory);
        let after = memory.len();
        drop(memory);
        self.metrics.claims_changed(before, after);
        changed
    }

    /// Does with the store what nobody waits for. Outside of a runtime it is
    /// not done, and counts as an error.
    pub(crate) fn in_background(
        self: &Arc<Self>,
        operation: &'static str,
        work: impl Future<Output = Result<(), BoxError>> + Send + 'static,
    ) {
        match runtime::Handle::try_current() {
            Ok(runtime) => {
                let shared = Arc::clone(self);
                runtime.spawn(async move {
                    match work.await {
                        Ok(()) => shared.store_works(),
                        Err(error) => shared.store_failed(operation, &*error),
                    }
                });
            }
            Err(error) => self.store_failed(operation, &error),
        }
    }

    #[cold]
    pub(crate) fn store_failed(&self, operation: &'static str, error: &dyn Display) {
        self.metrics.store_failed(operation);
        // Once, not for each request until it works again.
        if !self.store_fails.swap(true, Relaxed) {
            let name = &*self.name;
            warn!(name, operation, %error, "the store of webhook claims fails");
        }
    }

    pub(crate) fn store_works(&self) {
        if self.store_fails.load(Relaxed) && self.store_fails.swap(false, Relaxed) {
            info!(
                name = &*self.name,
                "the store of webhook claims works again"
            );
        }
    }

    /// What a genuine message gets whose claim the store has not decided.
    #[cold]
    pub(crate) fn unclaimed(&self, request: Head<'_>) -> Response<Bytes> {
        self.respond(Refusal::new(RefusalKind::StoreUnavailable), request)
    }

    #[cold]
    pub(crate) fn lookup_failed(&self, error: &dyn Display) {
        if !self.lookup_fails.swap(true, Relaxed) {
            let name = &*self.name;
            warn!(name, %error, "the lookup of webhook secrets fails");
        }
    }

    pub(crate) fn lookup_works(&self) {
        if self.lookup_fails.load(Relaxed) && self.lookup_fails.swap(false, Relaxed) {
            info!(
                name = &*self.name,
                "the lookup of webhook secrets works again"
            );
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(replays) = &self.replays {
            let left = replays.memory.lock().len();
            self.metrics.claims_changed(left, 0);
        }
    }
}
