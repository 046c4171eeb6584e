use std::{
    cell::RefCell,
    collections::VecDeque,
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use http_body_util::{BodyExt, Empty, Full};

use super::*;

type Log = Rc<RefCell<Vec<(String, u64)>>>;

fn guard(log: &Log) -> impl BodyGuard + use<> {
    let log = Rc::clone(log);
    move |end: BodyEnd<'_>, bytes: u64| {
        let end = match end {
            BodyEnd::Complete { trailers: None } => "complete".to_owned(),
            BodyEnd::Complete { trailers: Some(t) } => format!("trailers {}", t.len()),
            BodyEnd::Failed => "failed".to_owned(),
            BodyEnd::Dropped => "dropped".to_owned(),
        };
        log.borrow_mut().push((end, bytes));
    }
}

/// A body that does as it is told, and never says that it is at its end.
struct Script(VecDeque<Result<Frame<Bytes>, &'static str>>);

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        Poll::Ready(self.0.pop_front())
    }
}

fn script(
    frames: impl IntoIterator<Item = Result<Frame<Bytes>, &'static str>>,
    polls: usize,
) -> Vec<(String, u64)> {
    let log = Log::default();
    let body = Script(frames.into_iter().collect());
    let mut body = Box::pin(GuardedBody::new(body, guard(&log)));
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..polls {
        assert!(body.as_mut().poll_frame(&mut cx).is_ready());
    }
    drop(body);
    log.take()
}

fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

#[test]
fn the_guard_hears_each_end_once() {
    let ended = |end: &str, bytes| vec![(end.to_owned(), bytes)];
    assert_eq!(script([data("ab"), data("c")], 3), ended("complete", 3));
    assert_eq!(script([data("ab"), data("c")], 2), ended("dropped", 3));
    assert_eq!(script([data("ab"), Err("x")], 2), ended("failed", 2));
    assert_eq!(script([], 0), ended("dropped", 0));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    assert_eq!(
        script([data("a"), Ok(Frame::trailers(trailers))], 2),
        ended("trailers 1", 1)
    );
}

#[test]
fn a_body_with_nothing_to_send_has_ended() {
    let log = Log::default();
    let body = GuardedBody::new(Empty::<Bytes>::new(), guard(&log));
    assert_eq!(log.borrow().as_slice(), [("complete".to_owned(), 0)]);
    drop(body);
    assert_eq!(log.borrow().len(), 1);
}

#[test]
fn the_last_frame_ends_a_body_that_can_tell() {
    let log = Log::default();
    let mut body = Box::pin(GuardedBody::new(Full::new(Bytes::from("abc")), guard(&log)));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(body.as_mut().poll_frame(&mut cx).is_ready());
    assert_eq!(log.borrow().as_slice(), [("complete".to_owned(), 3)]);
}

/// Two bytes, then a panic.
struct Panics(bool);

impl Body for Panics {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if std::mem::replace(&mut self.0, true) {
            // Without the hook's noise.
            resume_unwind(Box::new("in poll_frame"));
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"ab")))))
    }
}

#[test]
fn a_panic_in_the_body_is_its_failure() {
    let log = Log::default();
    let mut body = Box::pin(GuardedBody::new(Panics(false), guard(&log)));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(body.as_mut().poll_frame(&mut cx).is_ready());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _ = body.as_mut().poll_frame(&mut cx);
    }));
    assert!(panicked.is_err());
    // At once, and not again when what is left of it is dropped.
    assert_eq!(log.borrow().as_slice(), [("failed".to_owned(), 2)]);
    drop(body);
    assert_eq!(log.borrow().len(), 1);
}

#[test]
fn a_panic_elsewhere_drops_the_body() {
    let log = Log::default();
    let mut body = Box::pin(GuardedBody::new(Panics(false), guard(&log)));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(body.as_mut().poll_frame(&mut cx).is_ready());
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _held = body;
        resume_unwind(Box::new("in its reader"));
    }));
    assert!(panicked.is_err());
    assert_eq!(log.borrow().as_slice(), [("dropped".to_owned(), 2)]);
}

/// Reads one frame of a body while something else unwinds.
struct ReadsInDrop<B: Body + Unpin>(B);

impl<B: Body + Unpin> Drop for ReadsInDrop<B> {
    fn drop(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut self.0).poll_frame(&mut cx).is_ready());
    }
}

#[test]
fn a_frame_read_while_something_else_unwinds_is_no_failure() {
    let log = Log::default();
    let body = GuardedBody::new(Panics(false), guard(&log));
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _reads = ReadsInDrop(body);
        resume_unwind(Box::new("elsewhere"));
    }));
    assert!(panicked.is_err());
    assert_eq!(log.borrow().as_slice(), [("dropped".to_owned(), 2)]);
}

#[test]
fn waiting_for_a_frame_tells_nothing() {
    struct Waits;

    impl Body for Waits {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    let log = Log::default();
    let mut body = GuardedBody::new(Waits, guard(&log));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut body).poll_frame(&mut cx).is_pending());
    assert!(log.borrow().is_empty());
    drop(body);
    assert_eq!(log.borrow().as_slice(), [("dropped".to_owned(), 0)]);
}

#[tokio::test]
async fn a_response_body_is_either() {
    type Inner = Full<Bytes>;
    let inner = ResponseBody::inner(Inner::from("inner"));
    assert_eq!(inner.size_hint().exact(), Some(5));
    assert_eq!(inner.collect().await.unwrap().to_bytes(), "inner");

    let refusal = ResponseBody::<Inner>::refusal("no".into());
    assert!(!refusal.is_end_stream());
    assert_eq!(refusal.size_hint().exact(), Some(2));
    assert_eq!(refusal.collect().await.unwrap().to_bytes(), "no");

    let empty = ResponseBody::<Inner>::refusal(Bytes::new());
    assert!(empty.is_end_stream());
    assert_eq!(empty.size_hint().exact(), Some(0));
    let collected: Result<_, Infallible> = empty.collect().await;
    assert!(collected.unwrap().to_bytes().is_empty());
}
