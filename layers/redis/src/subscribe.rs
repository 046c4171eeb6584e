//! Messages on a channel, and word of what may have been missed.

use std::{fmt, sync::Arc};

use redis::aio::PubSubStream;
use tokio::time::{sleep, timeout};

use crate::redis::Shared;

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
pub struct Subscription {
    shared: Arc<Shared>,
    channel: String,
    messages: Option<PubSubStream>,
    /// Whether the last attempt failed.
    failed: bool,
}

impl Subscription {
    pub(crate) fn new(shared: Arc<Shared>, channel: String) -> Self {
        Self {
            shared,
            channel,
            messages: None,
            failed: false,
        }
    }

    /// Waits for the next notice, however long the server is gone. Dropping
    /// the future loses nothing that has come.
    pub async fn next(&mut self) -> Notice {
        use futures_util::StreamExt;
        loop {
            if let Some(messages) = &mut self.messages {
                match messages.next().await {
                    Some(message) => {
                        return Notice::Message(message.get_payload_bytes().to_vec());
                    }
                    None => self.messages = None,
                }
            }
            if self.failed {
                sleep(self.shared.keeper.pause()).await;
            }
            self.failed = true;
            let listened = timeout(self.shared.connect_timeout, async {
                let mut messages = self.shared.dialer.messages().await?;
                messages.subscribe(&self.channel).await?;
                redis::RedisResult::Ok(messages.into_on_message())
            });
            if let Ok(Ok(messages)) = listened.await {
                self.messages = Some(messages);
                self.failed = false;
                return Notice::Listening;
            }
        }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("listening", &self.messages.is_some())
            .finish_non_exhaustive()
    }
}
