//! Run by
//!
//! ```text
//! RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-retry --lib --release loom
//! ```

use std::{convert::Infallible, task::Waker};

use buttress_core::sync::{model, thread};

use super::*;

/// The bytes `1..=n`, one a frame, with or without telling its end.
struct Count {
    next: u8,
    n: u8,
    knows_its_end: bool,
}

impl Body for Count {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready((self.next < self.n).then(|| {
            self.next += 1;
            Ok(Frame::data(Bytes::copy_from_slice(&[self.next])))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.next == self.n
    }
}

fn read(mut body: ReplayBody<Count>, polls: usize) -> (Vec<u8>, bool) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut bytes = Vec::new();
    for _ in 0..polls {
        match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => bytes.extend(frame.into_data().unwrap()),
            _ => return (bytes, true),
        }
    }
    (bytes, false)
}

/// The first attempt's body is read in a connection's task, while the retry
/// makes a second one if it can, and is dropped.
fn hand_over(cap: usize, polls: usize, knows_its_end: bool) {
    model(move || {
        let memory = Memory::new(1000);
        let count = Count {
            next: 0,
            n: 2,
            knows_its_end,
        };
        let mut replay = Replay::new(count, cap, &memory);
        let first = replay.attempt().unwrap();
        let connection = thread::spawn(move || read(first, polls));
        let asked = replay.check();
        let second = replay.attempt();
        // What could be done a moment ago still can.
        assert!(asked.is_err() || second.is_ok());
        drop(replay);
        match second {
            Ok(second) => assert_eq!(read(second, 9), (vec![1, 2], true)),
            Err(NotReplayable::InUse) => {}
            Err(why) => assert_eq!((why, cap), (NotReplayable::TooLarge, 1)),
        }
        let (bytes, ended) = connection.join().unwrap();
        assert_eq!(bytes, [1, 2][..polls.min(2)]);
        assert_eq!(ended, polls > 2);
        assert_eq!(memory.used(), 0);
    });
}

#[test]
fn a_body_is_handed_over_once() {
    hand_over(10, 1, false);
}

#[test]
fn a_body_that_ends_is_complete_for_the_next() {
    hand_over(10, 3, false);
    hand_over(10, 3, true);
}

#[test]
fn a_body_that_passes_the_cap_is_lost_once() {
    hand_over(1, 3, false);
}

#[test]
fn memory_has_room_for_one_of_two() {
    model(|| {
        let memory = Memory::new(10);
        let take = |memory: Memory| {
            let taken = memory.reserve(6);
            assert!(memory.used() <= 10);
            taken
        };
        let other = memory.clone();
        let other = thread::spawn(move || take(other));
        let one = take(memory.clone());
        assert!(one ^ other.join().unwrap());
        memory.release(6);
        assert_eq!(memory.used(), 0);
    });
}
