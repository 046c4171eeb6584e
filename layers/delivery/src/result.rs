//! How deliveries stand: the recent ones, and whoever listens.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::sync::Mutex;
use bytes::Bytes;
use http::StatusCode;
use tokio::sync::Notify;

use crate::{Cause, DeliveryId, RegistrationId, Scope, map::Map};

/// How a delivery stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// It waits for its first attempt, or that is under way.
    Pending,
    /// The endpoint has answered 2xx.
    Delivered,
    /// There will be no other attempt.
    Failed,
    /// An attempt failed, and there will be another.
    Retrying,
}

impl Status {
    /// A word for programs: `pending`, `delivered`, `failed` or `retrying`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Retrying => "retrying",
        }
    }

    /// Whether it stays so.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Delivered | Self::Failed)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How one delivery stood at a time.
#[derive(Clone)]
#[non_exhaustive]
pub struct DeliveryResult {
    /// The delivery: one event to one registration.
    pub id: DeliveryId,
    /// The event's id: what the receiver sees as `webhook-id`.
    pub event_id: Arc<str>,
    /// The event's name.
    pub event: Arc<str>,
    /// The request that the event is of.
    pub request_id: Option<Arc<str>>,
    /// Who is told.
    pub registration: RegistrationId,
    /// The registration's scope.
    pub scope: Scope,
    /// How it stands.
    pub status: Status,
    /// How many attempts were made.
    pub attempt: u32,
    /// What the last one was answered with.
    pub response_status: Option<StatusCode>,
    /// What the answer's body began with, at most
    /// [so many](crate::WebhooksBuilder::kept_body) bytes.
    pub body: Bytes,
    /// Why it failed, or the last attempt did.
    pub error: Option<Cause>,
    /// When that was, since the Unix epoch.
    pub time: Duration,
    /// How long the last attempt took.
    pub duration: Option<Duration>,
    /// In how long the next attempt is due, from that time, where it is
    /// retried.
    pub retry_in: Option<Duration>,
}

impl fmt::Debug for DeliveryResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryResult")
            .field("id", &self.id)
            .field("event_id", &self.event_id)
            .field("event", &self.event)
            .field("registration", &self.registration)
            .field("scope", &self.scope)
            .field("status", &self.status)
            .field("attempt", &self.attempt)
            .field("response_status", &self.response_status)
            .field("error", &self.error)
            .field("length", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The results of what is over, as many as there may be of each scope and of
/// all.
#[derive(Debug)]
pub(crate) struct History {
    most: usize,
    most_in_scope: usize,
    by_number: BTreeMap<u64, Arc<DeliveryResult>>,
    by_scope: Map<Scope, VecDeque<u64>>,
}

impl History {
    pub(crate) fn new(most: usize, most_in_scope: usize) -> Self {
        Self {
            most,
            most_in_scope,
            by_number: BTreeMap::new(),
            by_scope: Map::default(),
        }
    }

    /// Adds the newest.
    pub(crate) fn push(&mut self, number: u64, result: Arc<DeliveryResult>) {
        let scope = self.by_scope.entry(result.scope.clone()).or_default();
        scope.push_back(number);
        let over = (scope.len() > self.most_in_scope)
            .then(|| scope.pop_front())
            .flatten();
        self.by_number.insert(number, result);
        if let Some(oldest) = over {
            self.by_number.remove(&oldest);
        }
        if self.by_number.len() > self.most
            && let Some((_, oldest)) = self.by_number.pop_first()
            && let Some(scope) = self.by_scope.get_mut(&oldest.scope)
        {
            // The oldest of all is the oldest of its scope.
            scope.pop_front();
            if scope.is_empty() {
                self.by_scope.remove(&oldest.scope);
            }
        }
    }

    /// Newest first.
    pub(crate) fn newest<'a>(
        &'a self,
        scope: Option<&'a Scope>,
    ) -> Box<dyn Iterator<Item = (u64, &'a Arc<DeliveryResult>)> + 'a> {
        let Some(scope) = scope else {
            let all = self.by_number.iter().rev();
            return Box::new(all.map(|(number, result)| (*number, result)));
        };
        let numbers = self.by_scope.get(scope).into_iter().flatten().rev();
        Box::new(numbers.filter_map(|number| Some((*number, self.by_number.get(number)?))))
    }
}

/// What a [`Subscriber`] is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Update {
    /// How the delivery stands now.
    pub result: Arc<DeliveryResult>,
    /// How many updates before this one did not reach you, since you were too
    /// slow: 0, as a rule.
    pub missed: u64,
}

