//! Signing what a client sends: the [`SignLayer`] and the
//! [`MessageIdLayer`] that stands outside of a retry.
//!
//! ```text
//!                  the same id for all of them      a timestamp for each
//! request ─▶ MessageIdLayer ─▶ retry ─▶ breaker ─▶ timeout ─▶ SignLayer ─▶ transport
//! ```
//!
//! ```
//! use std::{convert::Infallible, time::Duration};
//!
//! use buttress_webhook::{MessageIdLayer, Secret, SignLayer, Signer, Standard, WholeBody};
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use bytes::Bytes;
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
//! let sign = SignLayer::builder(Signer::new(Standard::new(), [secret])?)
//!     .name("orders")
//!     .wall_clock(|| Duration::from_secs(1_700_000_000))
//!     .build()?;
//!
//! let service = ServiceBuilder::new()
//!     .layer(MessageIdLayer::new())
//!     // Here stands the retry.
//!     .layer(sign)
//!     .service(service_fn(async |request: Request<WholeBody>| {
//!         assert!(request.headers()["webhook-id"].to_str().unwrap().starts_with("msg_"));
//!         assert_eq!(request.headers()["webhook-timestamp"], "1700000000");
//!         assert!(request.headers().contains_key("webhook-signature"));
//!         assert_eq!(request.body().bytes(), "{}");
//!         Ok::<_, Infallible>(Response::new(()))
//!     }));
//!
//! let request = Request::post("/hooks").body(Full::new(Bytes::from("{}")))?;
//! service.oneshot(request).await.unwrap();
//! # Ok(())
//! # }
//! ```

mod config;
mod error;
mod future;
mod handle;
mod id;
mod layer;
pub mod metrics;
mod service;
mod shared;

pub use self::{
    config::SignBuilder,
    error::{Cause, Error, NotSigned, SignConfigError},
    future::{ErrorFuture, ResponseFuture},
    handle::SignHandle,
    id::{MessageId, MessageIdLayer, MessageIds},
    layer::{Errors, Respond, SignLayer},
    service::Sign,
};
