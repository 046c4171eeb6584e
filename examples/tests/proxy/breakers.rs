//! Circuit breakers: what opens them, what they do then, and who steers them.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::support::{
    Proxy, Raw, Upstream, eventually, fetch, get, json, nobody, number, problem, read_head, soon,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Well,
    /// Well, after a fifth of a second.
    Slow,
    Says(u16),
    /// Closes without a word.
    Dies,
    /// Says nothing.
    Hangs,
    /// Promises ten bytes and sends five.
    BreaksOff,
    /// Sends a good head and half of its body, and then nothing.
    Stalls,
    /// Switches protocols, and then echoes.
    Switches,
    /// Begins a stream of events, and says nothing more.
    Streams,
    /// Ends a gRPC call with this status in its trailers.
    Trailers(u8),
}

/// An upstream that does as it is told, and counts for itself who came.
struct Moody {
    address: SocketAddr,
    mood: Arc<Mutex<Mood>>,
    hits: Arc<AtomicUsize>,
}

impl Moody {
    async fn start(mood: Mood) -> Self {
        let mood = Arc::new(Mutex::new(mood));
        let hits = Arc::new(AtomicUsize::new(0));
        let (told, count) = (Arc::clone(&mood), Arc::clone(&hits));
        let upstream = Upstream::raw(move |stream| {
            let (told, count) = (Arc::clone(&told), Arc::clone(&count));
            async move {
                // Whoever has enough of it may leave.
                let _ = serve(stream, &told, &count).await;
            }
        })
        .await;
        Self {
            address: upstream.address,
            mood,
            hits,
        }
    }

    fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn hits(&self) -> usize {
        self.hits.load(SeqCst)
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

async fn serve(
    mut stream: TcpStream,
    mood: &Mutex<Mood>,
    hits: &AtomicUsize,
) -> std::io::Result<()> {
    while read_head(&mut stream).await.is_some() {
        hits.fetch_add(1, SeqCst);
        let mood = *mood.lock().unwrap();
        if mood == Mood::Slow {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let answer = match mood {
            Mood::Well | Mood::Slow => "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes".to_owned(),
            Mood::Says(status) => format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\nno"),
            Mood::Dies => return Ok(()),
            Mood::Hangs => String::new(),
            Mood::BreaksOff | Mood::Stalls => {
                "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello".to_owned()
            }
            Mood::Switches => {
                "HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n".to_owned()
            }
            Mood::Streams => {
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n".to_owned()
            }
            Mood::Trailers(status) => format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\ntrailer: grpc-status\r\n\r\n0\r\ngrpc-status: {status}\r\n\r\n"
            ),
        };
        stream.write_all(answer.as_bytes()).await?;
        match mood {
            Mood::BreaksOff => return Ok(()),
            Mood::Switches => {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await?;
                return Ok(());
            }
            Mood::Hangs | Mood::Stalls | Mood::Streams => {
                // Until the other side has enough of it.
                stream.read_u8().await?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A route `orders` to these upstreams, with this breaker.
async fn proxy(upstreams: &[&Moody], breaker: &str) -> Proxy {
    let urls: Vec<_> = upstreams.iter().map(|upstream| upstream.url()).collect();
    Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: {urls:?}, timeout: 500ms,
  rate_limit: {{ limit: 1000 }}, circuit_breaker: {breaker} }}]"
    ))
    .await
}

async fn breakers(proxy: &Proxy) -> Vec<Value> {
    let response = fetch(proxy.admin, get("/breakers")).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    json(&response).as_array().unwrap().clone()
}

async fn breaker(proxy: &Proxy, name: &str) -> Value {
    let list = breakers(proxy).await;
    let found = list.iter().find(|breaker| breaker["name"] == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {list:?}"))
        .clone()
}

fn at(upstream: &Moody) -> String {
    format!("orders@{}", upstream.address)
}

/// How many requests this breaker has seen the end of.
async fn results(proxy: &Proxy, name: &str) -> [f64; 3] {
    let mut counts = [0.0; 3];
    for (count, result) in counts.iter_mut().zip(["success", "failure", "ignored"]) {
        let labels = [format!("name=\"{name}\""), format!("result=\"{result}\"")];
        let labels = [&*labels[0], &*labels[1]];
        *count = proxy
            .metric("circuit_breaker_requests_total", &labels)
            .await;
    }
    counts
}

async fn steer(proxy: &Proxy, method: Method, path: &str) -> u16 {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "a")
        .body(Full::default())
        .unwrap();
    fetch(proxy.admin, request).await.status().as_u16()
}

/// What comes back, whole or not.
async fn raw(proxy: &Proxy) -> String {
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await;
    raw.rest().await
}

fn refused(response: &Response<Bytes>) -> u64 {
    problem(response, 503, "circuit_open");
    number(response.headers(), "retry-after")
}

#[tokio::test]
async fn it_opens_however_the_upstream_fails_and_closes_once_it_is_well() {
    for (mood, status) in [
        (Mood::Says(500), "500"),
        (Mood::Says(504), "504"),
        (Mood::Dies, "502"),
        (Mood::Hangs, "504"),
        (Mood::BreaksOff, "200"),
        (Mood::Trailers(14), "200"),
    ] {
        let upstream = Moody::start(mood).await;
        let proxy = proxy(
            &[&upstream],
            "{ failure_threshold: 3, reset_timeout: 1500ms }",
        )
        .await;
        let name = at(&upstream);
        assert_eq!(breaker(&proxy, &name).await["state"], "closed");
        for _ in 0..3 {
            let answer = raw(&proxy).await;
            assert_eq!(&answer[9..12], status, "{mood:?}: {answer}");
        }
        assert_eq!(upstream.hits(), 3, "{mood:?}");

        // Open: nothing goes there, whoever waits as told is let in.
        eventually("open", || async {
            breaker(&proxy, &name).await["state"] == "open"
        })
        .await;
        let answer = proxy.get("/").await;
        let wait = refused(&answer);
        assert!((1..=2).contains(&wait), "{wait}");
        assert_eq!(answer.headers()["x-ratelimit-limit"], "1000");
        assert_eq!(upstream.hits(), 3, "{mood:?}");
        let line = proxy
            .logged("a refusal", |line| line["status"] == 503)
            .await;
        assert_eq!(
            (&line["attempts"], &line["upstream"]),
            (&0.into(), &"".into())
        );
        assert!(line["error"].as_str().unwrap().contains(&name), "{line}");

        upstream.is(Mood::Well);
        tokio::time::sleep(Duration::from_secs(wait)).await;
        for _ in 0..3 {
            assert_eq!(proxy.get("/").await.status(), 200, "{mood:?}");
        }
        assert_eq!(upstream.hits(), 6, "{mood:?}");
        let now = breaker(&proxy, &name).await;
        assert_eq!(
            (&now["state"], &now["failures"]),
            (&"closed".into(), &0.into())
        );
        assert_eq!(results(&proxy, &name).await, [3.0, 3.0, 0.0], "{mood:?}");
    }
}

#[tokio::test]
async fn a_connection_that_fails_counts_and_a_dead_upstream_is_not_asked() {
    let dead = nobody().await;
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: ['http://{dead}'], circuit_breaker: {{ preset: critical }} }}]"
    ))
    .await;
    for _ in 0..2 {
        problem(&proxy.get("/").await, 502, "bad_gateway");
    }
    assert!((59..=60).contains(&refused(&proxy.get("/").await)));
    // The gRPC client is told in its own way.
    let call = Request::post("/")
        .header("host", "a")
        .header("content-type", "application/grpc")
        .body(Full::default())
        .unwrap();
    let answer = fetch(proxy.listen, call).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["grpc-status"], "14");
    assert!(number(answer.headers(), "grpc-retry-pushback-ms") > 58_000);
}