/// Hears of each change of the deliveries of a scope, in their order, until it
/// is dropped: from [`Webhooks::subscribe`](crate::Webhooks::subscribe).
#[derive(Debug)]
pub struct Subscriber(Arc<Feed>);

#[derive(Debug)]
pub(crate) struct Feed {
    most: usize,
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    updates: VecDeque<Update>,
    closed: bool,
}

impl Subscriber {
    pub(crate) fn new(most: usize) -> (Self, Weak<Feed>) {
        let feed = Arc::new(Feed {
            most,
            waiting: Mutex::new(Waiting::default()),
            news: Notify::new(),
        });
        let weak = Arc::downgrade(&feed);
        (Self(feed), weak)
    }

    /// Waits for the next update; `None` when the last [`Webhooks`] handle and
    /// its worker are gone. Dropping the future loses nothing.
    ///
    /// [`Webhooks`]: crate::Webhooks
    pub async fn recv(&mut self) -> Option<Update> {
        loop {
            // Made before it is looked for: what comes in between wakes it.
            let news = self.0.news.notified();
            {
                let mut waiting = self.0.waiting.lock();
                if let Some(update) = waiting.updates.pop_front() {
                    return Some(update);
                }
                if waiting.closed {
                    return None;
                }
            }
            news.await;
        }
    }

    /// The next update, if there is one by now.
    pub fn try_recv(&mut self) -> Option<Update> {
        self.0.waiting.lock().updates.pop_front()
    }
}

impl Feed {
    /// Tells it. Where there is no room the oldest gives way, and the one after
    /// it says so: the newest is never lost.
    fn tell(&self, result: &Arc<DeliveryResult>) {
        {
            let mut waiting = self.waiting.lock();
            let mut missed = 0;
            if waiting.updates.len() == self.most {
                missed = waiting
                    .updates
                    .pop_front()
                    .map_or(0, |lost| lost.missed + 1);
            }
            waiting.updates.push_back(Update {
                result: Arc::clone(result),
                missed: 0,
            });
            if let Some(first) = waiting.updates.front_mut() {
                first.missed += missed;
            }
        }
        self.news.notify_one();
    }

    fn close(&self) {
        self.waiting.lock().closed = true;
        self.news.notify_one();
    }
}

/// Who listens, by what they listen to: what is told of one scope costs nothing
/// for those who listen to others.
#[derive(Debug, Default)]
pub(crate) struct Feeds {
    by_scope: Map<Option<Scope>, Vec<Weak<Feed>>>,
    /// How many there are, also those whose subscriber is gone by now.
    count: usize,
    /// With how many the latter are looked for.
    enough: usize,
}

impl Feeds {
    pub(crate) fn add(&mut self, scope: Option<Scope>, feed: Weak<Feed>) {
        if self.count >= self.enough {
            self.by_scope.retain(|_, feeds| {
                feeds.retain(|feed| feed.strong_count() > 0);
                !feeds.is_empty()
            });
            self.count = self.by_scope.values().map(Vec::len).sum();
            self.enough = (2 * self.count).max(16);
        }
        self.by_scope.entry(scope).or_default().push(feed);
        self.count += 1;
    }

    pub(crate) fn tell(&self, result: &Arc<DeliveryResult>) {
        if self.count == 0 {
            return;
        }
        for scope in [None, Some(result.scope.clone())] {
            let feeds = self.by_scope.get(&scope).into_iter().flatten();
            feeds
                .filter_map(Weak::upgrade)
                .for_each(|feed| feed.tell(result));
        }
    }

