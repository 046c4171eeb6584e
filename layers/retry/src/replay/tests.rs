use std::{
    cell::Cell,
    collections::VecDeque,
    convert::Infallible,
    marker::PhantomPinned,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Wake, Waker},
    thread,
    time::Duration,
};

use buttress_core::{
    BoxError,
    testing::{
        elapsed,
        web::{BodyFate, ScriptedBody},
    },
};
use http::HeaderMap;
use http_body_util::{BodyExt, BodyStream, Empty, Full, StreamBody, combinators::BoxBody};
use pin_project_lite::pin_project;

use super::*;

mod property;

/// What a [`Plan`] does at one poll.
#[derive(Clone, Debug)]
enum Step {
    Data(Bytes),
    Trailers(HeaderMap),
    Pending,
    Error,
    Panic,
}

pin_project! {
    /// A body that does as it is told, is not `Unpin`, and does not bear to be
    /// polled after its end.
    #[derive(Debug)]
    struct Plan {
        steps: VecDeque<Step>,
        size: SizeHint,
        // It says when it has ended.
        knows_its_end: bool,
        over: bool,
        watch: Watch,
        #[pin]
        _pinned: PhantomPinned,
    }
}

/// What a [`Plan`] tells; dropped with it, but for the clones.
#[derive(Clone, Debug, Default)]
struct Watch(Rc<Cell<usize>>);

impl Watch {
    fn polls(&self) -> usize {
        self.0.get()
    }

    fn is_dropped(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }
}

impl Plan {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            size: SizeHint::default(),
            knows_its_end: false,
            over: false,
            watch: Watch::default(),
            _pinned: PhantomPinned,
        }
    }

    fn of(chunks: &[&'static str]) -> Self {
        Self::new(chunks.iter().map(|chunk| data(chunk)))
    }

    fn then(mut self, step: Step) -> Self {
        self.steps.push_back(step);
        self
    }

    fn knowing_its_end(mut self) -> Self {
        self.knows_its_end = true;
        self
    }

    fn sized(mut self, lower: u64, upper: Option<u64>) -> Self {
        if let Some(upper) = upper {
            self.size.set_upper(upper);
        }
        self.size.set_lower(lower);
        self
    }

    fn watch(&self) -> Watch {
        self.watch.clone()
    }
}

impl Body for Plan {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        let this = self.project();
        assert!(!*this.over, "polled after its end");
        this.watch.0.set(this.watch.0.get() + 1);
        Poll::Ready(match this.steps.pop_front() {
            Some(Step::Data(chunk)) => Some(Ok(Frame::data(chunk))),
            Some(Step::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Some(Step::Pending) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Step::Error) => {
                *this.over = true;
                Some(Err("the body's own"))
            }
            Some(Step::Panic) => {
                *this.over = true;
                // Without the hook's noise.
                resume_unwind(Box::new("the body's own"));
            }
            None => {
                *this.over = true;
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.size
    }
}

fn data(text: &'static str) -> Step {
    Step::Data(Bytes::from_static(text.as_bytes()))
}

fn trailers(name: &'static str, value: &'static str) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert(name, value.parse().unwrap());
    map
}

/// What was read of an attempt's body.
#[derive(Debug, Default, PartialEq)]
struct Read {
    data: Vec<u8>,
    trailers: Option<HeaderMap>,
    error: bool,
    ended: bool,
}

impl Read {
    fn whole(text: &str) -> Self {
        Self {
            data: text.into(),
            ended: true,
            ..Self::default()
        }
    }

    fn part(text: &str) -> Self {
        Self {
            ended: false,
            ..Self::whole(text)
        }
    }
}

/// Polls so many times, or until the end.
fn read<B: Body>(body: &mut ReplayBody<B>, polls: usize) -> Read {
    let mut cx = Context::from_waker(Waker::noop());
    let mut read = Read::default();
    for _ in 0..polls {
        match Pin::new(&mut *body).poll_frame(&mut cx) {
            Poll::Pending => {}
            Poll::Ready(None) => read.ended = true,
            Poll::Ready(Some(Err(_))) => read.error = true,
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => read.data.extend_from_slice(&data),
                Err(frame) => read.trailers = frame.into_trailers().ok(),
            },
        }
        if read.ended || read.error {
            break;
        }
    }
    read
}

