//! The reverse proxy as a black box: the real program, real sockets, and what
//! its contract promises to scripts, operators and clients.

mod answers;
mod breakers;
mod deadlines;
mod fleet;
mod forwarding;
mod life;
mod retries;
mod settings;
mod stopping;
mod streaming;
mod stuck;
mod support;
#[path = "../../../layers/drain/tests/serve/talk.rs"]
mod talk;
mod talking;
mod tls;
mod webhooks;
