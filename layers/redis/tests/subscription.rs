//! What is said on a channel, and what is heard of it.

use std::time::Duration;

use buttress_redis::{
    Config, Notice, Redis,
    testing::{Server, Wire},
};
use tokio::time::{sleep, timeout};

const MS: Duration = Duration::from_millis(1);
const SOON: Duration = Duration::from_secs(10);

fn message(text: &str) -> Notice {
    Notice::Message(text.as_bytes().to_vec())
}

async fn say(server: &Server, text: &str) -> i64 {
    server.cmd(&["PUBLISH", "news", text]).await
}

#[tokio::test]
async fn after_each_lost_connection_it_listens_again() {
    let mut server = Server::start().await;
    let redis = server.redis();
    let mut news = redis.subscribe("news");
    assert_eq!(news.next().await, Notice::Listening);
    assert_eq!(say(&server, "one").await, 1);
    assert_eq!(say(&server, "two").await, 1);
    assert_eq!(news.next().await, message("one"));
    assert_eq!(news.next().await, message("two"));
    server.kick().await;
    assert_eq!(timeout(SOON, news.next()).await.unwrap(), Notice::Listening);
    say(&server, "three").await;
    assert_eq!(news.next().await, message("three"));
    server.restart().await;
    assert_eq!(timeout(SOON, news.next()).await.unwrap(), Notice::Listening);
}

#[tokio::test]
async fn a_line_that_has_died_in_silence_is_noticed() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let redis = Redis::from_config(Config::new(wire.url())).unwrap();
    let mut news = redis.subscribe("news");
    assert_eq!(news.next().await, Notice::Listening);
    wire.stall();
    // Two seconds of silence, and half a one for an answer; by one who looks
    // away all the time, as in a `select!`.
    let dead = async {
        loop {
            if let Ok(notice) = timeout(30 * MS, news.next()).await {
                return notice;
            }
        }
    };
    assert!(timeout(3500 * MS, dead).await.is_err());
    // What was said there in the meantime came on no line of ours.
    say(&server, "missed").await;
    wire.flow();
    assert_eq!(timeout(SOON, news.next()).await.unwrap(), Notice::Listening);
    say(&server, "heard").await;
    assert_eq!(timeout(SOON, news.next()).await.unwrap(), message("heard"));
}

#[tokio::test]
async fn a_quiet_line_is_left_alone() {
    let server = Server::start().await;
    let redis = server.redis();
    let mut news = redis.subscribe("news");
    assert_eq!(news.next().await, Notice::Listening);
    assert!(
        timeout(2500 * MS, news.next()).await.is_err(),
        "an answer to PING is no news"
    );
    assert!(server.commands().await["ping"] >= 1, "it was asked");
    say(&server, "late").await;
    assert_eq!(news.next().await, message("late"));
}

#[tokio::test]
async fn who_looks_away_misses_nothing() {
    let server = Server::start().await;
    let redis = server.redis();
    let mut news = redis.subscribe("news");
    assert_eq!(news.next().await, Notice::Listening);
    let all: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    let speak = async {
        for text in &all {
            say(&server, text).await;
            sleep(MS).await;
        }
    };
    let hear = async {
        let mut heard = Vec::new();
        while heard.len() < all.len() {
            if let Ok(notice) = timeout(MS / 2, news.next()).await {
                heard.push(notice);
            }
        }
        heard
    };
    let (heard, ()) = timeout(SOON, async { tokio::join!(hear, speak) })
        .await
        .unwrap();
    let expected: Vec<_> = all.iter().map(|text| message(text)).collect();
    assert_eq!(heard, expected);
    assert_eq!(format!("{:?}", message("secret")), "Message(6)");
}