const ALL: usize = usize::MAX;

fn next<B: Body>(body: &mut ReplayBody<B>) -> Bytes {
    let mut cx = Context::from_waker(Waker::noop());
    match Pin::new(body).poll_frame(&mut cx) {
        Poll::Ready(Some(Ok(frame))) => frame.into_data().unwrap(),
        _ => panic!("no data"),
    }
}

#[test]
fn each_attempt_sends_the_whole() {
    for plan in [
        Plan::of(&["ab", "c", "", "def"]),
        Plan::of(&["ab", "c", "", "def"]).knowing_its_end(),
    ] {
        let memory = Memory::default();
        let mut replay = Replay::new(plan, 100, &memory);
        for _ in 0..3 {
            assert_eq!(
                read(&mut replay.attempt().unwrap(), ALL),
                Read::whole("abcdef")
            );
            assert_eq!(replay.check(), Ok(()));
        }
        assert!(memory.used() >= 6);
        drop(replay);
        assert_eq!(memory.used(), 0);
    }
}

#[test]
fn the_live_body_goes_on_where_it_was_left() {
    // Before any byte, after some, within the replay, and further.
    let memory = Memory::default();
    let plan = Plan::of(&["a", "b", "c", "d"]).then(Step::Trailers(trailers("sum", "4")));
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    for (polls, text) in [
        (0, ""),
        (2, "ab"),
        (1, "a"),
        (0, ""),
        (3, "abc"),
        (4, "abcd"),
    ] {
        let mut body = replay.attempt().unwrap();
        assert_eq!(read(&mut body, polls), Read::part(text));
    }
    assert_eq!(watch.polls(), 4);
    assert!(!watch.is_dropped());
    for _ in 0..2 {
        let whole = Read {
            trailers: Some(trailers("sum", "4")),
            ..Read::whole("abcd")
        };
        assert_eq!(read(&mut replay.attempt().unwrap(), ALL), whole);
    }
    // Not once for what was remembered; and let go when it had ended.
    assert_eq!(watch.polls(), 5);
    assert!(watch.is_dropped());
}

#[test]
fn a_replay_of_nothing_sends_the_first_chunk_once() {
    // linkerd2#15649.
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["hello", " world"]), 100, &memory);
    drop(replay.attempt().unwrap());
    let whole = read(&mut replay.attempt().unwrap(), ALL);
    assert_eq!(whole, Read::whole("hello world"));
}

#[test]
fn the_bytes_are_the_very_ones() {
    let chunks = [Bytes::from(vec![1; 700]), Bytes::from(vec![2; 10])];
    let memory = Memory::default();
    let plan = Plan::new(chunks.iter().cloned().map(Step::Data));
    let mut replay = Replay::new(plan, 1000, &memory);
    for _ in 0..3 {
        let mut body = replay.attempt().unwrap();
        for chunk in &chunks {
            let sent = next(&mut body);
            assert_eq!(sent, chunk);
            assert_eq!(sent.as_ptr(), chunk.as_ptr());
        }
    }
}

#[test]
fn data_that_is_no_bytes_is_copied_once() {
    let body = Full::new(VecDeque::from(b"abc".to_vec()));
    let mut replay = Replay::new(body, 1000, &Memory::default());
    let first = next(&mut replay.attempt().unwrap());
    let second = next(&mut replay.attempt().unwrap());
    assert_eq!(first, "abc");
    assert_eq!(first.as_ptr(), second.as_ptr());
}

