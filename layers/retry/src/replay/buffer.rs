//! What is remembered of one body.

use std::mem;

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;

use super::{Memory, NotReplayable};

/// The chunks and trailers of a body as far as it was read, within a cap of
/// its own and within the memory of all.
pub(super) struct Buffer {
    /// Alone in most bodies, and then the list costs no allocation. Empty if
    /// there is none: no empty chunk is kept.
    first: Bytes,
    rest: Vec<Bytes>,
    trailers: Option<Box<HeaderMap>>,
    /// Bytes that may still come.
    room: usize,
    charged: usize,
    memory: Memory,
}

impl Buffer {
    /// What a chunk after the first costs beside its bytes: its place in the
    /// list, and as much again for how lists grow. Else a body in chunks of
    /// one byte would take thirty times what it is charged.
    pub(super) const PLACE: usize = 2 * mem::size_of::<Bytes>();

    pub(super) fn new(cap: usize, memory: &Memory) -> Self {
        Self {
            first: Bytes::new(),
            rest: Vec::new(),
            trailers: None,
            room: cap,
            charged: 0,
            memory: memory.clone(),
        }
    }

    /// Keeps this frame if it is one that can be kept.
    pub(super) fn push(&mut self, frame: &Frame<Bytes>) -> Result<(), NotReplayable> {
        if let Some(chunk) = frame.data_ref() {
            if chunk.is_empty() {
                return Ok(());
            }
            if self.first.is_empty() {
                self.charge(chunk.len(), 0)?;
                self.first = chunk.clone();
            } else {
                self.charge(chunk.len(), Self::PLACE)?;
                self.rest.push(chunk.clone());
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.charge(size(trailers), 0)?;
            self.trailers = Some(Box::new(trailers.clone()));
        }
        Ok(())
    }

    /// `extra` counts for the memory of all only.
    fn charge(&mut self, bytes: usize, extra: usize) -> Result<(), NotReplayable> {
        let Some(room) = self.room.checked_sub(bytes) else {
            return Err(NotReplayable::TooLarge);
        };
        let cost = bytes.saturating_add(extra);
        if !self.memory.reserve(cost) {
            return Err(NotReplayable::NoMemory);
        }
        self.charged += cost;
        self.room = room;
        Ok(())
    }

    pub(super) fn chunks(&self) -> usize {
        usize::from(!self.first.is_empty()) + self.rest.len()
    }

    /// # Panics
    ///
    /// Unless there are more chunks than `index`.
    pub(super) fn chunk(&self, index: usize) -> &Bytes {
        match index.checked_sub(1) {
            None => &self.first,
            Some(index) => &self.rest[index],
        }
    }

    pub(super) fn trailers(&self) -> Option<&HeaderMap> {
        self.trailers.as_deref()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.release(self.charged);
    }
}

/// As RFC 7541 §4.1 counts them.
pub(super) fn size(trailers: &HeaderMap) -> usize {
    trailers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum()
}
