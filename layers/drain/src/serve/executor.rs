//! Tasks for the streams of HTTP/2, and for the tunnels that they turn into.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::rt::Executor;
use pin_project_lite::pin_project;

use super::service::Tunnel;

thread_local! {
    static TUNNEL: Cell<Option<Box<Tunnel>>> = const { Cell::new(None) };
}

/// Runs the streams of HTTP/2 of a [`Server`](crate::Server), as tasks of
/// tokio's.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct StreamExecutor;

impl StreamExecutor {
    /// The stream that is being polled turns into a tunnel, which hyper makes a
    /// task of before it returns: the request is open until that ends.
    pub(super) fn tunnel(tunnel: Tunnel) {
        TUNNEL.set(Some(Box::new(tunnel)));
    }
}

impl<F: Future + Send + 'static> Executor<F> for StreamExecutor
where
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        let mut tunnel = TUNNEL.take();
        if let Some(tunnel) = &mut tunnel {
            tunnel.begins();
        }
        tokio::spawn(Task { future, tunnel });
    }
}

pin_project! {
    struct Task<F> {
        #[pin]
        future: F,
        tunnel: Option<Box<Tunnel>>,
    }
}

impl<F: Future> Future for Task<F> {
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let polled = this.future.poll(cx);
        // Where hyper made none of it: it could not send the answer. Nobody
        // else's stream is to find it.
        if let Some(tunnel) = TUNNEL.take() {
            *this.tunnel = Some(tunnel);
        }
        polled
    }
}
