//! `grpc-timeout`: how long a gRPC client waits for the whole of its call.
//!
//! The layer for timeouts reads it and writes it. It limits nothing here: the
//! retry ends its waits by the deadline, and `forward` an attempt, since only
//! that knows what to tell a breaker of it.
//!
//! Upstreams are told what is left of the client's time, and not of the
//! route's: that is for a response's head, and who takes it for the whole
//! call's, as it is meant, would cut off every stream that goes on for longer.

use std::{convert::Infallible, future::ready};

use buttress::{
    Http,
    deadline::Deadline,
    timeout::{Elapsed, Error, Errors, TimeoutLayer},
};
use http::Request;
use tower::{Layer, ServiceExt, service_fn};

/// Reads and writes it, for all routes.
#[derive(Clone)]
pub(crate) struct GrpcTimeout(TimeoutLayer<Http, Errors>);

/// Until when the client waits, where it has said so; an extension of its
/// request. The [`Deadline`] beside it may be nearer.
#[derive(Clone, Copy)]
pub(crate) struct ClientWaits(pub(crate) Deadline);

impl GrpcTimeout {
    pub(crate) fn new() -> Self {
        let layer = TimeoutLayer::builder().name("grpc-timeout").errors();
        let layer = layer.adopt().attach_deadline().build();
        Self(layer.expect("the name is a good one"))
    }

    /// For a request that arrives: makes a deadline of what it says.
    ///
    /// Fails if that is past.
    pub(crate) async fn adopt<B>(&self, request: Request<B>) -> Result<Request<B>, Elapsed> {
        let mut request = self.stamp(request).await?;
        if let Some(deadline) = Deadline::of(request.extensions()) {
            request.extensions_mut().insert(ClientWaits(deadline));
        }
        Ok(request)
    }

    /// For one that is about to be sent: says what is left of it.
    ///
    /// Fails if that is nothing.
    pub(crate) async fn tell<B>(
        &self,
        mut request: Request<B>,
        ClientWaits(deadline): ClientWaits,
    ) -> Result<Request<B>, Elapsed> {
        // In the place of an attempt's, which is of the head alone.
        request.extensions_mut().insert(deadline);
        self.stamp(request).await
    }

    /// What the layer makes of a request, by a service that hands it back.
    async fn stamp<B>(&self, request: Request<B>) -> Result<Request<B>, Elapsed> {
        let service = service_fn(|request| ready(Ok::<_, Infallible>(request)));
        match self.0.layer(service).oneshot(request).await {
            Ok(request) => Ok(request),
            Err(Error::Elapsed(elapsed)) => Err(elapsed),
            Err(Error::Inner(never)) => match never {},
        }
    }
}