#[tokio::test]
async fn what_the_client_does_decides_nothing() {
    let upstream = Moody::start(Mood::Hangs).await;
    let proxy = proxy(
        &[&upstream],
        "{ failure_threshold: 1, slow_call: { duration: 400ms, rate: 0.01 }, minimum_requests: 1 }",
    )
    .await;
    let name = at(&upstream);
    let ignored = async |count: f64| {
        eventually("a verdict", || async {
            results(&proxy, &name).await == [0.0, 0.0, count]
        })
        .await;
        assert_eq!(breaker(&proxy, &name).await["state"], "closed");
    };

    // It goes away before the head.
    let mut client = Raw::connect(proxy.listen).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request", || async { upstream.hits() == 1 }).await;
    drop(client);
    ignored(1.0).await;

    // It goes away amid the body.
    upstream.is(Mood::Stalls);
    let mut client = Raw::connect(proxy.listen).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    client.until("hello").await;
    drop(client);
    ignored(2.0).await;

    // It takes its time with its own body, until time runs out.
    upstream.is(Mood::Hangs);
    let mut client = Raw::connect(proxy.listen).await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello")
        .await;
    let answer = client.rest().await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    ignored(3.0).await;

    // Its body is none.
    let mut client = Raw::connect(proxy.listen).await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n")
        .await;
    let answer = client.rest().await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    ignored(4.0).await;

    // Its request is wrong, or one too many: that is an answer as good as any.
    upstream.is(Mood::Says(404));
    assert_eq!(proxy.get("/").await.status(), 404);
    upstream.is(Mood::Says(429));
    assert_eq!(proxy.get("/").await.status(), 429);
    assert_eq!(results(&proxy, &name).await, [2.0, 0.0, 4.0]);

    // And the upstream's own failure is one, still.
    upstream.is(Mood::Says(503));
    assert_eq!(proxy.get("/").await.status(), 503);
    assert_eq!(breaker(&proxy, &name).await["state"], "open");
}

#[tokio::test]
async fn an_answer_that_breaks_off_because_the_request_did_decides_nothing() {
    let upstream = Moody::start(Mood::Stalls).await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_body: 10B }}
routes: [{{ name: orders, path: /, upstream: ['{}'], circuit_breaker: {{ failure_threshold: 1 }} }}]",
        upstream.url()
    ))
    .await;
    let mut client = Raw::connect(proxy.listen).await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    // The answer has begun before the request is too large.
    client.until("hello").await;
    client.send("14\r\n01234567890123456789\r\n").await;
    client.rest().await;
    let name = at(&upstream);
    eventually("a verdict", || async {
        results(&proxy, &name).await == [0.0, 0.0, 1.0]
    })
    .await;
    assert_eq!(breaker(&proxy, &name).await["state"], "closed");
}

#[tokio::test]
async fn a_success_is_one_at_the_end_of_its_body_or_at_a_head_that_is_final() {
    let upstream = Moody::start(Mood::Stalls).await;
    let proxy = proxy(&[&upstream], "{}").await;
    let name = at(&upstream);

    let mut half = Raw::connect(proxy.listen).await;
    half.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    half.until("hello").await;
    assert_eq!(results(&proxy, &name).await, [0.0; 3]);

    upstream.is(Mood::Switches);
    let mut tunnel = Raw::connect(proxy.listen).await;
    tunnel
        .send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nhi")
        .await;
    tunnel.until("\r\n\r\nhi").await;
    assert_eq!(results(&proxy, &name).await, [1.0, 0.0, 0.0]);

    upstream.is(Mood::Streams);
    let mut events = Raw::connect(proxy.listen).await;
    events.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    events.until("data: 1\n\n").await;
    assert_eq!(results(&proxy, &name).await, [2.0, 0.0, 0.0]);
}