    pub(crate) fn close(&mut self) {
        for (_, feeds) in self.by_scope.drain() {
            feeds
                .iter()
                .filter_map(Weak::upgrade)
                .for_each(|feed| feed.close());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn result(number: u64, scope: Scope) -> Arc<DeliveryResult> {
        Arc::new(DeliveryResult {
            id: DeliveryId::from_u128(number.into()),
            event_id: "msg".into(),
            event: "a".into(),
            request_id: None,
            registration: RegistrationId::from("reg"),
            scope,
            status: Status::Delivered,
            attempt: 1,
            response_status: None,
            body: Bytes::new(),
            error: None,
            time: Duration::ZERO,
            duration: None,
            retry_in: None,
        })
    }

    fn scope(which: u8) -> Scope {
        match which {
            0 => Scope::Global,
            other => Scope::request(other.to_string()),
        }
    }

    proptest! {
        #[test]
        fn the_newest_are_kept_of_each_scope_and_of_all(
            most in 1..20_usize,
            most_in_scope in 1..8_usize,
            scopes in proptest::collection::vec(0..4_u8, 0..60),
        ) {
            let mut history = History::new(most, most_in_scope);
            let mut naive: Vec<(u64, u8)> = Vec::new();
            for (number, which) in (0..).zip(scopes) {
                history.push(number, result(number, scope(which)));
                naive.push((number, which));
                let of_scope: Vec<u64> =
                    naive.iter().filter(|(_, other)| *other == which).map(|(n, _)| *n).collect();
                if of_scope.len() > most_in_scope {
                    naive.retain(|(number, _)| *number != of_scope[0]);
                }
                if naive.len() > most {
                    naive.remove(0);
                }
            }
            for which in [None, Some(0), Some(1), Some(2), Some(3)] {
                let wanted = which.map(scope);
                let kept: Vec<u64> =
                    history.newest(wanted.as_ref()).map(|(number, _)| number).collect();
                let expected: Vec<u64> = naive
                    .iter()
                    .rev()
                    .filter(|(_, other)| which.is_none_or(|which| which == *other))
                    .map(|(number, _)| *number)
                    .collect();
                prop_assert_eq!(kept, expected);
            }
            prop_assert!(history.by_scope.len() <= history.by_number.len());
        }

        #[test]
        fn what_a_slow_one_misses_is_counted(
            most in 1..5_usize,
            steps in proptest::collection::vec(any::<bool>(), 1..60),
        ) {
            let (mut subscriber, feed) = Subscriber::new(most);
            let feed = feed.upgrade().unwrap();
            let (mut told, mut expected) = (0, 0);
            for tell in steps {
                if tell {
                    feed.tell(&result(told, Scope::Global));
                    told += 1;
                } else if let Some(update) = subscriber.try_recv() {
                    expected += u128::from(update.missed);
                    prop_assert_eq!(update.result.id.as_u128(), expected);
                    expected += 1;
                }
            }
            while let Some(update) = subscriber.try_recv() {
                expected += u128::from(update.missed);
                prop_assert_eq!(update.result.id.as_u128(), expected);
                expected += 1;
            }
            prop_assert_eq!(expected, u128::from(told));
        }
    }

    #[tokio::test]
    async fn it_ends_when_nobody_will_tell_it_any_more() {
        let mut feeds = Feeds::default();
        let (mut subscriber, feed) = Subscriber::new(4);
        feeds.add(Some(Scope::Global), feed);
        feeds.tell(&result(1, Scope::Global));
        feeds.tell(&result(2, Scope::request("r")));
        feeds.close();
        assert_eq!(subscriber.recv().await.unwrap().result.id.as_u128(), 1);
        assert!(subscriber.recv().await.is_none());
    }

    #[test]
    fn those_who_are_gone_take_no_room_for_long() {
        let mut feeds = Feeds::default();
        let (mut stays, feed) = Subscriber::new(4);
        feeds.add(None, feed);
        for number in 0..1000_u32 {
            let (gone, feed) = Subscriber::new(4);
            feeds.add(Some(Scope::request(number.to_string())), feed);
            drop(gone);
        }
        assert!(feeds.count <= 32 && feeds.by_scope.len() <= 32);
        feeds.tell(&result(1, Scope::Global));
        assert_eq!(stays.try_recv().unwrap().missed, 0);
        let many: Vec<_> = (0..100)
            .map(|_| {
                let (subscriber, feed) = Subscriber::new(4);
                feeds.add(None, feed);
                subscriber
            })
            .collect();
        feeds.tell(&result(2, Scope::request("r")));
        let heard = |mut subscriber: Subscriber| subscriber.try_recv().is_some();
        assert!(many.into_iter().chain([stays]).all(heard));
    }
}
