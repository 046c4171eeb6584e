//! Messages on a channel, and word of what may have been missed.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use futures_util::{
    StreamExt,
    future::{Either, OptionFuture, select},
};
use redis::{
    Value,
    aio::{PubSubSink, PubSubStream},
};
use tokio::time::{Instant, sleep_until, timeout};

use crate::redis::Shared;

/// After so long without a message the server is asked whether it is there.
const QUIET: Duration = Duration::from_secs(2);

/// What comes of a [`Subscription`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The channel is listened to from now on: the first of all notices, and
    /// again after each lost connection. What was said before was missed, so
    /// this is when to look for oneself.
    Listening,
    /// A message.
    Message(Vec<u8>),
}

impl fmt::Debug for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening => f.write_str("Listening"),
            Self::Message(message) => f.debug_tuple("Message").field(&message.len()).finish(),
        }
    }
}

/// Listens to one channel, on a connection of its own that is made again
/// whenever it is lost. Redis delivers a message at most once: what is said
/// while nobody listens is gone.
///
/// A connection on which nothing has come for two seconds is asked for a sign
/// of life; without one within [`Config::connect_timeout`] it is given up.
/// Messages that nobody takes are kept in memory.
///
/// [`Config::connect_timeout`]: crate::Config::connect_timeout
pub struct Subscription {
    shared: Arc<Shared>,
    channel: String,
    line: Option<Line>,
    /// Before which no other attempt is made.
    next: Option<Instant>,
}

struct Line {
    messages: PubSubStream,
    sink: PubSubSink,
    /// When it is asked for a sign of life.
    look: Instant,
    asked: Option<Asked>,
}

/// Whether there was a sign of life in time.
type Asked = Pin<Box<dyn Future<Output = bool> + Send>>;

enum Event {
    Message(Vec<u8>),
    Alive,
    Dead,
}

impl Subscription {
    pub(crate) fn new(shared: Arc<Shared>, channel: String) -> Self {
        Self {
            shared,
            channel,
            line: None,
            next: None,
        }
    }

    /// Waits for the next notice, however long the server is gone. Dropping
    /// the future loses nothing that has come.
    pub async fn next(&mut self) -> Notice {
        loop {
            while let Some(line) = &mut self.line {
                match line.event(self.shared.connect_timeout).await {
                    Event::Message(message) => return Notice::Message(message),
                    Event::Alive => {}
                    Event::Dead => self.line = None,
                }
            }
            if let Some(next) = self.next {
                sleep_until(next).await;
            }
            self.next = Some(Instant::now() + self.shared.keeper.pause());
            let limit = self.shared.connect_timeout;
            let listened = self.shared.dialer.messages(limit, &self.channel);
            if let Some(messages) = listened.await {
                let (sink, messages) = messages.split();
                self.line = Some(Line {
                    messages,
                    sink,
                    look: Instant::now() + QUIET,
                    asked: None,
                });
                return Notice::Listening;
            }
        }
    }
}

impl Line {
    /// What is under way stays so where the future is dropped.
    async fn event(&mut self, limit: Duration) -> Event {
        let event = {
            let quiet = std::pin::pin!(async {
                if self.asked.is_none() {
                    sleep_until(self.look).await;
                    let mut sink = self.sink.clone();
                    self.asked = Some(Box::pin(async move {
                        matches!(timeout(limit, sink.ping::<Value>()).await, Ok(Ok(_)))
                    }));
                }
                let asked = OptionFuture::from(self.asked.as_mut()).await;
                asked.unwrap_or_default()
            });
            // Messages first: one that is here was sent by a server that lives.
            match select(self.messages.next(), quiet).await {
                Either::Left((Some(message), _)) => {
                    Event::Message(message.get_payload_bytes().to_vec())
                }
                Either::Right((true, _)) => Event::Alive,
                Either::Left((None, _)) | Either::Right((false, _)) => Event::Dead,
            }
        };
        if let Event::Message(_) | Event::Alive = event {
            self.look = Instant::now() + QUIET;
            self.asked = None;
        }
        event
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("listening", &self.line.is_some())
            .finish_non_exhaustive()
    }
}