#[tokio::test]
async fn statuses_and_rates_are_the_operators() {
    let upstream = Moody::start(Mood::Says(500)).await;
    // A rate alone: that of failures in a row is off.
    let proxy = proxy(
        &[&upstream],
        "{ failure_rate: 0.5, window: { requests: 10 }, minimum_requests: 10, failure_statuses: [418] }",
    )
    .await;
    let name = at(&upstream);
    let ask = async |status: u16, count: usize| {
        upstream.is(Mood::Says(status));
        for _ in 0..count {
            assert_eq!(proxy.get("/").await.status(), status);
        }
    };
    ask(500, 6).await;
    ask(418, 4).await;
    // Four of ten, and then five: the window slides.
    assert_eq!(breaker(&proxy, &name).await["state"], "closed");
    ask(418, 1).await;
    assert_eq!(breaker(&proxy, &name).await["state"], "open");
    refused(&proxy.get("/").await);
    assert_eq!(upstream.hits(), 11);
}

#[tokio::test]
async fn slow_answers_open_it_as_good_as_they_are() {
    let upstream = Moody::start(Mood::Slow).await;
    let proxy = proxy(
        &[&upstream],
        "{ slow_call: { duration: 100ms, rate: 1 }, window: { time: 60s }, minimum_requests: 3 }",
    )
    .await;
    for _ in 0..3 {
        assert_eq!(proxy.get("/").await.status(), 200);
    }
    refused(&proxy.get("/").await);
    assert_eq!(results(&proxy, &at(&upstream)).await, [3.0, 0.0, 0.0]);
}

#[tokio::test]
async fn an_open_endpoint_is_passed_over_while_another_is_closed() {
    let (sick, well) = (
        Moody::start(Mood::Says(500)).await,
        Moody::start(Mood::Well).await,
    );
    let proxy = proxy(
        &[&sick, &well],
        "{ failure_threshold: 2, reset_timeout: 2s }",
    )
    .await;
    eventually("open", || async {
        proxy.get("/").await;
        breaker(&proxy, &at(&sick)).await["state"] == "open"
    })
    .await;
    assert_eq!(sick.hits(), 2);
    // Many at once, before its time is up.
    let before = well.hits();
    let answers = (0..20).map(|_| proxy.get("/"));
    for answer in soon("answers", futures(answers)).await {
        assert_eq!(answer.status(), 200);
    }
    assert_eq!((sick.hits(), well.hits()), (2, before + 20));

    // Its turn comes by itself, and costs no more than that one request.
    eventually("a probe", || async {
        proxy.get("/").await;
        sick.hits() == 3
    })
    .await;
    assert_eq!(breaker(&proxy, &at(&sick)).await["state"], "open");
    sick.is(Mood::Well);
    eventually("closed", || async {
        assert_eq!(proxy.get("/").await.status(), 200);
        breaker(&proxy, &at(&sick)).await["state"] == "closed"
    })
    .await;

    // All open: the soonest probe is what a client is told.
    for upstream in [&sick, &well] {
        let path = format!("/breakers/{}/open", at(upstream));
        assert_eq!(steer(&proxy, Method::POST, &path).await, 204);
    }
    let answer = proxy.get("/").await;
    problem(&answer, 503, "circuit_open");
    // Forced: nobody can tell.
    assert!(!answer.headers().contains_key("retry-after"));
}

/// All of these, at once.
async fn futures<F: Future>(all: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut all: Vec<_> = all.into_iter().map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|cx| {
        all.retain_mut(|future| match future.as_mut().poll(cx) {
            std::task::Poll::Ready(output) => {
                done.push(output);
                false
            }
            std::task::Poll::Pending => true,
        });
        if all.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_opens_and_costs_nothing() {
    let (dead, well) = (nobody().await, Moody::start(Mood::Well).await);
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: ['http://{dead}', '{}'],
  circuit_breaker: {{ failure_threshold: 1, reset_timeout: 200ms }} }}]",
        well.url()
    ))
    .await;
    let mut open = false;
    for _ in 0..100 {
        assert_eq!(proxy.get("/").await.status(), 200);
        let state = breaker(&proxy, &format!("orders@{dead}")).await;
        open |= state["state"] == "open";
    }
    assert!(open);
    let failures = results(&proxy, &format!("orders@{dead}")).await;
    assert!(failures[1] >= 1.0 && failures[0] == 0.0, "{failures:?}");
    assert_eq!(breaker(&proxy, &at(&well)).await["state"], "closed");
    assert_eq!(well.hits(), 100);
}

