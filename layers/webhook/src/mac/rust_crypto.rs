//! By `hmac` and `sha2`, in Rust.

use hmac::{Hmac, KeyInit, Mac as _};
use sha2::{Digest as _, Sha256};
use zeroize::ZeroizeOnDrop;

use super::TAG;

/// A key's schedule.
pub(super) struct Start(Hmac<Sha256>);

impl Start {
    pub(super) fn new(key: &[u8]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes keys of any length"))
    }

    pub(super) fn tag(&self, pieces: &[&[u8]]) -> [u8; TAG] {
        let mut running = self.0.clone();
        for piece in pieces {
            running.update(piece);
        }
        running.finalize().into_bytes().into()
    }
}

pub(crate) fn sha256(pieces: &[&[u8]]) -> [u8; TAG] {
    let mut running = Sha256::new();
    for piece in pieces {
        running.update(piece);
    }
    running.finalize().into()
}

// `Hmac` holds two of these and a buffer that is wiped, too, but does not say so.
const _: () = {
    const fn wiped<T: ZeroizeOnDrop>() {}
    wiped::<Sha256>();
};
