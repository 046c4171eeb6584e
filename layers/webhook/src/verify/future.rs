//! The response future: from the first byte of the body to the handler's
//! answer, or to one of ours.

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{
    BoxError, Head,
    body::{GuardedBody, ResponseBody},
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    claim::{Claiming, Held, Place, Settle, VerifyBody},
    lookup::{Found, Looking},
    metrics::Verdict,
    replay::{Claim, OnStoreError},
    shared::{Genuine, Secrets, Shared},
};
use crate::{
    Keyring, Verified, WholeBody,
    collect::{Collect, NotWhole},
};

pin_project! {
    /// Response future of [`Verify`](crate::Verify). Dropping it drops what of
    /// the body has come, the inner service's readiness or call, and the claim:
    /// the message may come again.
    ///
    /// Boxed are in it only a lookup of secrets that are not known yet, and a
    /// claim in a [`ReplayStore`](crate::ReplayStore).
    pub struct VerifyFuture<S, B>
    where
        S: Service<Request<WholeBody>>,
        B: Body,
    {
        #[pin]
        state: State<S, S::Future, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F, B>
    where
        B: Body,
    {
        Collecting { #[pin] collect: Collect<B>, waiting: Option<Waiting<S>> },
        Looking { looking: Looking, waiting: Option<(Waiting<S>, WholeBody, String)> },
        Claiming { claiming: Claiming, waiting: Option<(Waiting<S>, WholeBody, Verified)> },
        Calling { #[pin] response: F, shared: Arc<Shared>, held: Option<Held> },
        Answered { response: Option<Response<Bytes>> },
    }
}

/// What the request waits with: the instance that was polled ready, and its own
/// head.
pub(crate) struct Waiting<S> {
    inner: S,
    parts: Parts,
    shared: Arc<Shared>,
}

/// Where a request goes on: what a state becomes.
enum Next<S, F> {
    Look(Looking, (Waiting<S>, WholeBody, String)),
    Claim(Claiming, (Waiting<S>, WholeBody, Verified)),
    Call(F, Arc<Shared>, Option<Held>),
    Answer(Response<Bytes>),
}

impl<S> Waiting<S>
where
    S: Service<Request<WholeBody>>,
{
    /// The body is there as a whole: by whose secrets?
    fn collected(self, whole: WholeBody) -> Next<S, S::Future> {
        let found = match &self.shared.secrets {
            Secrets::Given(keys) => {
                let keys = keys.get();
                return self.verify(whole, Some(&keys), None);
            }
            Secrets::LookedUp(tenants) => tenants.find(self.head()),
        };
        match found {
            Found::Nobody => self.verify(whole, None, None),
            Found::Here(keys, tenant) => self.verify(whole, keys.as_ref(), Some(&tenant)),
            // What is not even signed is not worth a question to a database.
            Found::Away(looking, tenant) => match self.shared.screen(self.head()) {
                Ok(()) => Next::Look(looking, (self, whole, tenant)),
                Err(reason) => self.refuse(Verdict::Refused(reason)),
            },
        }
    }

    fn looked_up(
        self,
        keys: Result<Option<Keyring>, BoxError>,
        whole: WholeBody,
        tenant: &str,
    ) -> Next<S, S::Future> {
        match keys {
            Ok(keys) => {
                self.shared.lookup_works();
                self.verify(whole, keys.as_ref(), Some(tenant))
            }
            Err(error) => {
                self.shared.lookup_failed(&*error);
                self.refuse(Verdict::LookupFailed)
            }
        }
    }

    fn verify(
        self,
        whole: WholeBody,
        keys: Option<&Keyring>,
        tenant: Option<&str>,
    ) -> Next<S, S::Future> {
        let judged = self.shared.verify(keys, tenant, self.head(), whole.bytes());
        let Genuine { verified, key } = match judged {
            Ok(genuine) => genuine,
            Err(reason) => return self.refuse(Verdict::Refused(reason)),
        };
        // Only now: a forged request must not stand in a genuine one's way.
        let (Some(replays), Some(key)) = (&self.shared.replays, key) else {
            return self.call(whole, verified, None);
        };
        if let Some(store) = &replays.store {
            let claiming = Claiming::new(Arc::clone(&self.shared), Arc::clone(store), key);
            return Next::Claim(claiming, (self, whole, verified));
        }
        let claim = self.shared.claim_here(replays, &key);
        self.claimed(claim, Place::Memory, whole, verified)
    }

    /// The store has answered.
    fn decided(
        self,
        claim: Result<Claim, BoxError>,
        claiming: &Claiming,
        whole: WholeBody,
        verified: Verified,
    ) -> Next<S, S::Future> {
        let error = match claim {
            Ok(claim) => {
                self.shared.store_works();
                return self.claimed(claim, |token| claiming.place(token), whole, verified);
            }
            Err(error) => error,
        };
        self.shared.store_failed("claim", &*error);
        let Some(replays) = &self.shared.replays else {
            return self.call(whole, verified, None);
        };
        match replays.on_store_error {
            OnStoreError::Deny => Next::Answer(self.shared.unclaimed(self.head())),
            OnStoreError::Allow => self.call(whole, verified, None),
            OnStoreError::Local => {
                let claim = self.shared.claim_here(replays, claiming.key());
                self.claimed(claim, |token| claiming.local(token), whole, verified)
            }
        }
    }

    fn claimed(
        self,
        claim: Claim,
        place: impl FnOnce(crate::ClaimToken) -> Place,
        whole: WholeBody,
        mut verified: Verified,
    ) -> Next<S, S::Future> {
        if let Claim::New(token) = claim {
            let held = Held::new(Arc::clone(&self.shared), place(token));
            return self.call(whole, verified, Some(held));
        }
        let replays = self.shared.replays.as_ref();
        let answer = replays.and_then(|replays| self.shared.repeated(replays, claim, self.head()));
        match answer {
            Some(answer) => Next::Answer(answer),
            None => {
                verified.repeat = true;
                self.call(whole, verified, None)
            }
        }
    }

    /// Should the call panic, what is held is dropped with it.
    fn call(self, whole: WholeBody, verified: Verified, held: Option<Held>) -> Next<S, S::Future> {
        let Self {
            mut inner,
            mut parts,
            shared,
        } = self;
        parts.extensions.insert(verified);
        let response = inner.call(Request::from_parts(parts, whole));
        Next::Call(response, shared, held)
    }
}

impl<S> Waiting<S> {
    fn head(&self) -> Head<'_> {
        Head::from(&self.parts)
    }

    fn refuse<F>(&self, verdict: Verdict) -> Next<S, F> {
        Next::Answer(self.shared.refuse(verdict, self.head()))
    }

    fn broken<F>(&self, error: &(dyn Error + 'static)) -> Next<S, F> {
        Next::Answer(self.shared.broken(error, self.head()))
    }
}

impl<S, B> VerifyFuture<S, B>
where
    S: Service<Request<WholeBody>>,
    B: Body,
{
    pub(crate) fn collecting(
        inner: S,
        request: Request<B>,
        shared: Arc<Shared>,
        most: usize,
    ) -> Self {
        let (parts, body) = request.into_parts();
        Self {
            state: State::Collecting {
                collect: Collect::new(body, most),
                waiting: Some(Waiting {
                    inner,
                    parts,
                    shared,
                }),
            },
        }
    }

    pub(crate) const fn answered(response: Response<Bytes>) -> Self {
        Self {
            state: State::Answered {
                response: Some(response),
            },
        }
    }
}

impl<S, B, R> Future for VerifyFuture<S, B>
where
    S: Service<Request<WholeBody>, Response = Response<R>>,
    B: Body,
    B::Error: Into<BoxError>,
    R: Body,
{
    type Output = Result<Response<VerifyBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                StateProj::Collecting { collect, waiting } => {
                    let whole = ready!(collect.poll(cx));
                    let waiting = waiting.take().expect(OVER);
                    match whole {
                        Ok(whole) => waiting.collected(whole),
                        Err(NotWhole::TooLarge) => waiting.refuse(Verdict::TooLarge),
                        Err(NotWhole::Broken(error)) => waiting.broken(&*error.into()),
                    }
                }
                StateProj::Looking { looking, waiting } => {
                    let keys = ready!(looking.as_mut().poll(cx));
                    let (waiting, whole, tenant) = waiting.take().expect(OVER);
                    waiting.looked_up(keys, whole, &tenant)
                }
                StateProj::Claiming { claiming, waiting } => {
                    let claim = ready!(Pin::new(&mut *claiming).poll(cx));
                    let (waiting, whole, verified) = waiting.take().expect(OVER);
                    waiting.decided(claim, claiming, whole, verified)
                }
                StateProj::Calling {
                    response,
                    shared,
                    held,
                } => {
                    let response = ready!(response.poll(cx));
                    let held = held.take();
                    return Poll::Ready(response.map(|response| {
                        let done = || shared.completes(response.status(), response.headers());
                        let held = held.filter(|_| done());
                        response.map(|body| {
                            ResponseBody::inner(GuardedBody::new(body, Settle::new(held)))
                        })
                    }));
                }
                StateProj::Answered { response } => {
                    let response = response.take().expect(OVER);
                    return Poll::Ready(Ok(response.map(ResponseBody::refusal)));
                }
            };
            state.set(match next {
                Next::Look(looking, waiting) => State::Looking {
                    looking,
                    waiting: Some(waiting),
                },
                Next::Claim(claiming, waiting) => State::Claiming {
                    claiming,
                    waiting: Some(waiting),
                },
                Next::Call(response, shared, held) => State::Calling {
                    response,
                    shared,
                    held,
                },
                Next::Answer(response) => State::Answered {
                    response: Some(response),
                },
            });
        }
    }
}

const OVER: &str = "polled after completion";

impl<S, B> fmt::Debug for VerifyFuture<S, B>
where
    S: Service<Request<WholeBody>>,
    B: Body,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.state {
            State::Collecting { .. } => "VerifyFuture::Collecting",
            State::Looking { .. } => "VerifyFuture::Looking",
            State::Claiming { .. } => "VerifyFuture::Claiming",
            State::Calling { .. } => "VerifyFuture::Calling",
            State::Answered { .. } => "VerifyFuture::Answered",
        })
    }
}