/// Its idle connections die with it, and that is seen only by who sends on one.
#[tokio::test]
async fn an_endpoint_that_dies_costs_an_idempotent_request_nothing_while_another_lives() {
    for scheme in ["http", "h2c"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dying = listener.local_addr().unwrap();
        let death = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            drop(listener);
            let head = read_head(&mut stream).await.unwrap();
            stream.read_exact(&mut [0; 5]).await.unwrap();
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let again = read_head(&mut stream).await.unwrap();
            assert_eq!(head.lines().next(), again.lines().next());
        });
        let well = Upstream::mirror().await;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: orders, path: /, upstream: ['http://{dying}', '{scheme}://{}'], circuit_breaker: {{}} }}]",
            well.address
        ))
        .await;
        eventually("the death", || async {
            let request = Request::put("/a?b=c")
                .header("host", "own.example")
                .body(Full::from("hello"))
                .unwrap();
            let answer = fetch(proxy.listen, request).await;
            assert_eq!(answer.status(), 200);
            if answer.body() != "{}" {
                let seen = json(&answer);
                assert_eq!(seen["body"], "hello");
                let (version, uri) = match scheme {
                    "http" => ("HTTP/1.1", "/a?b=c"),
                    _ => ("HTTP/2.0", "http://own.example/a?b=c"),
                };
                assert_eq!(
                    (&seen["version"], &seen["uri"]),
                    (&version.into(), &uri.into())
                );
            }
            death.is_finished()
        })
        .await;
        death.await.unwrap();
        let counts = results(&proxy, &format!("orders@{dying}")).await;
        assert!(counts[0] == 1.0 && counts[1] >= 1.0, "{counts:?}");
        let counts = results(&proxy, &format!("orders@{}", well.address)).await;
        assert_eq!(counts[1..], [0.0, 0.0]);
    }
}

/// What could not be reached a moment ago may be back: who has nowhere else to
/// go tries it.
#[tokio::test]
async fn an_endpoint_at_rest_is_better_than_none() {
    let back = TcpSocket::new_v4().unwrap();
    back.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = back.local_addr().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dying = listener.local_addr().unwrap();
    let answer = async |listener: TcpListener| {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_head(&mut stream).await.unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(answer).await.unwrap();
        }
    };
    let alive = tokio::spawn(answer(listener));
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: ['http://{dying}', 'http://{address}'], circuit_breaker: {{}} }}]"
    ))
    .await;
    eventually("the rest", || async {
        assert_eq!(proxy.get("/").await.status(), 200);
        results(&proxy, &format!("orders@{address}")).await[1] == 1.0
    })
    .await;
    alive.abort();
    assert!(alive.await.unwrap_err().is_cancelled());
    let alive = tokio::spawn(answer(back.listen(16).unwrap()));
    assert_eq!(proxy.get("/").await.status(), 200);
    alive.abort();
}

#[tokio::test]
async fn half_open_lets_as_many_through_as_it_asks_for() {
    for probes in [1, 3] {
        let upstream = Moody::start(Mood::Says(500)).await;
        let proxy = proxy(
            &[&upstream],
            &format!("{{ failure_threshold: 1, reset_timeout: 1s, half_open_requests: {probes} }}"),
        )
        .await;
        assert_eq!(proxy.get("/").await.status(), 500);
        let wait = refused(&proxy.get("/").await);
        upstream.is(Mood::Hangs);
        tokio::time::sleep(Duration::from_secs(wait)).await;
        let answers = soon("answers", futures((0..50).map(|_| proxy.get("/")))).await;
        let count = |status: u16| answers.iter().filter(|it| it.status() == status).count();
        assert_eq!((count(504), count(503)), (probes, 50 - probes));
        for answer in answers.iter().filter(|it| it.status() == 503) {
            assert_eq!(refused(answer), 1);
        }
        assert_eq!(upstream.hits(), 1 + probes);
    }
}

