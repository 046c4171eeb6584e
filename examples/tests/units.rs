//! The tests inside the reverse proxy's modules. Cargo runs none in an example
//! without building it as nothing but a test, and the black-box tests beside
//! this one need the program itself.
#![expect(dead_code, reason = "only the tests are called here, not main")]

#[path = "../reverse-proxy/access.rs"]
mod access;
#[path = "../reverse-proxy/admin.rs"]
mod admin;
#[path = "../reverse-proxy/balance.rs"]
mod balance;
#[path = "../reverse-proxy/body.rs"]
mod body;
#[path = "../reverse-proxy/demo.rs"]
mod demo;
#[path = "../reverse-proxy/forward.rs"]
mod forward;
#[path = "../reverse-proxy/grpc_timeout.rs"]
mod grpc_timeout;
#[path = "../reverse-proxy/headers.rs"]
mod headers;
#[path = "../reverse-proxy/proxy.rs"]
mod proxy;
#[path = "../reverse-proxy/serve.rs"]
mod serve;
#[path = "../reverse-proxy/settings/mod.rs"]
mod settings;
#[path = "../reverse-proxy/upstream.rs"]
mod upstream;
#[path = "../reverse-proxy/webhook.rs"]
mod webhook;