#[test]
fn each_attempt_is_framed_as_the_first() {
    let memory = Memory::default();
    let mut replay = Replay::new(Full::new(Bytes::from_static(b"abc")), 100, &memory);
    for _ in 0..3 {
        let mut body = replay.attempt().unwrap();
        assert_eq!(body.size_hint().exact(), Some(3));
        assert!(!body.is_end_stream());
        read(&mut body, 1);
        assert_eq!(body.size_hint().exact(), Some(0));
        assert!(body.is_end_stream());
    }

    // What was chunked stays so: with a length there would be no trailers.
    let plan = Plan::of(&["abc", "d"]).sized(2, None);
    let mut replay = Replay::new(plan, 100, &memory);
    for polls in [1, ALL, ALL] {
        let mut body = replay.attempt().unwrap();
        assert_eq!(body.size_hint().lower(), 2);
        assert_eq!(body.size_hint().upper(), None);
        read(&mut body, polls);
        assert_eq!(body.size_hint().lower(), 0);
    }

    let plan = Plan::of(&["abc", "d"]).sized(2, Some(9));
    let mut replay = Replay::new(plan, 100, &memory);
    for polls in [0, 1, 2, ALL, ALL] {
        let mut body = replay.attempt().unwrap();
        assert_eq!(body.size_hint().lower(), 2);
        assert_eq!(body.size_hint().upper(), Some(9));
        let sent = read(&mut body, polls).data.len() as u64;
        assert_eq!(body.size_hint().upper(), Some(9 - sent));
    }
}

#[test]
fn the_end_is_told_with_the_last_frame() {
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["a", "b"]).knowing_its_end(), 100, &memory);
    for _ in 0..2 {
        let mut body = replay.attempt().unwrap();
        for at_end in [false, false, true] {
            assert_eq!(body.is_end_stream(), at_end);
            read(&mut body, 1);
        }
    }

    // Not with the last data where trailers follow, and with them.
    let plan = Plan::of(&["a"]).then(Step::Trailers(trailers("x", "y")));
    let mut replay = Replay::new(plan, 100, &memory);
    for polls in [0, 1, 2, 2] {
        let mut body = replay.attempt().unwrap();
        for _ in 0..polls {
            assert!(!body.is_end_stream());
            read(&mut body, 1);
        }
        assert_eq!(body.is_end_stream(), polls == 2);
    }

    // A body that does not tell ends with `None`, and tells the next time.
    let mut replay = Replay::new(Plan::of(&["a"]), 100, &memory);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    assert!(!body.is_end_stream());
    read(&mut body, 1);
    assert!(body.is_end_stream());
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    assert!(body.is_end_stream());
}

#[test]
fn an_empty_body_is_at_its_end_at_once() {
    let memory = Memory::new(0);
    let mut replay = Replay::new(Empty::<Bytes>::new(), 0, &memory);
    for _ in 0..3 {
        let mut body = replay.attempt().unwrap();
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
        assert_eq!(read(&mut body, 2), Read::whole(""));
        // Held at the same time as the next.
        mem::forget(body);
        assert_eq!(replay.check(), Ok(()));
    }

    // One that turns out to be empty.
    let mut replay = Replay::new(Plan::of(&["", ""]), 0, &memory);
    assert_eq!(read(&mut replay.attempt().unwrap(), ALL), Read::whole(""));
    let mut body = replay.attempt().unwrap();
    assert!(body.is_end_stream());
    assert_eq!(read(&mut body, 2), Read::whole(""));
}

#[test]
fn over_the_cap_it_goes_once() {
    let memory = Memory::default();
    for known in [false, true] {
        let mut plan = Plan::of(&["abc", "de", "f", "gh"]);
        if known {
            plan = plan.knowing_its_end();
        }
        let mut replay = Replay::new(plan, 5, &memory);
        let mut body = replay.attempt().unwrap();
        assert_eq!(read(&mut body, 2), Read::part("abcde"));
        assert_eq!(replay.check(), Err(NotReplayable::InUse));
        assert_eq!(memory.used(), 5 + Buffer::PLACE);
        // The byte too much frees the others at once, and is itself not lost.
        assert_eq!(read(&mut body, 1), Read::part("f"));
        assert_eq!(memory.used(), 0);
        assert_eq!(replay.check(), Err(NotReplayable::TooLarge));
        assert_eq!(read(&mut body, ALL), Read::whole("gh"));
        drop(body);
        assert_eq!(replay.attempt().unwrap_err(), NotReplayable::TooLarge);
    }
}

#[test]
fn at_the_cap_it_is_replayed() {
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["abc", "de"]), 5, &memory);
    for _ in 0..2 {
        assert_eq!(
            read(&mut replay.attempt().unwrap(), ALL),
            Read::whole("abcde")
        );
    }
}