#[tokio::test]
async fn a_probe_that_its_client_gives_up_on_gives_its_place_back() {
    let upstream = Moody::start(Mood::Says(500)).await;
    let proxy = proxy(&[&upstream], "{ failure_threshold: 1, reset_timeout: 1s }").await;
    proxy.get("/").await;
    upstream.is(Mood::Hangs);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut probe = Raw::connect(proxy.listen).await;
    probe.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the probe", || async { upstream.hits() == 2 }).await;
    assert_eq!(breaker(&proxy, &at(&upstream)).await["state"], "half_open");
    upstream.is(Mood::Well);
    drop(probe);
    eventually("another probe", || async {
        proxy.get("/").await.status() == 200
    })
    .await;
    assert_eq!(breaker(&proxy, &at(&upstream)).await["state"], "closed");
}

#[tokio::test]
async fn one_breaker_for_the_route() {
    let (sick, well) = (
        Moody::start(Mood::Says(500)).await,
        Moody::start(Mood::Well).await,
    );
    let proxy = proxy(
        &[&sick, &well],
        "{ failure_rate: 0.4, minimum_requests: 5, per: route }",
    )
    .await;
    let mut names = breakers(&proxy).await;
    assert_eq!(names.len(), 1);
    assert_eq!(names.pop().unwrap()["name"], "orders");
    well.is(Mood::Says(503));
    for _ in 0..5 {
        assert!(proxy.get("/").await.status().is_server_error());
    }
    refused(&proxy.get("/").await);
    assert_eq!(sick.hits() + well.hits(), 5);
    assert_eq!(breaker(&proxy, "orders").await["state"], "open");
    assert_eq!(results(&proxy, "orders").await, [0.0, 5.0, 0.0]);
}

#[tokio::test]
async fn a_route_with_an_endpoint_that_cannot_be_reached_is_well_all_the_same() {
    let (dead, well) = (nobody().await, Moody::start(Mood::Well).await);
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: ['http://{dead}', '{}'],
  circuit_breaker: {{ failure_threshold: 1, per: route }} }}]",
        well.url()
    ))
    .await;
    for _ in 0..20 {
        assert_eq!(proxy.get("/").await.status(), 200);
    }
    assert_eq!(results(&proxy, "orders").await, [20.0, 0.0, 0.0]);
}

#[tokio::test]
async fn an_operator_opens_closes_and_resets() {
    let upstream = Moody::start(Mood::Well).await;
    let proxy = proxy(&[&upstream], "{ failure_threshold: 1 }").await;
    let name = at(&upstream);
    let encoded = name.replace('@', "%40").replace(':', "%3A");
    let state = async || {
        breaker(&proxy, &name).await["state"]
            .as_str()
            .unwrap()
            .to_owned()
    };

    let since = breaker(&proxy, &name).await["since"].as_u64().unwrap();
    assert_eq!(
        steer(&proxy, Method::POST, &format!("/breakers/{name}/open")).await,
        204
    );
    assert_eq!(state().await, "forced_open");
    problem(&proxy.get("/").await, 503, "circuit_open");
    assert_eq!(upstream.hits(), 0);

    assert_eq!(
        steer(&proxy, Method::POST, &format!("/breakers/{encoded}/close")).await,
        204
    );
    assert_eq!(state().await, "forced_closed");
    upstream.is(Mood::Says(500));
    for _ in 0..3 {
        assert_eq!(proxy.get("/").await.status(), 500);
    }
    assert_eq!(state().await, "forced_closed");

    assert_eq!(
        steer(&proxy, Method::POST, &format!("/breakers/{encoded}/reset")).await,
        204
    );
    let now = breaker(&proxy, &name).await;
    assert_eq!(
        (&now["state"], &now["next_probe"]),
        (&"closed".into(), &Value::Null)
    );
    assert_eq!(proxy.get("/").await.status(), 500);
    let now = breaker(&proxy, &name).await;
    assert_eq!(now["state"], "open");
    let (opened, next) = (
        now["since"].as_u64().unwrap(),
        now["next_probe"].as_u64().unwrap(),
    );
    assert!(opened >= since && opened - since < 60, "{now}");
    assert!((30..=31).contains(&(next - opened)), "{now}");
    let keys: Vec<_> = now.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["failures", "name", "next_probe", "since", "state"]);

    for (method, path, status) in [
        (Method::POST, format!("/breakers/{name}/shut"), 404),
        (Method::POST, "/breakers/nobody/open".to_owned(), 404),
        (Method::POST, "/breakers/%zz/open".to_owned(), 404),
        (Method::POST, format!("/breakers/{name}"), 404),
        (Method::GET, "/breakers/nobody/open".to_owned(), 404),
        (Method::GET, format!("/breakers/{name}/open"), 405),
        (Method::DELETE, format!("/breakers/{name}/open"), 405),
        (Method::POST, "/breakers".to_owned(), 405),
    ] {
        assert_eq!(steer(&proxy, method, &path).await, status, "{path}");
    }
    assert_eq!(state().await, "open");

    // A page of another site may send it, and has no say.
    for (origin, status) in [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://a", 204),
    ] {
        let request = Request::post(format!("/breakers/{name}/reset"))
            .header("host", "a")
            .header("origin", origin)
            .body(Full::default())
            .unwrap();
        assert_eq!(
            fetch(proxy.admin, request).await.status(),
            status,
            "{origin}"
        );
    }
    assert_eq!(state().await, "closed");
}

