//! Real servers for tests: private, on free ports, and gone with the test.
//!
//! | | is |
//! | --- | --- |
//! | [`Server`] | one `redis-server`: stopped, killed, restarted, demoted, promoted |
//! | [`Setup`] | the same with a password, a user, a Unix socket |
//! | [`Cluster`] | three of them, with slots that move |
//! | [`Wire`] | what is between us and a server: slow, stuck or cut |
//!
//! Time must be the real one: a paused clock would run ahead of the server.

mod cluster;
mod server;
mod wire;

pub use cluster::Cluster;
pub use server::{Server, Setup};
pub use wire::Wire;