#[test]
fn a_replay_that_passes_the_cap_is_the_last() {
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["abc", "de", "f"]), 5, &memory);
    read(&mut replay.attempt().unwrap(), 1);
    assert_eq!(
        read(&mut replay.attempt().unwrap(), ALL),
        Read::whole("abcdef")
    );
    assert_eq!(replay.check(), Err(NotReplayable::TooLarge));
    assert_eq!(memory.used(), 0);
}

#[test]
fn a_body_said_to_be_too_large_is_not_remembered() {
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["abc", "de"]).sized(6, None), 5, &memory);
    // Nothing of it is lost as long as nothing was read.
    drop(replay.attempt().unwrap());
    assert_eq!(replay.check(), Ok(()));
    let mut body = replay.attempt().unwrap();
    assert_eq!(read(&mut body, 1), Read::part("abc"));
    assert_eq!(memory.used(), 0);
    assert_eq!(replay.check(), Err(NotReplayable::TooLarge));
    assert_eq!(read(&mut body, ALL), Read::whole("de"));
    // More than this machine can count.
    let mut replay = Replay::new(Plan::of(&["a"]).sized(u64::MAX, None), ALL, &memory);
    let mut body = replay.attempt().unwrap();
    assert_eq!(body.size_hint().exact(), None);
    assert_eq!(read(&mut body, ALL), Read::whole("a"));
}

#[test]
fn trailers_count_too() {
    // 1 + 2 + 32 bytes, by RFC 7541 §4.1.
    for (cap, fits) in [(3 + 35, true), (3 + 34, false)] {
        let memory = Memory::default();
        let plan = Plan::of(&["abc"]).then(Step::Trailers(trailers("x", "yz")));
        let mut replay = Replay::new(plan, cap, &memory);
        let whole = read(&mut replay.attempt().unwrap(), ALL);
        assert_eq!(whole.trailers, Some(trailers("x", "yz")));
        if fits {
            assert_eq!(memory.used(), cap);
            assert_eq!(read(&mut replay.attempt().unwrap(), ALL), whole);
        } else {
            assert_eq!(memory.used(), 0);
            assert_eq!(replay.check(), Err(NotReplayable::TooLarge));
        }
    }
}

#[test]
fn all_bodies_share_the_memory() {
    let memory = Memory::new(10);
    let same = memory.clone();
    let mut first = Replay::new(Plan::of(&["1234567"]), 100, &memory);
    let mut second = Replay::new(Plan::of(&["abcd", "e"]), 100, &same);
    let mut third = Replay::new(Plan::of(&["xyz"]), 100, &same);
    assert_eq!(
        read(&mut first.attempt().unwrap(), ALL),
        Read::whole("1234567")
    );
    assert_eq!(memory.used(), 7);
    // No room: it streams on all the same.
    assert_eq!(
        read(&mut second.attempt().unwrap(), ALL),
        Read::whole("abcde")
    );
    assert_eq!(second.attempt().unwrap_err(), NotReplayable::NoMemory);
    assert_eq!(second.check(), Err(NotReplayable::NoMemory));
    assert_eq!(memory.used(), 7);
    // To the last byte.
    assert_eq!(read(&mut third.attempt().unwrap(), ALL), Read::whole("xyz"));
    assert_eq!((memory.used(), memory.max()), (10, 10));
    assert_eq!(read(&mut third.attempt().unwrap(), ALL), Read::whole("xyz"));
    assert_eq!(
        read(&mut first.attempt().unwrap(), ALL),
        Read::whole("1234567")
    );
    drop(first);
    assert_eq!(same.used(), 3);
    drop((second, third));
    assert_eq!(same.used(), 0);
}

#[test]
fn what_finds_no_room_midway_frees_what_it_has() {
    let memory = Memory::new(100);
    let mut replay = Replay::new(Plan::of(&["abc", "defg", "h"]), 1000, &memory);
    let mut body = replay.attempt().unwrap();
    let mut other = Replay::new(Full::new(Bytes::from(vec![0; 50])), 100, &memory);
    read(&mut other.attempt().unwrap(), ALL);
    assert_eq!(read(&mut body, 1), Read::part("abc"));
    assert_eq!(memory.used(), 53);
    assert_eq!(read(&mut body, 1), Read::part("defg"));
    assert_eq!(memory.used(), 50);
    assert_eq!(read(&mut body, ALL), Read::whole("h"));
    assert_eq!(replay.check(), Err(NotReplayable::NoMemory));
}

