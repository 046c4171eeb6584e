//! The guard on real sockets: who may not be called sees no connection.

mod client;
mod dial;
mod engine;

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    vec,
};

use hyper_util::client::legacy::connect::dns::Name;
use tokio::net::{TcpListener, TcpStream};
use tower::Service;

/// A listener that nobody is to call.
struct Trap {
    listener: TcpListener,
}

impl Trap {
    /// On every address of this machine, IPv6 too where there is any.
    async fn set() -> Self {
        let listener = match TcpListener::bind("[::]:0").await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind("0.0.0.0:0").await.unwrap(),
        };
        Self { listener }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// Whoever called first is the first to be accepted: it is us.
    async fn assert_untouched(&self) {
        let ours = TcpStream::connect(("127.0.0.1", self.port()))
            .await
            .unwrap();
        let (_, first) = self.listener.accept().await.unwrap();
        assert_eq!(first.port(), ours.local_addr().unwrap().port());
    }
}

/// A resolver that gives these answers in turn, the last of them for ever.
#[derive(Clone)]
struct Answers {
    answers: Arc<Mutex<Vec<Vec<SocketAddr>>>>,
    asked: Arc<AtomicUsize>,
}

impl Answers {
    fn new<const N: usize>(answers: [&[&str]; N]) -> Self {
        let answer = |texts: &[&str]| {
            let address = |text: &&str| (text.parse::<IpAddr>().unwrap(), 0).into();
            texts.iter().map(address).collect()
        };
        Self::of(answers.into_iter().rev().map(answer).collect())
    }

    fn of(answers: Vec<Vec<SocketAddr>>) -> Self {
        Self {
            answers: Arc::new(Mutex::new(answers)),
            asked: Arc::default(),
        }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Service<Name> for Answers {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut answers = self.answers.lock().unwrap();
        let answer = if answers.len() > 1 {
            answers.pop()
        } else {
            answers.last().cloned()
        };
        ready(Ok(answer.unwrap_or_default().into_iter()))
    }
}