#[tokio::test]
async fn the_token_guards_the_breakers_too() {
    let upstream = Moody::start(Mood::Well).await;
    let proxy = Proxy::start(&format!(
        "admin_token: hunter2\nroutes: [{{ name: orders, path: /, upstream: ['{}'], circuit_breaker: {{}} }}]",
        upstream.url()
    ))
    .await;
    let path = format!("/breakers/{}/open", at(&upstream));
    for (method, path) in [(Method::GET, "/breakers"), (Method::POST, &path)] {
        for (token, allowed) in [("", false), ("Bearer no", false), ("Bearer hunter2", true)] {
            let request = Request::builder()
                .method(&method)
                .uri(path)
                .header("host", "a")
                .header("authorization", token)
                .body(Full::default())
                .unwrap();
            let answer = fetch(proxy.admin, request).await;
            assert_eq!(answer.status().is_success(), allowed, "{method} {token}");
            assert_eq!(answer.status() == 401, !allowed);
        }
    }
}

#[tokio::test]
async fn metrics_tell_the_state_its_changes_the_results_and_the_refusals() {
    let upstream = Moody::start(Mood::Says(500)).await;
    let proxy = proxy(&[&upstream], "{ failure_threshold: 2 }").await;
    let name = format!("name=\"{}\"", at(&upstream));
    let metric = async |metric: &str, label: &str| proxy.metric(metric, &[&name, label]).await;
    assert_eq!(metric("circuit_breaker_state", "").await, 0.0);
    for _ in 0..5 {
        proxy.get("/").await;
    }
    assert_eq!(metric("circuit_breaker_state{", "").await, 2.0);
    assert_eq!(
        metric("circuit_breaker_state_changes_total", "to=\"open\"").await,
        1.0
    );
    assert_eq!(
        metric("circuit_breaker_requests_total", "result=\"failure\"").await,
        2.0
    );
    assert_eq!(
        metric("circuit_breaker_rejections_total", "reason=\"open\"").await,
        3.0
    );
}

#[tokio::test]
async fn without_the_section_there_is_none() {
    let upstream = Moody::start(Mood::Says(500)).await;
    let proxy = Proxy::start(&crate::support::to(upstream.address)).await;
    for _ in 0..20 {
        assert_eq!(proxy.get("/").await.status(), 500);
    }
    assert_eq!(upstream.hits(), 20);
    assert!(breakers(&proxy).await.is_empty());
}