#[test]
fn many_small_chunks_are_charged_for_their_places() {
    let memory = Memory::default();
    let plan = Plan::new((0..1000).map(|_| data("x")));
    let mut replay = Replay::new(plan, 1000, &memory);
    assert_eq!(read(&mut replay.attempt().unwrap(), ALL).data.len(), 1000);
    let taken = 1000 + 1024 * mem::size_of::<Bytes>();
    assert!(memory.used() >= taken, "{} < {taken}", memory.used());
}

#[test]
fn a_body_that_failed_is_not_sent_again() {
    let memory = Memory::default();
    for before in [0, 1, 2] {
        let plan = Plan::of(&["a", "b"]).then(Step::Error);
        let watch = plan.watch();
        let mut replay = Replay::new(plan, 100, &memory);
        assert!(!read(&mut replay.attempt().unwrap(), before).error);
        let mut body = replay.attempt().unwrap();
        let failed = Read {
            error: true,
            ..Read::part("ab")
        };
        assert_eq!(read(&mut body, ALL), failed);
        assert_eq!(memory.used(), 0);
        // Dropped at once, and known while the attempt's body is still held.
        assert!(watch.is_dropped());
        assert_eq!(replay.check(), Err(NotReplayable::BodyFailed));
        assert_eq!(read(&mut body, 1), Read::whole(""));
        drop(body);
        assert_eq!(replay.attempt().unwrap_err(), NotReplayable::BodyFailed);
        assert_eq!(watch.polls(), 3);
    }
}

#[test]
fn a_panic_of_the_body_is_its_failure() {
    let memory = Memory::default();
    let plan = Plan::of(&["a"]).then(Step::Panic);
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    assert_eq!(memory.used(), 1);
    let panicked = catch_unwind(AssertUnwindSafe(|| read(&mut body, 1)));
    assert!(panicked.is_err());
    assert!(watch.is_dropped());
    assert_eq!(memory.used(), 0);
    assert_eq!(replay.check(), Err(NotReplayable::BodyFailed));
    // It does not pass for ended.
    assert!(!body.is_end_stream());
    let again = catch_unwind(AssertUnwindSafe(|| read(&mut body, 1)));
    assert!(again.is_err());
    drop(body);
    assert_eq!(replay.attempt().unwrap_err(), NotReplayable::BodyFailed);
}

#[test]
fn a_panic_elsewhere_hands_the_body_back() {
    let mut replay = Replay::new(Plan::of(&["a", "b"]), 100, &Memory::default());
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _held = body;
        resume_unwind(Box::new("in its reader"));
    }));
    assert!(panicked.is_err());
    assert_eq!(read(&mut replay.attempt().unwrap(), ALL), Read::whole("ab"));
}

#[test]
fn a_body_that_is_held_is_in_use() {
    let mut replay = Replay::new(Plan::of(&["a", "b"]), 100, &Memory::default());
    for polls in [0, 1, 2] {
        // Unread, replaying, streaming.
        let mut body = replay.attempt().unwrap();
        read(&mut body, polls);
        assert_eq!(replay.check(), Err(NotReplayable::InUse));
        assert_eq!(replay.attempt().unwrap_err(), NotReplayable::InUse);
        // Asking has not harmed it.
        drop(body);
        assert_eq!(replay.check(), Ok(()));
    }
}

#[test]
fn a_body_held_after_its_end_is_in_no_ones_way() {
    let memory = Memory::default();
    let mut replay = Replay::new(Plan::of(&["a", "b"]), 100, &memory);
    let mut first = replay.attempt().unwrap();
    read(&mut first, ALL);
    assert_eq!(replay.check(), Ok(()));
    // Nor are those that replay it all, several at a time.
    let mut second = replay.attempt().unwrap();
    assert_eq!(read(&mut second, 1), Read::part("a"));
    let mut third = replay.attempt().unwrap();
    assert_eq!(read(&mut third, 1), Read::part("a"));
    drop(replay);
    assert_eq!(read(&mut second, ALL), Read::whole("b"));
    assert!(memory.used() > 0);
    assert_eq!(read(&mut third, ALL), Read::whole("b"));
    // Though all three are still held.
    assert_eq!(memory.used(), 0);
    drop((first, second, third));
}

