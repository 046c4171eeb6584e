//! Hedging: a second attempt while the first is still under way, and the first
//! good answer wins (Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013).
//!
//! A callee that is mostly fast and sometimes slow is asked once more when it
//! is slow: few requests are sent twice, and the slowest become much faster.
//!
//! ```text
//!           delay         good
//! request ─┬───────────────x           dropped when the other's answer is there
//!          └────────▶ hedge ────────▶  answer
//! ```
//!
//! - **When.** After a fixed delay, or one that follows a percentile of the
//!   latencies seen ([`after_percentile`](HedgeBuilder::after_percentile)). A
//!   further one, if [`max_hedges`](HedgeBuilder::max_hedges) allows it, after
//!   the same delay again.
//! - **Which.** What may be sent twice, as for a retry: over HTTP the
//!   idempotent methods, any request with `Idempotency-Key`; elsewhere
//!   all, or what a closure says.
//! - **How many.** Within the [`Budget`](crate::Budget), which a retry may
//!   share.
//! - **Which answer.** The first good one. One that is bad (what a retry would
//!   repeat, and any error) waits for the attempts that are still under way.
//!   When all are bad, the last to arrive is handed on, unless an earlier one
//!   said when to come again (`Retry-After`, pushback): then that one. A bad
//!   answer with nothing else under way is handed on at once: to repeat is the
//!   retry's business. (gRFC A6 sends the next hedge at once instead.)
//! - **When not.** After a `Retry-After` or gRPC pushback of any kind there is
//!   no further hedge. Nor while the attempts under way hold a body that is
//!   still unread: an attempt that hangs in connecting is not overtaken by one
//!   with a body, nor over HTTP/2 by any where a pool makes one connection for
//!   both. A hedge is no substitute for a connect timeout.
//!
//! Where a retry stands inside of the hedge instead, each has a budget of its
//! own: the retry would count every hedge as a request.
//!
//! Inside of the retry, outside of the circuit breaker, so that it sees each
//! attempt, and of what chooses the endpoint, so that a hedge may go to
//! another: total deadline, retry, **hedge**, breaker, timeout, transport.
//!
//! Not tower's `hedge`: that has no budget, waits with the first attempt until
//! a second service is ready too, takes the first answer however bad it is, and
//! keeps its latencies behind a lock. And where it measures an attempt only if
//! it has won, the slow ones that lose go missing: the percentile sinks, and
//! one meant for a twentieth of the requests ends up hedging a fifth. Here a
//! first attempt that loses counts with the time that it had.
//!
//! ```
//! use std::time::Duration;
//!
//! use buttress_retry::HedgeLayer;
//! use tower::{Layer, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::time::pause();
//! let layer = HedgeLayer::any().after(Duration::from_millis(50)).build()?;
//! // The first attempt would take a minute.
//! let mut waits = vec![Duration::from_millis(5), Duration::from_secs(60)];
//! let waits = std::sync::Arc::new(std::sync::Mutex::new(waits));
//! let service = layer.layer(service_fn(move |_: &'static str| {
//!     let wait = waits.lock().unwrap().pop().unwrap();
//!     async move {
//!         tokio::time::sleep(wait).await;
//!         Ok::<_, std::io::Error>(wait)
//!     }
//! }));
//! let start = tokio::time::Instant::now();
//! assert_eq!(service.oneshot("a question").await?, Duration::from_millis(5));
//! assert!(start.elapsed() < Duration::from_millis(60));
//! # Ok(())
//! # }
//! ```

mod call;
mod config;
mod future;
mod latency;
mod layer;
pub mod metrics;
mod service;
mod shared;

pub use call::{AnyCall, Call, HttpCall};
pub use config::HedgeBuilder;
pub use future::ResponseFuture;
pub use layer::{HedgeLayer, HedgePolicy, OverAny, OverHttp};
pub use service::Hedge;
