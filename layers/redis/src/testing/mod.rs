//! Real servers for tests: private, on free ports, and gone with the test.
//!
//! | | is |
//! | --- | --- |
//! | [`Server`] | one `redis-server`: stopped, killed, restarted, demoted, promoted |
//! | [`Setup`] | the same with a password, a user, a Unix socket |
//! | [`Cluster`] | three of them, with slots that move |
//! | [`Wire`] | what is between us and a server: slow, stuck or cut |
//!
//! ```
//! use buttress_redis::{Cmd, testing::Server};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), buttress_redis::Error> {
//! let mut server = Server::start().await;
//! let redis = server.redis();
//! let mut get = Cmd::new();
//! get.arg("GET").arg("answer");
//!
//! server.cmd::<()>(&["SET", "answer", "42"]).await;
//! assert_eq!(redis.run::<i64>("get", &get).await?, 42);
//!
//! server.restart().await;
//! redis.connect().await?;
//! assert_eq!(redis.run::<Option<i64>>("get", &get).await?, None);
//! # Ok(())
//! # }
//! ```
//!
//! Time must be the real one: a paused clock would run ahead of the server.

mod cluster;
mod server;
mod wire;

pub use cluster::Cluster;
pub use server::{Server, Setup};
pub use wire::Wire;
