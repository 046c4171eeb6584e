//! Response futures: the inner one, then the headers; or a refusal.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{BoxError, Http, Refusal, body::ResponseBody};
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use pin_project_lite::pin_project;

#[cfg(feature = "redis")]
use crate::store::Standing;
use crate::{
    headers::{self, Draft, XRateLimit},
    layer::{Respond, Shared},
    store::Ask,
};

/// What is to be done with a response. The X- headers are kept as numbers, so
/// that what only has them allocates nothing here; the rest is opt-in.
#[derive(Default)]
pub(crate) struct After {
    pub(crate) x: Option<XRateLimit>,
    more: Option<Box<More>>,
}

#[derive(Default)]
pub(crate) struct More {
    pub(crate) draft: Option<Draft>,
    pub(crate) expose: Option<Arc<Shared<Http, Respond>>>,
    refund: Option<Charged>,
}

/// What a request was charged, and to whom it goes back.
struct Charged {
    shared: Arc<Shared<Http, Respond>>,
    asks: Vec<Option<Ask>>,
}

impl After {
    pub(crate) fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    pub(crate) fn refund(&mut self, shared: Arc<Shared<Http, Respond>>, asks: Vec<Option<Ask>>) {
        self.more().refund = Some(Charged { shared, asks });
    }

    #[inline]
    fn is_nothing(&self) -> bool {
        self.x.is_none() && self.more.is_none()
    }

    /// Puts what is told right: the key stands otherwise by now.
    #[cfg(feature = "redis")]
    pub(crate) fn retell(
        &mut self,
        shared: &Shared<Http, Respond>,
        tightest: &Standing,
        all: &[Standing],
    ) {
        if let Some(x) = &mut self.x {
            *x = XRateLimit::new(tightest, shared.mode.wall_clock.unix_now());
        }
        if let Some(draft) = self.more.as_mut().and_then(|more| more.draft.as_mut()) {
            *draft = Draft::new(shared.limiter.tables(), all);
        }
    }

    pub(crate) fn told<B>(self, mut response: Response<B>) -> Response<ResponseBody<B>> {
        let status = response.status();
        self.apply(status, response.headers_mut());
        response.map(ResponseBody::inner)
    }

    #[inline]
    pub(crate) fn apply(self, status: StatusCode, headers: &mut HeaderMap) {
        let Self { mut x, more } = self;
        if let Some(more) = more {
            more.apply(status, headers, &mut x);
        }
        if let Some(x) = x {
            x.write(headers);
        }
    }
}

impl More {
    fn apply(mut self, status: StatusCode, headers: &mut HeaderMap, x: &mut Option<XRateLimit>) {
        if let Some(Charged { shared, asks }) = self.refund.take() {
            let Shared { limiter, mode } = &*shared;
            let refund = mode.refund.as_ref().expect("set where charges are kept");
            if refund(status, headers) {
                let (tightest, all) = limiter.refund(&asks);
                // What is told is what is true after the refund.
                if let (Some(x), Some(tightest)) = (x, &tightest) {
                    *x = XRateLimit::new(tightest, mode.wall_clock.unix_now());
                }
                if let Some(draft) = &mut self.draft {
                    *draft = Draft::new(limiter.tables(), &all);
                }
            }
        }
        if let Some(draft) = &self.draft {
            draft.write(headers);
        }
        if let Some(shared) = &self.expose {
            headers::expose(headers, &shared.mode.formats);
        }
    }
}

pin_project! {
    /// Response future of [`RateLimit`](crate::RateLimit) on HTTP. The
    /// decision was taken when it was made: dropping it takes nothing back.
    pub struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Calling { #[pin] future: F, after: After },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<F> ResponseFuture<F> {
    #[inline]
    pub(crate) fn calling(future: F, after: After) -> Self {
        Self {
            state: State::Calling { future, after },
        }
    }

    #[inline]
    pub(crate) fn refused(response: Response<Bytes>) -> Self {
        Self {
            state: State::Refused {
                response: Some(response),
            },
        }
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<ResponseBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Calling { future, after } => match future.poll(cx) {
                // Apart, and each straight into its place: what comes together
                // behind a branch has to be copied once more.
                Poll::Ready(Ok(response)) => {
                    if after.is_nothing() {
                        return Poll::Ready(Ok(response.map(ResponseBody::inner)));
                    }
                    Poll::Ready(Ok(mem::take(after).told(response)))
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Pending => Poll::Pending,
            },
            StateProj::Refused { response } => {
                let response = response.take().expect("polled after completion");
                Poll::Ready(Ok(response.map(ResponseBody::refusal)))
            }
        }
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Calling { .. } => "ResponseFuture::Calling",
            State::Refused { .. } => "ResponseFuture::Refused",
        })
    }
}

pin_project! {
    /// Response future of [`RateLimit`](crate::RateLimit) where refusals are
    /// errors.
    pub struct ErrorFuture<F> {
        #[pin]
        state: ErrorState<F>,
    }
}

pin_project! {
    #[project = ErrorStateProj]
    enum ErrorState<F> {
        Calling { #[pin] future: F },
        Refused { refusal: Option<Refusal> },
    }
}

impl<F> ErrorFuture<F> {
    pub(crate) fn calling(future: F) -> Self {
        Self {
            state: ErrorState::Calling { future },
        }
    }

    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self {
            state: ErrorState::Refused {
                refusal: Some(refusal),
            },
        }
    }
}

impl<F, T, E> Future for ErrorFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    type Output = Result<T, BoxError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            ErrorStateProj::Calling { future } => future.poll(cx).map_err(Into::into),
            ErrorStateProj::Refused { refusal } => {
                let refusal = refusal.take().expect("polled after completion");
                Poll::Ready(Err(refusal.into()))
            }
        }
    }
}

impl<F> fmt::Debug for ErrorFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            ErrorState::Calling { .. } => "ErrorFuture::Calling",
            ErrorState::Refused { .. } => "ErrorFuture::Refused",
        })
    }
}
