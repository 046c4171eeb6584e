//! Starting it: flags, environment, file, and what makes no sense.

use std::net::TcpListener;

use crate::support::{Proxy, fetch, file, get, program, run};

const ROUTE: &str = "{ name: a, path: /a, upstream: [\"http://127.0.0.1:1\"] }";

/// A file with one route, in which this replaces a part.
fn route_with(extra: &str) -> String {
    format!(
        "routes:\n- {{ name: z, path: /z, upstream: [\"http://127.0.0.1:1\"] }}\n- {{ name: a, path: /a, upstream: [\"http://127.0.0.1:1\"], {extra} }}\n"
    )
}

#[test]
fn nonsense_ends_it_with_one_line() {
    let routes = format!("routes: [{ROUTE}]\n");
    let with = |extra: &str| format!("{extra}\n{routes}");
    // The file, the key's path, and words that say what is expected.
    let cases = [
        (
            route_with("rate_limit: { limit: 0 }"),
            "routes[1].rate_limit.limit",
            "whole number from 1",
        ),
        (
            route_with("rate_limit: { limit: -1 }"),
            "routes[1].rate_limit.limit",
            "got `-1`",
        ),
        (
            route_with("rate_limit: { limit: 1.5 }"),
            "routes[1].rate_limit.limit",
            "whole number",
        ),
        (
            route_with("rate_limit: { limit: many }"),
            "routes[1].rate_limit.limit",
            "whole number",
        ),
        (
            route_with("rate_limit: { period: 1s }"),
            "routes[1].rate_limit.limit",
            "missing",
        ),
        (
            route_with("rate_limit: { limit: 1, period: -1s }"),
            "routes[1].rate_limit.period",
            "duration above zero",
        ),
        (
            route_with("rate_limit: { limit: 1, period: 0s }"),
            "routes[1].rate_limit.period",
            "duration above zero",
        ),
        (
            route_with("rate_limit: { limit: 1, period: 5 }"),
            "routes[1].rate_limit.period",
            "such as 250ms",
        ),
        (
            route_with("rate_limit: { limit: 1, burst: 0 }"),
            "routes[1].rate_limit.burst",
            "whole number",
        ),
        (
            route_with("rate_limit: { limit: 1, max_keys: 0 }"),
            "routes[1].rate_limit.max_keys",
            "whole number",
        ),
        (
            route_with("rate_limit: { limit: 1, key: user }"),
            "routes[1].rate_limit.key",
            "client_ip, global, header:NAME or cookie:NAME",
        ),
        (
            route_with("rate_limit: { limit: 1, key: 'header:' }"),
            "routes[1].rate_limit.key",
            "header:NAME",
        ),
        (
            route_with("rate_limit: { limit: 1, headers: [draft, x] }"),
            "routes[1].rate_limit.headers[1]",
            "x-ratelimit or draft",
        ),
        (
            route_with("rate_limit: { limit: 1, mode: loose }"),
            "routes[1].rate_limit.mode",
            "strict or leased",
        ),
        (
            route_with("rate_limit: { limit: 1, on_store_error: pray }"),
            "routes[1].rate_limit.on_store_error",
            "local or allow or deny",
        ),
        (
            route_with("rate_limit: { limit: 1, period: 8000h, burst: 4000000000 }"),
            "routes[1].rate_limit",
            "burst",
        ),
        (
            route_with("rate_limit: 5"),
            "routes[1].rate_limit",
            "expected a section of keys",
        ),
        (
            route_with("timeout: 0ms"),
            "routes[1].timeout",
            "duration above zero",
        ),
        (route_with("retries: 3"), "routes[1].retries", "unknown key"),
        (
            route_with("circuit_breaker: "),
            "routes[1].circuit_breaker",
            "expected a section of keys",
        ),
        (
            route_with("circuit_breaker: 5"),
            "routes[1].circuit_breaker",
            "expected a section of keys",
        ),
        (
            route_with("circuit_breaker: { preset: brave }"),
            "routes[1].circuit_breaker.preset",
            "aggressive or moderate or tolerant or critical",
        ),
        (
            route_with("circuit_breaker: { failure_treshold: 3 }"),
            "routes[1].circuit_breaker.failure_treshold",
            "unknown key",
        ),
        (
            route_with("circuit_breaker: { failure_threshold: 0 }"),
            "routes[1].circuit_breaker.failure_threshold",
            "whole number from 1",
        ),
        (
            route_with("circuit_breaker: { failure_threshold: 16777216 }"),
            "routes[1].circuit_breaker.failure_threshold",
            "1 to 16777215",
        ),
        (
            route_with("circuit_breaker: { failure_threshold: }"),
            "routes[1].circuit_breaker.failure_threshold",
            "whole number from 1",
        ),
        (
            route_with("circuit_breaker: { failure_rate: 0 }"),
            "routes[1].circuit_breaker.failure_rate",
            "above 0 and at most 1",
        ),
        (
            route_with("circuit_breaker: { failure_rate: 1.5 }"),
            "routes[1].circuit_breaker.failure_rate",
            "got `1.5`",
        ),
        (
            route_with("circuit_breaker: { failure_rate: 50% }"),
            "routes[1].circuit_breaker.failure_rate",
            "above 0 and at most 1",
        ),
        (
            route_with("circuit_breaker: { window: 100 }"),
            "routes[1].circuit_breaker.window",
            "expected a section of keys",
        ),
        (
            route_with("circuit_breaker: { window: {} }"),
            "routes[1].circuit_breaker.window",
            "either requests or time",
        ),
        (
            route_with("circuit_breaker: { window: { requests: 9, time: 9s } }"),
            "routes[1].circuit_breaker.window",
            "either requests or time",
        ),
        (
            route_with("circuit_breaker: { window: { requests: 5000 } }"),
            "routes[1].circuit_breaker.window.requests",
            "1 to 4096",
        ),
        (
            route_with("circuit_breaker: { window: { requests: 0 } }"),
            "routes[1].circuit_breaker.window.requests",
            "whole number from 1",
        ),
        (
            route_with("circuit_breaker: { window: { time: 5ms } }"),
            "routes[1].circuit_breaker.window.time",
            "100 ms",
        ),
        (
            route_with("circuit_breaker: { window: { calls: 5 } }"),
            "routes[1].circuit_breaker.window.calls",
            "unknown key",
        ),
        (
            route_with("circuit_breaker: { failure_threshold: 5, window: { requests: 10 } }"),
            "routes[1].circuit_breaker.window:",
            "failure_rate or slow_call",
        ),
        (
            route_with("circuit_breaker: { minimum_requests: 10 }"),
            "routes[1].circuit_breaker.minimum_requests",
            "failure_rate or slow_call",
        ),
        (
            route_with("circuit_breaker: { failure_rate: 0.5, minimum_requests: 0 }"),
            "routes[1].circuit_breaker.minimum_requests",
            "whole number from 1",
        ),
        (
            route_with(
                "circuit_breaker: { failure_rate: 0.5, window: { requests: 5 }, minimum_requests: 6 }",
            ),
            "routes[1].circuit_breaker.minimum_requests",
            "fit into the window",
        ),
        (
            route_with("circuit_breaker: { slow_call: { duration: 1s } }"),
            "routes[1].circuit_breaker.slow_call.rate",
            "missing",
        ),
        (
            route_with("circuit_breaker: { slow_call: { duration: 1, rate: 1 } }"),
            "routes[1].circuit_breaker.slow_call.duration",
            "such as 250ms",
        ),
        (
            route_with("circuit_breaker: { slow_call: { duration: 1s, rate: 2 } }"),
            "routes[1].circuit_breaker.slow_call.rate",
            "above 0 and at most 1",
        ),
        (
            route_with("circuit_breaker: { failure_statuses: [500, 200] }"),
            "routes[1].circuit_breaker.failure_statuses[1]",
            "400 to 599",
        ),
        (
            route_with("circuit_breaker: { failure_statuses: 500 }"),
            "routes[1].circuit_breaker.failure_statuses",
            "sequence",
        ),
        (
            route_with("circuit_breaker: { reset_timeout: 0s }"),
            "routes[1].circuit_breaker.reset_timeout",
            "duration above zero",
        ),
        (
            route_with("circuit_breaker: { half_open_requests: 0 }"),
            "routes[1].circuit_breaker.half_open_requests",
            "whole number from 1",
        ),
        (
            route_with("circuit_breaker: { half_open_requests: 256 }"),
            "routes[1].circuit_breaker.half_open_requests",
            "1 to 255",
        ),
        (
            route_with("circuit_breaker: { per: host }"),
            "routes[1].circuit_breaker.per",
            "upstream or route",
        ),
        (
            route_with("circuit_breaker: { shared: 2 }"),
            "routes[1].circuit_breaker.shared",
            "true, false or { quorum: 2 }",
        ),
        (
            route_with("circuit_breaker: { shared: { quorum: 0 } }"),
            "routes[1].circuit_breaker.shared",
            "whole number",
        ),
        (
            route_with("circuit_breaker: { shared: { votes: 2 } }"),
            "routes[1].circuit_breaker.shared",
            "quorum",
        ),
        (
            format!(
                "routes: [{{ name: a, path: /a, upstream: ['http://h:1', 'http://{}:1'], circuit_breaker: {{}} }}]",
                "h".repeat(125)
            ),
            "routes[0].upstream[1]",
            "at most 128 characters",
        ),
        (
            route_with("retry: 3"),
            "routes[1].retry",
            "expected a section of keys",
        ),
        (
            route_with("retry:"),
            "routes[1].retry",
            "expected a section of keys",
        ),
        (
            route_with("retry: { tries: 3 }"),
            "routes[1].retry.tries",
            "unknown key",
        ),
        (
            route_with("retry: { preset: brave }"),
            "routes[1].retry.preset",
            "quick or standard or patient or aggressive",
        ),
        (
            route_with("retry: { max_attempts: 0 }"),
            "routes[1].retry.max_attempts",
            "whole number from 1",
        ),
        (
            route_with("retry: { backoff: jitter }"),
            "routes[1].retry.backoff",
            "exponential-jitter",
        ),
        (
            route_with("retry: { initial_delay: 0s }"),
            "routes[1].retry.initial_delay",
            "duration above zero",
        ),
        (
            route_with("retry: { initial_delay: 11s }"),
            "routes[1].retry.initial_delay",
            "at most max_delay, 10s",
        ),
        (
            route_with("retry: { max_delay: 500ms }"),
            "routes[1].retry.max_delay",
            "at least initial_delay, 1s",
        ),
        (
            route_with("retry: { total_timeout: -1s }"),
            "routes[1].retry.total_timeout",
            "duration above zero",
        ),
        (
            route_with("retry: { attempt_timeout: 2 }"),
            "routes[1].retry.attempt_timeout",
            "such as 250ms",
        ),
        (
            route_with("retry: { budget: 20 }"),
            "routes[1].retry.budget",
            "expected a section of keys",
        ),
        (
            route_with("retry: { budget: { percent: 1001 } }"),
            "routes[1].retry.budget.percent",
            "from 0 to 1000",
        ),
        (
            route_with("retry: { budget: { min_per_second: -1 } }"),
            "routes[1].retry.budget.min_per_second",
            "from 0 to 1000000",
        ),
        (
            route_with("retry: { budget: { percent: 0, min_per_second: 0 } }"),
            "routes[1].retry.budget",
            "above 0",
        ),
        (
            route_with("retry: { methods: [GET, put] }"),
            "routes[1].retry.methods[1]",
            "a method such as GET",
        ),
        (
            route_with("retry: { statuses: [503, 200] }"),
            "routes[1].retry.statuses[1]",
            "from 400 to 599",
        ),
        (
            route_with("retry: { max_body: 64 }"),
            "routes[1].retry.max_body",
            "such as 512B",
        ),
        (
            route_with("verify_webhook: {}"),
            "routes[1].verify_webhook.scheme",
            "missing",
        ),
        (
            route_with("verify_webhook: { scheme: md5, secrets: [correct horse] }"),
            "routes[1].verify_webhook.scheme",
            "sha256 or standard or github or stripe or slack",
        ),
        (
            route_with("verify_webhook: { scheme: github, secrets: [] }"),
            "routes[1].verify_webhook.secrets",
            "at least one",
        ),
        (
            route_with("verify_webhook: { scheme: github, secrets: [correct horse, ''] }"),
            "routes[1].verify_webhook.secrets[1]",
            "nothing",
        ),
        (
            route_with("verify_webhook: { scheme: github, secrets: [short] }"),
            "routes[1].verify_webhook.secrets[0]",
            "at least 8 bytes",
        ),
        (
            route_with("verify_webhook: { scheme: standard, secrets: [whsec_aGVsbG8gd29ybGQ=] }"),
            "routes[1].verify_webhook.secrets[0]",
            "at least 24 bytes",
        ),
        (
            route_with(
                "verify_webhook: { scheme: github, secrets: [correct horse], tolerance: 1ms }",
            ),
            "routes[1].verify_webhook.tolerance",
            "seconds",
        ),
        (
            route_with(
                "verify_webhook: { scheme: github, secrets: [correct horse], on_store_error: ask }",
            ),
            "routes[1].verify_webhook.on_store_error",
            "local or allow or deny",
        ),
        (
            route_with("sign_webhook: { scheme: standard, secret: correct horse }"),
            "routes[1].sign_webhook.secret",
            "not base64",
        ),
        (
            route_with("sign_webhook: { scheme: github, secret: 'env:BUTTRESS_NO_SUCH_SECRET' }"),
            "routes[1].sign_webhook.secret",
            "BUTTRESS_NO_SUCH_SECRET is not set",
        ),
        (
            route_with("host: 'a.example:80'"),
            "routes[1].host",
            "without a port",
        ),
        (
            route_with("strip_prefix: 7x"),
            "routes[1].strip_prefix",
            "boolean",
        ),
        (
            "routes: [{ name: a, path: /a }]".into(),
            "routes[0].upstream",
            "at least one URL",
        ),
        (
            "routes: [{ name: a, path: /a, upstream: [] }]".into(),
            "routes[0].upstream",
            "at least one URL",
        ),
        (
            "routes: [{ name: a, path: /a, upstream: ['https://h:1'] }]".into(),
            "routes[0].upstream[0]",
            "not built in yet",
        ),
        (
            "routes: [{ name: a, path: /a, upstream: ['http://h:1/x'] }]".into(),
            "routes[0].upstream[0]",
            "http://HOST:PORT",
        ),
        (
            "routes: [{ name: a, path: /a, upstream: ['h:1'] }]".into(),
            "routes[0].upstream[0]",
            "h2c://HOST:PORT",
        ),
        (
            "routes: [{ path: /a, upstream: ['http://h:1'] }]".into(),
            "routes[0].name",
            "missing",
        ),
        (
            "routes: [{ name: A, path: /a, upstream: ['http://h:1'] }]".into(),
            "routes[0].name",
            "a-z, 0-9",
        ),
        (
            format!(
                "routes: [{{ name: {}, path: /a, upstream: ['http://h:1'] }}]",
                "a".repeat(65)
            ),
            "routes[0].name",
            "1 to 64",
        ),
        (
            "routes: [{ name: a, path: a, upstream: ['http://h:1'] }]".into(),
            "routes[0].path",
            "such as /orders",
        ),
        (
            "routes: [{ name: a, path: /a/../b, upstream: ['http://h:1'] }]".into(),
            "routes[0].path",
            "dot segments",
        ),
        (
            format!("routes: [{ROUTE}, {ROUTE}]"),
            "routes[1].name",
            "routes[0] is `a`",
        ),
        (
            format!("routes: [{ROUTE}, {{ name: b, path: /a/, upstream: ['http://h:1'] }}]"),
            "routes[1].path",
            "routes[0]",
        ),
        ("routes: []".into(), "routes", "at least one route"),
        (String::new(), "routes", "at least one route"),
        (with("listen: nowhere"), "listen", "such as 127.0.0.1:8080"),
        (with("admin: 127.0.0.1"), "admin", "with its port"),
        (
            with("admin: 0.0.0.0:0"),
            "admin_token",
            "not a loopback address",
        ),
        (
            with("admin_token: env:BUTTRESS_TEST_UNSET"),
            "admin_token",
            "BUTTRESS_TEST_UNSET is not set",
        ),
        (
            with("admin_token: file:/nonexistent"),
            "admin_token",
            "cannot be read",
        ),
        (with("log_format: xml"), "log_format", "text or json"),
        (
            with("trusted_proxies: [10.0.0.0/8, 10.0.0.0/33]"),
            "trusted_proxies[1]",
            "such as 10.0.0.0/8",
        ),
        (
            with("limits: { max_body: 10MB }"),
            "limits.max_body",
            "such as 512B, 64KiB",
        ),
        (
            with("limits: { max_bodies: 10MiB }"),
            "limits.max_bodies",
            "expected one of `max_body`",
        ),
        (
            with("limits: { max_connections: 0 }"),
            "limits.max_connections",
            "whole number from 1",
        ),
        (
            with("redis: { url: x }"),
            "redis.url",
            "must begin with redis://",
        ),
        (with("redis: {}"), "redis.url", "there is no URL"),
        (with("redis: { url: [] }"), "redis.url", "there is no URL"),
        (with("redis: { url: 6379 }"), "redis.url", "a URL"),
        (
            with("redis: { url: 'redis://:hunter2@h:none' }"),
            "redis.url",
            "redis://",
        ),
        (
            with("redis: { url: 'redis://h', key_prefix: 'a b' }"),
            "redis.key_prefix",
            "without space",
        ),
        (
            with("redis: { url: 'redis://h', timeout: 2m }"),
            "redis.timeout",
            "a minute",
        ),
        (
            with("redis: { url: 'redis://h', database: 1 }"),
            "redis.database",
            "unknown key",
        ),
        (with("tls: {}"), "tls.cert", "missing"),
        (with("tls:"), "tls", "expected a section of keys"),
        (
            with("tls: { cert: /none.pem, key: /none.pem }"),
            "tls.",
            "/none.pem cannot be read",
        ),
        (
            with("shutdown: { drain_delay: -1s }"),
            "shutdown.drain_delay",
            "duration such as 0s",
        ),
        (
            with("shutdown: { timeout: 0s }"),
            "shutdown.timeout",
            "duration above zero",
        ),
        (
            with("shutdown: { timeout: 10s }"),
            "shutdown.timeout",
            "must be below the timeout",
        ),
        (
            with("shutdown: { timeout: 25h }"),
            "shutdown.timeout",
            "at most a day",
        ),
        (
            with("shutdown: { delay: 1s }"),
            "shutdown.delay",
            "unknown key",
        ),
        (
            with("limits: { idle_timeout: 25h }"),
            "limits.idle_timeout",
            "at most 24h",
        ),
        (with("lisen: 127.0.0.1:1"), "lisen", "unknown key"),
        // A key with nothing behind it is a mistake, not an absent one.
        (
            route_with("rate_limit: "),
            "routes[1].rate_limit",
            "expected a section of keys",
        ),
        (with("admin_token:"), "admin_token", "got nothing"),
        (with("log_format: ~"), "log_format", "text or json"),
        (route_with("host: "), "routes[1].host", "a host name"),
        (
            route_with("host: '*.a.example'"),
            "routes[1].host",
            "a host name",
        ),
        (
            "routes: [{ name: a, path: /a, upstream: ['http://h:99999'] }]".into(),
            "routes[0].upstream[0]",
            "http://HOST:PORT",
        ),
        (
            with("limits: { max_path: 64KiB }"),
            "limits.max_path",
            "at most 65534B",
        ),
        ("routes: [".into(), "expected YAML", ""),
        ("- 1".into(), "expected", "map"),
    ];
    for (yaml, path, words) in cases {
        let file = file(&yaml);
        let name = file.to_str().unwrap();
        let output = run(&["--config", name], &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{yaml}\n{error}");
        assert_eq!(error.lines().count(), 1, "{yaml}\n{error}");
        assert!(
            error.starts_with(&format!("{name}: {path}")),
            "{yaml}\n{error}"
        );
        assert!(error.contains(words), "{yaml}\n{error}");
        assert!(output.stdout.is_empty(), "{yaml}");
    }
}

#[test]
fn nonsense_outside_the_file_is_named_too() {
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 7] = [
        (&["--listen", "nowhere"], &[], "--listen: expected"),
        (
            &[],
            &[("BUTTRESS_LISTEN", "nowhere")],
            "BUTTRESS_LISTEN: expected",
        ),
        (
            &["--log-format", "xml"],
            &[],
            "--log-format: expected text or json",
        ),
        (&["--redis", "x://h"], &[], "must begin with redis://"),
        (
            &["--redis", "redis://h"],
            &[("REDIS_DB", "first")],
            "REDIS_DB: expected the number of a database",
        ),
        (&["--admin", "0.0.0.0:0"], &[], "admin_token"),
        (
            &["--config", "/nonexistent.yaml"],
            &[],
            "/nonexistent.yaml: cannot be read",
        ),
    ];
    for (flags, variables, words) in cases {
        let output = run(flags, variables);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(run(&["--nonsense"], &[]).status.code(), Some(2));
}

fn check(flags: &[&str], variables: &[(&str, &str)]) -> String {
    let flags: Vec<_> = flags.iter().copied().chain(["--check"]).collect();
    let output = run(&flags, variables);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert!(error.is_empty(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_flag_beats_a_variable_beats_the_file_beats_the_default() {
    let file = file(&format!("listen: 127.0.0.1:1001\nroutes: [{ROUTE}]"));
    let file = file.to_str().unwrap();
    let bare = self::file(&format!("routes: [{ROUTE}]"));
    let variable = [("BUTTRESS_LISTEN", "127.0.0.1:1002")];
    let listen = |yaml: String| {
        let line = yaml
            .lines()
            .find(|line| line.starts_with("listen:"))
            .unwrap();
        line.split('"')
            .nth(1)
            .unwrap()
            .rsplit(':')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        listen(check(
            &["--config", file, "--listen", "127.0.0.1:1003"],
            &variable
        )),
        "1003"
    );
    assert_eq!(listen(check(&["--config", file], &variable)), "1002");
    assert_eq!(
        listen(check(&["--config", file], &[("BUTTRESS_LISTEN", "")])),
        "1001"
    );
    assert_eq!(listen(check(&["--config", file], &[])), "1001");
    assert_eq!(
        listen(check(&["--config", bare.to_str().unwrap()], &[])),
        "8080"
    );
    assert_eq!(listen(check(&[], &[("BUTTRESS_CONFIG", file)])), "1001");
    assert!(
        check(&["--config", file], &[("BUTTRESS_LOG_FORMAT", "text")]).contains("log_format: text")
    );
}

#[test]
fn check_hides_what_webhooks_are_signed_with() {
    let path = file(
        "routes:
- name: hooks
  path: /
  upstream: ['http://localhost:1']
  verify_webhook: { scheme: github, secrets: ['env:HUNTER', 'hunter2 and more'] }
  sign_webhook: { scheme: stripe, secret: 'env:HUNTER' }
",
    );
    let variables = [("HUNTER", "hunter2 from afar")];
    let printed = check(&["--config", path.to_str().unwrap()], &variables);
    assert!(!printed.contains("hunter2"), "{printed}");
    for line in [
        "scheme: github",
        "tolerance: 5m",
        "replay_protection: false",
        "- \"***\"",
        "scheme: stripe",
        "secret: \"***\"",
    ] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

#[test]
fn check_prints_settings_that_read_back_the_same_and_hides_secrets() {
    let secret = file("hunter2-from-a-file\n");
    let full = |token: &str| {
        format!(
            "listen: '[::1]:0'
admin: 0.0.0.0:9091
log_format: json
trusted_proxies: [10.0.0.0/8, '::1']
admin_token: {token}
redis: {{ url: ['redis://me:hunter2@a:7000', 'redis://me:hunter2@b:7001'], key_prefix: 'shop:', timeout: 20ms }}
shutdown: {{ drain_delay: 0s, timeout: 1m, hook_reserve: 1500ms }}
limits: {{ max_body: 1MiB, max_path: 1000B, max_headers: 16KiB, header_timeout: 1500ms, idle_timeout: 2m, max_connections: 7 }}
routes:
- name: orders
  path: /orders/
  host: API.example.com
  strip_prefix: true
  upstream: ['http://127.0.0.1', 'h2c://[::1]:9002']
  timeout: 90s
  rate_limit: {{ limit: 3, period: 1h, key: 'cookie:Session', headers: [], max_keys: 5, mode: leased, on_store_error: deny }}
  circuit_breaker: {{ failure_rate: 0.25, slow_call: {{ duration: 2s, rate: 1 }}, window: {{ time: 10s }}, failure_statuses: [], per: route, shared: {{ quorum: 2 }} }}
  retry: {{ preset: patient, max_attempts: 6, backoff: decorrelated-jitter, max_delay: 20s, attempt_timeout: 3s, budget: {{ percent: 30 }}, methods: [PATCH], statuses: [507], max_body: 1KiB }}
- {{ name: preset, path: /preset, upstream: ['http://localhost:1'], circuit_breaker: {{ preset: critical }}, retry: {{ preset: quick }} }}
- {{ name: '123', path: /, upstream: ['http://localhost:1'] }}
"
        )
    };
    let tokens = [
        "hunter2".to_owned(),
        "env:HUNTER".to_owned(),
        format!("file:{}", secret.display()),
    ];
    for token in tokens {
        let path = file(&full(&token));
        let first = check(
            &["--config", path.to_str().unwrap()],
            &[("HUNTER", "hunter2")],
        );
        assert!(!first.contains("hunter2"), "{first}");
        assert!(first.contains("admin_token: \"***\""), "{first}");
        for line in [
            "burst: 3",
            "period: 1h",
            "timeout: 90s",
            "drain_delay: 0s",
            "timeout: 1m",
            "hook_reserve: 1500ms",
            "header_timeout: 1500ms",
            "path: /orders",
            "host: api.example.com",
            "- \"http://127.0.0.1:80\"",
            "key: \"cookie:Session\"",
            "- \"::1/128\"",
            // A rate alone replaces the rule of the preset; the rest of it
            // stays.
            "preset: moderate",
            "failure_rate: 0.25",
            "time: 10s",
            "minimum_requests: 20",
            "duration: 2s",
            "rate: 1",
            "failure_statuses: []",
            "reset_timeout: 30s",
            "half_open_requests: 1",
            "per: route",
            "- \"redis://***@a:7000\"",
            "key_prefix: \"shop:\"",
            "timeout: 20ms",
            "mode: leased",
            "on_store_error: deny",
            "quorum: 2",
            "shared: false",
            "preset: critical",
            "failure_threshold: 2",
            "reset_timeout: 1m",
            "- 504",
            "per: upstream",
            "preset: patient",
            "max_attempts: 6",
            "backoff: decorrelated-jitter",
            "initial_delay: 2s",
            "max_delay: 20s",
            "total_timeout: 2m",
            "attempt_timeout: 3s",
            "percent: 30",
            "min_per_second: 3",
            "- PATCH",
            "- 507",
            "max_body: 1KiB",
            "preset: quick",
            "max_attempts: 2",
            "backoff: exponential-jitter",
            "initial_delay: 100ms",
            "max_delay: 10s",
            "total_timeout: 5s",
            "percent: 20",
            "- TRACE",
            "- 425",
            "max_body: 64KiB",
        ] {
            assert!(
                first.lines().any(|have| have.trim() == line),
                "{line}\n{first}"
            );
        }
        assert_eq!(first.matches("failure_threshold").count(), 1, "{first}");
        assert_eq!(first.matches("window").count(), 1, "{first}");
        let again = file(&first);
        assert_eq!(check(&["--config", again.to_str().unwrap()], &[]), first);
    }
}

#[test]
fn an_address_in_use_is_named_and_the_code_is_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flags in [
        ["--listen", &address, "--admin", "127.0.0.1:0"],
        ["--listen", "127.0.0.1:0", "--admin", &address],
    ] {
        let output = run(&flags, &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(&address), "{error}");
    }
}

#[tokio::test]
async fn the_demo_prints_five_lines_that_do_what_they_say() {
    let proxy = Proxy::start_with(&["--admin", "127.0.0.1:0"]).await;
    let lines = || -> Vec<String> {
        let printed = proxy.printed();
        printed
            .lines()
            .filter(|line| line.starts_with("curl "))
            .map(str::to_owned)
            .collect()
    };
    crate::support::eventually("the greeting", || std::future::ready(lines().len() == 5)).await;
    let lines = lines();
    let target = |line: &str| {
        let url = &line[line.find("http://").unwrap()..];
        let url = url
            .split(['\'', ' '])
            .next()
            .unwrap()
            .strip_prefix("http://")
            .unwrap()
            .to_owned();
        let (address, path) = url.split_once('/').unwrap();
        (address.parse().unwrap(), format!("/{path}"))
    };

    let (address, path) = target(&lines[0]);
    assert_eq!(address, proxy.listen);
    let first = fetch(address, get(&path)).await;
    assert_eq!(first.status(), 200);
    assert_eq!(first.headers()["x-ratelimit-limit"], "20");
    assert_eq!(first.headers()["x-ratelimit-remaining"], "19");

    let (address, path) = target(&lines[1]);
    let (path, range) = path.split_once("?[1-").unwrap();
    let count: u32 = range.trim_end_matches(']').parse().unwrap();
    let mut refused = 0;
    for _ in 0..count {
        let response = fetch(address, get(path)).await;
        if response.status() == 429 {
            refused += 1;
            assert_eq!(response.headers()["retry-after"], "1");
        }
    }
    assert!(refused > 0);

    let breakers = |line: &str| {
        let (address, path) = target(line);
        async move { crate::support::json(&fetch(address, get(&path)).await)[0].clone() }
    };

    // With a key of its own, so that the limit does not matter.
    let with_key = |line: &str, key: &'static str| {
        let (address, path) = target(line);
        let (path, range) = path.split_once("?[1-").unwrap();
        let count: usize = range.trim_end_matches(']').parse().unwrap();
        let path = path.to_owned();
        async move {
            let mut answers = Vec::new();
            for _ in 0..count {
                let mut request = get(&path);
                let key = http::HeaderValue::from_static(key);
                request.headers_mut().insert("x-api-key", key);
                answers.push(fetch(address, request).await);
            }
            answers
        }
    };
    let flaky = with_key(&lines[2], "another").await;
    assert_eq!(flaky.len(), 10);
    let good = flaky.iter().filter(|it| it.status() == 200).count();
    // One in sixteen fails: eight of ten do only if the breaker opens by it,
    // once in a few thousand times, and early on.
    assert!(good >= 3, "{good}");
    let breaker = format!(
        "/breakers/{}/reset",
        breakers(&lines[4]).await["name"].as_str().unwrap()
    );
    let reset = http::Request::post(breaker).header("host", "a");
    let reset = reset.body(http_body_util::Full::default()).unwrap();
    assert_eq!(fetch(proxy.admin, reset).await.status(), 204);

    let answers = with_key(&lines[3], "third").await;
    assert_eq!(answers.len(), 5);
    for answer in &answers[..3] {
        assert_eq!(answer.status(), 500);
    }
    for answer in &answers[3..] {
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.headers()["retry-after"], "10");
    }
    // Each of those that got there was sent four times.
    let line = proxy.access("/status/500").await;
    assert_eq!(line["attempts"], 4);

    assert_eq!(target(&lines[4]).0, proxy.admin);
    assert_eq!(breakers(&lines[4]).await["state"], "open");
}

#[test]
fn help_names_flags_and_variables() {
    let help = program().arg("--help").output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    let help = String::from_utf8(help.stdout).unwrap();
    for word in [
        "--config",
        "BUTTRESS_CONFIG",
        "--listen",
        "--admin",
        "--log-format",
        "--check",
    ] {
        assert!(help.contains(word), "{help}");
    }
}
