//! The service: asks the limiter, and calls the inner service or does not.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Http, Refusal, RefusalKind, Sees, View, body::ResponseBody, respond::integer,
};
use bytes::Bytes;
use http::{Request, Response, header::RETRY_AFTER};
use tower_service::Service;

use crate::{
    HeaderFormat,
    future::{After, ErrorFuture, ResponseFuture},
    headers::{Draft, XRateLimit},
    layer::{Errors, Respond, Shared},
    limiter::{Admission, Asked},
    store::{Detail, Standing},
};

/// The service of a [`RateLimitLayer`](crate::RateLimitLayer).
///
/// Readiness is the inner service's: what is refused is refused in `call`. An
/// instance that has refused keeps what it was promised by the inner service
/// (a slot of a concurrency limit, say) for its next call; dropping it gives
/// it back.
///
/// The decision is taken in `call`, too, and stays taken: a future that is
/// dropped later has been charged.
pub struct RateLimit<S, V: View = Http, M = Respond> {
    inner: S,
    shared: Arc<Shared<V, M>>,
}

impl<S, V: View, M> RateLimit<S, V, M> {
    pub(crate) fn new(inner: S, shared: Arc<Shared<V, M>>) -> Self {
        Self { inner, shared }
    }

    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, V: View, M> Clone for RateLimit<S, V, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<S: fmt::Debug, V: View, M> fmt::Debug for RateLimit<S, V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimit")
            .field("inner", &self.inner)
            .field("limiter", &self.shared.limiter)
            .finish()
    }
}

/// How a request stands with the tightest of its limits: a request extension
/// for handlers, where [`info`](crate::RateLimitBuilder::info) is on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateLimitInfo {
    /// The name of the limit.
    pub name: String,
    /// How many may come at once.
    pub limit: u32,
    /// How many of them are left, this request charged.
    pub remaining: u32,
    /// In how long all of them are back.
    pub reset_after: Duration,
}

impl<S, B, R> Service<Request<B>> for RateLimit<S, Http, Respond>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    // Thin, so that it is inlined, and the one place that hands the request
    // on: it is copied at each step that is not, and for each such place.
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let after = match self.admit_known(&request) {
            Ok(after) => after,
            Err(asked) => match self.admit_asked(asked, &mut request) {
                Ok(after) => after,
                Err(refused) => return ResponseFuture::refused(refused),
            },
        };
        ResponseFuture::calling(self.inner.call(request), after)
    }
}

impl<S> RateLimit<S, Http, Respond> {
    /// What is to be done with the response to a request that passes as most
    /// do.
    #[inline(always)]
    fn admit_known<B>(&self, request: &Request<B>) -> Result<After, Asked> {
        let Shared { limiter, mode } = &*self.shared;
        if mode.tells() {
            return Err(Asked::Nothing);
        }
        // Made here, not handed over: as long as it is in registers it is not
        // copied for each callback.
        let head = Head::from(request);
        Ok(match limiter.admit_known(head, mode.detail)? {
            None => After::default(),
            Some(tightest) => self.after(&tightest, &[]),
        })
    }

