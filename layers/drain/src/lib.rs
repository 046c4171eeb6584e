#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(any(feature = "axum", feature = "tonic"))]
mod adapters;
mod aside;
mod body;
mod books;
mod config;
mod current;
mod error;
mod future;
mod guard;
mod hook;
#[cfg(any(unix, windows))]
mod interrupt;
#[cfg(feature = "serve")]
mod io;
mod label;
mod layer;
mod ledger;
#[cfg(feature = "serve")]
mod listen;
pub mod metrics;
mod permit;
mod phase;
mod refuse;
mod report;
mod run;
#[cfg(feature = "serve")]
mod serve;
mod service;
mod shutdown;
mod signal;
mod stripe;
#[cfg(all(unix, feature = "systemd"))]
pub mod systemd;
mod tracked;
// For loom alone, which runs without the rest of the server.
#[cfg(all(test, buttress_loom, not(feature = "serve")))]
#[path = "io/traffic.rs"]
#[expect(dead_code, reason = "its users are the server's")]
mod traffic;
mod watchdog;

#[cfg(feature = "axum")]
pub use adapters::axum::{AxumListener, TappedListener};
#[cfg(feature = "tonic")]
pub use adapters::tonic::{SetTcpConnectInfo, TcpConnectInfos, TonicIncoming};
pub use body::DrainBody;
pub use config::ShutdownBuilder;
pub use error::ConfigError;
pub use future::ResponseFuture;
pub use guard::{ConnectionGuard, ConnectionState, Guard, ServerGuard};
pub use hook::{Hook, HookOutput, Priority};
#[cfg(feature = "serve")]
pub use io::DrainIo;
pub use label::Label;
pub use layer::DrainLayer;
#[cfg(feature = "serve")]
pub use listen::{Listener, Socket};
pub use phase::{Phase, Reached};
pub use refuse::{Refuse, RefuseFuture, RefuseLayer};
pub use report::{Cut, CutKind, Failure, HookOutcome, HookReport, Report};
#[cfg(feature = "serve")]
pub use serve::{
    Handshake, Limits, LimitsBuilder, Peer, PeerAddrs, Plain, Server, SetPeerAddr, StreamExecutor,
};
#[cfg(feature = "tls")]
pub use serve::{Tls, TlsInfo};
pub use service::Drain;
pub use shutdown::{Schedule, Shutdown};
pub use signal::DrainSignal;
