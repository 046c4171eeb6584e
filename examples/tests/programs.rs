//! The small examples do what they say, run as a reader would run them.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// The example's program, which cargo builds beside the tests.
fn program(name: &str) -> Command {
    let test = env::current_exe().expect("a test is a file");
    let folder = test.parent().and_then(|deps| deps.parent());
    let path: PathBuf = folder.expect("target/…/deps").join("examples").join(name);
    assert!(
        path.exists(),
        "the example is not built; run the tests by `cargo test -p buttress-examples`"
    );
    Command::new(path)
}

fn output(name: &str) -> String {
    let output = program(name).output().expect("the program starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_client_tries_again_and_leaves_alone_what_is_broken() {
    let output = output("client");
    // A failure, a hang, and the whole body a third time.
    for line in [
        "attempt 1: status 503",
        "attempt 2: refused: timed_out",
        "PUT /flaky: 200 OK, 28 bytes",
    ] {
        assert_eq!(output.matches(line).count(), 1, "{output}");
    }
    // The POST went once; with the two of the GET it is three in a row.
    assert_eq!(output.matches("again in").count(), 4, "{output}");
    assert_eq!(output.matches("status 502").count(), 2, "{output}");
    assert_eq!(output.matches("breaker is open").count(), 2, "{output}");
}

#[test]
fn the_grpc_client_heeds_the_pushback() {
    let output = output("tonic");
    assert_eq!(output.matches(": Serving").count(), 3, "{output}");
    assert_eq!(output.matches("ResourceExhausted").count(), 1, "{output}");
    for line in [
        "the watch: NotServing",
        "the watch: Unavailable",
        "exit code 0",
    ] {
        assert_eq!(output.matches(line).count(), 1, "{output}");
    }
}

#[test]
fn webhooks_arrive_once_and_unchanged() {
    let output = output("webhooks");
    for line in [
        "order.paid: attempt 1, 204 No Content: Delivered",
        "order.shipped: attempt 1, 500 Internal Server Error: Retrying",
        "order.shipped: attempt 2, 204 No Content: Delivered",
        "the same request again: 200 OK",
        "401 Unauthorized, \"signature_mismatch\"",
        "169.254.169.254: the url may not be called: the address is not a public one",
        "stopped, 0 left",
    ] {
        assert_eq!(output.matches(line).count(), 1, "{line}: {output}");
    }
    // Neither the replayed nor the tampered one has come so far.
    assert_eq!(output.matches("receiver").count(), 5, "{output}");
}

#[test]
fn the_server_refuses_the_sixth_and_does_not_try_what_is_broken() {
    assert_eq!(statuses("/"), ["200", "200", "200", "200", "200", "429"]);
    let broken = ["500", "500", "500", "503", "503", "429"];
    assert_eq!(statuses("/broken"), broken);
}

/// What six requests for this path get from a server of their own.
fn statuses(path: &str) -> Vec<String> {
    let mut server = program("axum")
        .arg("127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // Kept to the end: what it has yet to print must have somewhere to go.
    let mut lines = BufReader::new(server.stdout.take().expect("piped")).lines();
    let address = lines
        .by_ref()
        .map_while(Result::ok)
        .find_map(|line| Some(line.rsplit_once("http://")?.1.to_owned()))
        .expect("it says where it listens");
    let address = address.trim_end_matches("; done");
    let statuses = (0..6)
        .map(|_| {
            let mut stream = TcpStream::connect(address).expect("it listens");
            let request =
                format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).expect("sent");
            let mut response = String::new();
            stream.read_to_string(&mut response).expect("answered");
            response[9..12].to_owned()
        })
        .collect();
    server.kill().expect("it still runs");
    server.wait().expect("it has ended");
    statuses
}

/// Stopped while it is at work: the answer is whole, the hook has run, and the
/// end is a good one.
#[cfg(unix)]
#[test]
fn the_server_that_is_stopped_answers_first_and_runs_its_hook() {
    use rustix::process::{Pid, Signal, kill_process};

    let mut server = program("drain")
        .args(["127.0.0.1:0", "127.0.0.1:0", "300"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(server.stdout.take().expect("piped")).lines();
    let mut address = |path: &str| {
        let mut lines = lines.by_ref().map_while(Result::ok);
        let found = lines.find_map(|line| {
            let (_, url) = line.split_once("http://")?;
            Some(url.strip_suffix(path)?.to_owned())
        });
        found.expect("it says where it listens")
    };
    let (served, probes) = (address("/slow"), address("/health/ready"));
    let ask = |address: &str, path: &str| {
        let mut stream = TcpStream::connect(address).expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("sent");
        stream
    };
    let read = |mut stream: TcpStream| {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        answer
    };
    let ready = read(ask(&probes, "/health/ready"));
    assert!(ready.starts_with("HTTP/1.1 200 "), "{ready}");
    let slow = ask(&served, "/slow");
    // It takes three seconds.
    thread::park_timeout(Duration::from_millis(300));

    let process = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
    kill_process(process.expect("a process"), Signal::TERM).expect("it runs");
    thread::park_timeout(Duration::from_millis(150));
    let ready = read(ask(&probes, "/health/ready"));
    assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
    let answer = read(slow);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    // 30 s, less the 5 that are the hook's and the 3 that it took.
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
    let left = body.strip_prefix("at last, with ");
    let left = left.and_then(|rest| rest.strip_suffix(" s to spare\n"));
    let left: u64 = left.expect(body).parse().expect(body);
    assert!((15..=22).contains(&left), "{body}");

    let end: Vec<_> = lines.map_while(Result::ok).collect();
    let at = |what: &str| end.iter().position(|line| line.contains(what));
    let (hook, report) = (at("written what was not yet written"), at("shut down in "));
    assert!(hook.is_some() && hook < report, "{end:?}");
    assert!(at("(SIGTERM), exit code 0").is_some(), "{end:?}");
    assert_eq!(server.wait().expect("it ends").code(), Some(0));
}
