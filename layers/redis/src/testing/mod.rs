//! Real servers for tests: private, on free ports, and gone with the test.

mod server;

pub use server::Server;
