//! gRPC conversations that are open when it is stopped: tonic on both sides.

use bytes::Bytes;
use tokio::{sync::mpsc, time::Instant};
use tonic::{
    Request, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};

use crate::{
    stopping::{STOP, cut, end, phase},
    support::{Proxy, soon},
    talk::{PATH, Say, Talk, talk},
};

/// Says what it hears, until the client has no more to say.
async fn echo(request: Request<Streaming<Bytes>>, say: Say) {
    let mut said = request.into_inner();
    while let Ok(Some(heard)) = said.message().await {
        if say.send(Ok(heard)).await.is_err() {
            return;
        }
    }
}

async fn proxy() -> Proxy {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let upstream = incoming.local_addr().unwrap();
    let server = Server::builder().add_service(Talk(echo));
    tokio::spawn(server.serve_with_incoming(incoming));
    Proxy::start(&format!(
        "{STOP}routes: [{{ name: all, path: /, upstream: ['h2c://{upstream}'] }}]\n"
    ))
    .await
}

struct Conversation {
    // It would reconnect, but what is open is not opened again.
    _channel: Channel,
    say: mpsc::Sender<Bytes>,
    answer: Streaming<Bytes>,
}

impl Conversation {
    async fn through(proxy: &Proxy) -> Self {
        let endpoint = Channel::from_shared(format!("http://{}", proxy.listen)).unwrap();
        let channel = soon("a connection", endpoint.connect()).await.unwrap();
        let talking = soon("an answer", talk(channel.clone())).await;
        let (say, answer) = talking.unwrap();
        Self {
            _channel: channel,
            say,
            answer,
        }
    }

    async fn about(&mut self, text: &'static str) {
        self.say.send(text.into()).await.unwrap();
        let heard = soon(text, self.answer.message()).await.unwrap();
        assert_eq!(heard.as_deref(), Some(text.as_bytes()));
    }
}

#[tokio::test]
async fn a_conversation_goes_on_to_its_end() {
    let mut proxy = proxy().await;
    let mut talking = Conversation::through(&proxy).await;
    talking.about("one").await;
    let start = Instant::now();
    proxy.signal("TERM");
    talking.about("two").await;
    phase(&proxy, "closed").await;
    assert_eq!(proxy.in_flight().await, 1.0);
    for text in ["three", "four"] {
        talking.about(text).await;
    }
    let Conversation {
        say,
        mut answer,
        _channel,
    } = talking;
    drop(say);
    // With the status, which is OK.
    assert_eq!(soon("the end", answer.message()).await.unwrap(), None);
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took >= 480, "{took} ms");
    let access = proxy.access(PATH).await;
    assert_eq!(access["status"], 200);
    // Five bytes before each message are gRPC's.
    assert_eq!(access["bytes"], 4 * 5 + "onetwothreefour".len());
}

#[tokio::test]
async fn a_conversation_without_an_end_is_cut_and_named() {
    let mut proxy = proxy().await;
    let mut talking = Conversation::through(&proxy).await;
    talking.about("one").await;
    let start = Instant::now();
    proxy.signal("TERM");
    phase(&proxy, "closed").await;
    talking.about("two").await;
    let lost = soon("the cut", talking.answer.message()).await;
    assert!(lost.is_err(), "it looks whole");
    let took = start.elapsed().as_millis();
    assert!((1950..5000).contains(&took), "cut after {took} ms");
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(124));
    assert!((1950..6000).contains(&took), "{took} ms");
    let line = cut(&proxy, "request").await;
    assert!(line["age_ms"].as_u64().unwrap() >= 1900, "{line}");
    assert_eq!(line["bytes"], 2 * 5 + "onetwo".len(), "{line}");
}