    /// What is to be done with the response to any other, or the response to
    /// one that does not pass.
    #[inline(never)]
    #[expect(
        clippy::result_large_err,
        reason = "a box would be an allocation a refusal"
    )]
    fn admit_asked<B>(
        &self,
        asked: Asked,
        request: &mut Request<B>,
    ) -> Result<After, Response<Bytes>> {
        let Shared { limiter, mode } = &*self.shared;
        if mode.tells() {
            return self.admit_and_tell(request);
        }
        let head = Head::from(&*request);
        match limiter.admit_asked(asked, head, mode.detail) {
            Admission::Pass(Some(tightest), all) if !limiter.is_shadow() => {
                Ok(self.after(&tightest, &all))
            }
            Admission::Refuse(refusal, tightest, all) => {
                Err(self.refuse(refusal, head, tightest.as_ref(), &all))
            }
            // In shadow mode what fits is not told either: who sees the
            // headers end would know that the limit was there.
            Admission::Pass(..) | Admission::Bypass | Admission::Shadow => Ok(After::default()),
        }
    }

    /// The same, for what few ask for: refunds, and handlers that are told.
    #[expect(
        clippy::result_large_err,
        reason = "a box would be an allocation a refusal"
    )]
    fn admit_and_tell<B>(&self, request: &mut Request<B>) -> Result<After, Response<Bytes>> {
        let Shared { limiter, mode } = &*self.shared;
        let head = Head::from(&*request);
        let (admission, asks) = limiter.admit_and_tell(head, mode.detail);
        let mut after = After::default();
        match admission {
            Admission::Bypass | Admission::Shadow => {}
            Admission::Pass(tightest, all) => {
                if let (true, Some(tightest)) = (mode.info, &tightest) {
                    let info = self.info(tightest);
                    request.extensions_mut().insert(info);
                }
                if let (false, Some(tightest)) = (limiter.is_shadow(), &tightest) {
                    after = self.after(tightest, &all);
                }
                if mode.refund.is_some() {
                    after.refund(Arc::clone(&self.shared), asks);
                }
            }
            Admission::Refuse(refusal, tightest, all) => {
                return Err(self.refuse(refusal, head, tightest.as_ref(), &all));
            }
        }
        Ok(after)
    }

    /// The response to a request that does not pass.
    #[cold]
    pub(crate) fn refuse(
        &self,
        mut refusal: Refusal,
        head: Head<'_>,
        tightest: Option<&Standing>,
        all: &[Standing],
    ) -> Response<Bytes> {
        let Shared { limiter, mode } = &*self.shared;
        if refusal.kind() == RefusalKind::RateLimited
            && mode.formats.contains(&HeaderFormat::Draft11)
            && let Some(violated) = tightest
        {
            let policy = limiter.tables()[violated.limit].name.to_string();
            refusal = refusal.with_member("violated-policies", vec![policy]);
        }
        let mut response = mode.responder.respond(&refusal, head);
        // gRPC has a field of its own for it, which is the responder's.
        if let Some(secs) = refusal.retry_after_secs()
            && !head.is_grpc()
            && !response.headers().contains_key(RETRY_AFTER)
        {
            response.headers_mut().insert(RETRY_AFTER, integer(secs));
        }
        if let Some(tightest) = tightest {
            let status = response.status();
            let after = self.after(tightest, all);
            after.apply(status, response.headers_mut());
        }
        response
    }

    /// What is to be done with the response.
    #[inline(never)]
    pub(crate) fn after(&self, tightest: &Standing, all: &[Standing]) -> After {
        let Shared { limiter, mode } = &*self.shared;
        let mut after = After::default();
        for format in &mode.formats {
            match format {
                HeaderFormat::XRateLimit => {
                    after.x = Some(XRateLimit::new(tightest, mode.wall_clock.unix_now()));
                }
                HeaderFormat::Draft11 => {
                    after.more().draft = Some(Draft::new(limiter.tables(), all));
                }
            }
        }
        if mode.expose && !mode.formats.is_empty() {
            after.more().expose = Some(Arc::clone(&self.shared));
        }
        after
    }

    pub(crate) fn info(&self, tightest: &Standing) -> RateLimitInfo {
        RateLimitInfo {
            name: self.shared.limiter.tables()[tightest.limit]
                .name
                .clone()
                .into_owned(),
            limit: tightest.burst,
            remaining: tightest.remaining,
            reset_after: Duration::from_nanos(tightest.until_full),
        }
    }
}

impl<S, V, Req> Service<Req> for RateLimit<S, V, Errors>
where
    V: Sees<Req>,
    S: Service<Req, Error: Into<BoxError>>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ErrorFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let limiter = &self.shared.limiter;
        let seen = V::see(&request);
        let refusal = match limiter.admit_known(seen, Detail::None) {
            Ok(_) => None,
            Err(asked) => match limiter.admit_asked(asked, seen, Detail::None) {
                Admission::Refuse(refusal, ..) => Some(refusal),
                _ => None,
            },
        };
        match refusal {
            None => ErrorFuture::calling(self.inner.call(request)),
            Some(refusal) => ErrorFuture::refused(refusal),
        }
    }
}