#[test]
fn without_the_retry_nothing_is_remembered() {
    let memory = Memory::default();
    let plan = Plan::of(&["a", "b", "c"]).knowing_its_end();
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    assert_eq!(memory.used(), 1);
    drop(replay);
    // At once, not at the next frame, which may be long in coming.
    assert_eq!(memory.used(), 0);
    assert_eq!(read(&mut body, 1), Read::part("b"));
    assert_eq!(memory.used(), 0);
    assert_eq!(read(&mut body, ALL), Read::whole("c"));
    assert!(watch.is_dropped());

    // Dropped midway, the body goes with it.
    let plan = Plan::of(&["a", "b"]);
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    drop(replay);
    drop(body);
    assert!(watch.is_dropped());
}

#[test]
fn without_the_retry_a_replay_goes_to_its_end() {
    let memory = Memory::default();
    let plan = Plan::of(&["a", "b", "c", "d"]);
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    read(&mut replay.attempt().unwrap(), 3);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 1);
    drop(replay);
    assert!(memory.used() > 0);
    assert_eq!(read(&mut body, 2), Read::part("bc"));
    // All is replayed, nobody will want it again.
    assert_eq!(memory.used(), 0);
    assert_eq!(read(&mut body, ALL), Read::whole("d"));
    assert_eq!(memory.used(), 0);
    assert!(watch.is_dropped());

    // Past the replay it is the same as in a first attempt.
    let mut replay = Replay::new(Plan::of(&["a", "b", "c"]), 100, &memory);
    read(&mut replay.attempt().unwrap(), 1);
    let mut body = replay.attempt().unwrap();
    read(&mut body, 2);
    assert!(memory.used() > 0);
    drop(replay);
    assert_eq!(memory.used(), 0);
    assert_eq!(read(&mut body, ALL), Read::whole("c"));

    // Dropped within the replay.
    let plan = Plan::of(&["a", "b", "c"]);
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    read(&mut replay.attempt().unwrap(), 2);
    let body = replay.attempt().unwrap();
    drop(replay);
    drop(body);
    assert_eq!(memory.used(), 0);
    assert!(watch.is_dropped());
}

