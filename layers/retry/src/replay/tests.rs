use std::{
    cell::Cell,
    collections::VecDeque,
    convert::Infallible,
    marker::PhantomPinned,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Wake, Waker},
};

use buttress_core::{
    BoxError,
    testing::web::{BodyFate, ScriptedBody},
};
use http::HeaderMap;
use http_body_util::{BodyExt, BodyStream, Empty, Full, StreamBody};

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

/// A body that does as it is told, is not `Unpin`, and does not bear to be
/// polled after its end.
struct Plan {
    steps: VecDeque<Step>,
    size: SizeHint,
    /// It says when it has ended.
    knows_its_end: bool,
    over: bool,
    /// Shared by all who want to know.
    polls: Rc<Cell<usize>>,
    dropped: Rc<Cell<bool>>,
    _pinned: PhantomPinned,
}

impl Plan {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            size: SizeHint::default(),
            knows_its_end: false,
            over: false,
            polls: Rc::default(),
            dropped: Rc::default(),
            _pinned: PhantomPinned,
        }
    }

    fn of(chunks: &[&'static str]) -> Self {
        Self::new(chunks.iter().map(|chunk| data(chunk)))
    }

    fn knows_its_end(mut self) -> Self {
        self.knows_its_end = true;
        self
    }

    fn sized(mut self, lower: u64, upper: Option<u64>) -> Self {
        self.size.set_lower(lower);
        if let Some(upper) = upper {
            self.size.set_upper(upper);
        }
        self
    }
}

impl Body for Plan {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        // Nothing in it is pinned but itself.
        let this = Pin::into_inner(project(self));
        assert!(!*this.over, "polled after its end");
        this.polls.set(this.polls.get() + 1);
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
