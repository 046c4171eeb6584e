//! The servers of both ports: how the drain's is set up here.

use buttress::drain::{self, Server, Shutdown};

use crate::settings::Limits;

/// A server with these limits.
pub(crate) fn server(shutdown: &Shutdown, limits: &Limits) -> Server {
    Server::new(shutdown).limits(connections(limits))
}

fn connections(limits: &Limits) -> drain::Limits {
    // The parser's own limits, which answer without a body, stand above ours,
    // which answer with a problem document.
    let head = limits
        .max_headers
        .in_memory()
        .saturating_add(limits.max_path.in_memory());
    let room = head.saturating_add(64 << 10);
    drain::Limits::builder()
        .header_timeout(limits.header_timeout.0)
        .idle_timeout(limits.idle_timeout.0)
        .max_connections(usize::try_from(limits.max_connections.0).unwrap_or(usize::MAX))
        .max_headers(256)
        .max_header_bytes(u32::try_from(room.saturating_mul(2)).unwrap_or(u32::MAX))
        .max_buffer(room)
        .build()
        .expect("checked in the settings")
}
