//! By AWS-LC, in assembly. It wipes the schedules of its keys, and of what it
//! computes by them, when they are dropped (`HMAC_CTX_cleanup`); ring, which
//! measures the same, wipes neither.

use aws_lc_rs::{
    digest::{self, SHA256},
    hmac::{Context, HMAC_SHA256, Key},
};

use super::TAG;

/// A key's schedule.
pub(super) struct Start(Key);

impl Start {
    pub(super) fn new(key: &[u8]) -> Self {
        Self(Key::new(HMAC_SHA256, key))
    }

    pub(super) fn tag(&self, pieces: &[&[u8]]) -> [u8; TAG] {
        let mut running = Context::with_key(&self.0);
        for piece in pieces {
            running.update(piece);
        }
        array(running.sign().as_ref())
    }
}

pub(crate) fn sha256(pieces: &[&[u8]]) -> [u8; TAG] {
    let mut running = digest::Context::new(&SHA256);
    for piece in pieces {
        running.update(piece);
    }
    array(running.finish().as_ref())
}

fn array(bytes: &[u8]) -> [u8; TAG] {
    bytes.try_into().expect("SHA-256 has 32 bytes")
}