#[test]
fn a_retry_dropped_between_attempts_drops_the_body() {
    let memory = Memory::default();
    let plan = Plan::of(&["a", "b"]);
    let watch = plan.watch();
    let mut replay = Replay::new(plan, 100, &memory);
    read(&mut replay.attempt().unwrap(), 1);
    drop(replay);
    assert!(watch.is_dropped());
    assert_eq!(memory.used(), 0);
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn whoever_polls_is_woken() {
    let plan = Plan::new([data("a"), Step::Pending, Step::Pending, data("b")]);
    let mut replay = Replay::new(plan, 100, &Memory::default());
    for (polls, woken) in [(2, 1), (2, 1), (3, 0)] {
        let wakes = std::sync::Arc::new(Wakes::default());
        let waker = Waker::from(std::sync::Arc::clone(&wakes));
        let mut cx = Context::from_waker(&waker);
        let mut body = replay.attempt().unwrap();
        for poll in 0..polls {
            let pending = Pin::new(&mut body).poll_frame(&mut cx).is_pending();
            assert_eq!(pending, woken == 1 && poll == 1);
        }
        assert_eq!(wakes.0.load(Ordering::Relaxed), woken);
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_waits_is_read_in_its_time() {
    let second = Duration::from_secs(1);
    let body = ScriptedBody::new()
        .data("a")
        .wait(second)
        .data("b")
        .wait(second)
        .data("c");
    let watch = body.watch();
    let mut replay = Replay::new(body, 100, &Memory::default());
    let mut first = replay.attempt().unwrap();
    first.frame().await.unwrap().unwrap();
    let (took, _) = elapsed(first.frame()).await;
    assert_eq!(took, second);
    drop(first);
    // What is remembered does not wait, the rest does.
    let (took, whole) = elapsed(replay.attempt().unwrap().collect()).await;
    assert_eq!(took, second);
    assert_eq!(whole.unwrap().to_bytes(), "abc");
    assert_eq!(watch.fate(), BodyFate::Complete);
    let (took, whole) = elapsed(replay.attempt().unwrap().collect()).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!(whole.unwrap().to_bytes(), "abc");
}

#[tokio::test]
async fn any_body_will_do() {
    async fn check<B: Body<Error: fmt::Debug>>(body: B) {
        let mut replay = Replay::new(body, 100, &Memory::default());
        for _ in 0..2 {
            let whole = replay.attempt().unwrap().collect().await.unwrap();
            assert_eq!(whole.trailers(), None);
            assert_eq!(whole.to_bytes(), "abc");
        }
    }
    let full = || Full::new(Bytes::from_static(b"abc"));
    check(full()).await;
    check(full().boxed()).await;
    check(full().boxed_unsync()).await;
    check(StreamBody::new(BodyStream::new(full()))).await;
    check("abc".to_owned()).await;
    check(Box::pin(Plan::of(&["ab", "c"]))).await;
    check(ScriptedBody::new().data("ab").data("c")).await;
    check(full().map_frame(|frame| frame.map_data(|data| data.chain(&b""[..])))).await;
    // And that of an attempt may itself be replayed.
    let mut outer = Replay::new(full(), 100, &Memory::default());
    check(outer.attempt().unwrap()).await;
    check(outer.attempt().unwrap()).await;
}

#[test]
fn it_is_as_sendable_as_the_body() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    fn unpin<T: Unpin>() {}
    send::<ReplayBody<http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>>>();
    send::<Replay<http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>>>();
    sync::<ReplayBody<BoxBody<Bytes, Infallible>>>();
    unpin::<ReplayBody<Plan>>();
    send::<Memory>();
    sync::<Memory>();
}

/// Ten mebibytes of frames that each are memory of their own: no more of it is
/// kept than may be remembered.
#[test]
fn a_large_body_takes_no_more_memory_than_its_cap() {
    const FRAME: usize = 16 * 1024;
    const CAP: usize = 64 * 1024;

    /// So many frames yet.
    struct Fresh(usize);

    impl Body for Fresh {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let left = self.0.checked_sub(1);
            self.0 = left.unwrap_or_default();
            Poll::Ready(left.map(|_| Ok(Frame::data(Bytes::from(vec![7; FRAME])))))
        }
    }

    let seen = allocation_counter::measure(|| {
        let memory = Memory::default();
        let mut replay = Replay::new(Fresh(640), CAP, &memory);
        let mut attempt = Box::pin(replay.attempt().unwrap());
        let mut cx = Context::from_waker(Waker::noop());
        let mut bytes = 0;
        while let Poll::Ready(Some(frame)) = attempt.as_mut().poll_frame(&mut cx) {
            bytes += frame.unwrap().into_data().unwrap().len();
        }
        assert_eq!(bytes, 640 * FRAME);
    });
    let most = seen.bytes_max;
    assert!(most >= CAP as u64, "{most}: nothing was remembered");
    assert!(most <= (CAP + 2 * FRAME) as u64, "{most}");
}

#[test]
fn what_the_hot_path_allocates() {
    fn allocations(work: impl FnOnce()) -> u64 {
        allocation_counter::measure(work).count_total
    }
    let memory = Memory::default();
    // As hyper hands it on: a part of a shared buffer.
    let mut shared = bytes::BytesMut::from(&[7; 4096][..]);
    let kilobyte = shared.split_to(1024).freeze();
    let round = |body: Full<Bytes>, attempts: usize| {
        let mut replay = Replay::new(body, 65536, &memory);
        for _ in 0..attempts {
            let mut body = replay.attempt().unwrap();
            while !body.is_end_stream() {
                next(&mut body);
            }
        }
    };
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
    assert_eq!(allocations(|| round(Full::new(kilobyte.clone()), 1)), 2);
    let once = || drop(ReplayBody::once(Full::new(kilobyte.clone())));
    assert_eq!(allocations(once), 1);
    // A replay costs none.
    assert_eq!(allocations(|| round(Full::new(kilobyte.clone()), 5)), 2);
    // `Bytes` that own a vector alone make a count when they are first shared,
    // as they do for whoever clones a request.
    let alone = Bytes::from(vec![7; 1024]);
    assert_eq!(allocations(|| drop(Bytes::from(vec![7; 1024]).clone())), 2);
    assert_eq!(allocations(|| round(Full::new(alone), 1)), 3);
    assert_eq!(allocations(|| round(Full::new(Bytes::new()), 2)), 0);
}

#[test]
fn a_large_body_streams_without_a_copy_of_it() {
    let memory = Memory::default();
    let chunk = Bytes::from_static(&[7; 16384]);
    let plan = Plan::new((0..640).map(|_| Step::Data(chunk.clone())));
    let mut replay = Replay::new(plan, 65536, &memory);
    let mut body = replay.attempt().unwrap();
    let cost = allocation_counter::measure(|| {
        for _ in 0..640 {
            assert_eq!(next(&mut body).as_ptr(), chunk.as_ptr());
            assert!(memory.used() <= 65536 + 3 * Buffer::PLACE);
        }
    });
    // The list of four chunks; after the cap, nothing.
    assert_eq!(cost.count_total, 1);
    assert_eq!(cost.bytes_total, 4 * mem::size_of::<Bytes>() as u64);
    assert_eq!(memory.used(), 0);
}

#[test]
fn memory_is_never_exceeded_by_many() {
    let memory = Memory::new(100);
    thread::scope(|scope| {
        for n in 0..8 {
            let memory = &memory;
            scope.spawn(move || {
                for i in 0..2000 {
                    let size = (n * 7 + i * 13) % 61;
                    if memory.reserve(size) {
                        assert!(memory.used() <= 100);
                        memory.release(size);
                    }
                }
            });
        }
    });
    assert_eq!(memory.used(), 0);
    assert!(memory.reserve(100));
    assert!(!memory.reserve(1));
    assert!(memory.reserve(0));
    // Nor by a sum that passes what can be counted.
    let memory = Memory::new(ALL);
    assert!(memory.reserve(1));
    assert!(!memory.reserve(ALL));
    assert_eq!(Memory::default().max(), 64 * 1024 * 1024);
}

#[test]
fn hand_over_between_threads_loses_nothing() {
    // The attempt's body is read and dropped by a connection's task while the
    // retry asks for it.
    let memory = Memory::default();
    for round in 0..500_usize {
        let chunks = (0..8_u8).map(|n| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![n; 3]))));
        let frames = Chunks(chunks.collect());
        let mut replay = Replay::new(frames, 1000, &memory);
        thread::scope(|scope| {
            for polls in [round % 9, round % 5, round % 10] {
                let mut body = loop {
                    match replay.attempt() {
                        Ok(body) => break body,
                        Err(why) => assert_eq!(why, NotReplayable::InUse),
                    }
                    thread::yield_now();
                };
                scope.spawn(move || read(&mut body, polls));
            }
            let mut body = loop {
                if let Ok(body) = replay.attempt() {
                    break body;
                }
                thread::yield_now();
            };
            scope.spawn(move || drop(replay));
            let whole = read(&mut body, ALL);
            assert!(whole.ended);
            let expected: Vec<u8> = (0..8).flat_map(|n| [n; 3]).collect();
            assert_eq!(whole.data, expected);
        });
        assert_eq!(memory.used(), 0);
    }
}

/// A body that can be sent to another thread.
struct Chunks(VecDeque<Result<Frame<Bytes>, Infallible>>);

impl Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front())
    }
}

#[test]
fn the_reasons_can_be_read() {
    let text = [
        NotReplayable::TooLarge,
        NotReplayable::BodyFailed,
        NotReplayable::InUse,
        NotReplayable::NoMemory,
    ]
    .map(|why| why.to_string());
    assert_eq!(
        text,
        [
            "the request body is too large to be sent again",
            "the request body failed",
            "the request body is still being sent",
            "no memory is left to send the request body again",
        ]
    );
}
