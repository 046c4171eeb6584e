//! The effective settings as YAML, for `--check`: a file that says the same.

use std::fmt::Display;

use yaml_rust2::{Yaml, YamlEmitter, yaml::Hash};

use super::{
    CircuitBreaker, Count, Rate, RateLimit, Redis, Retry, Route, Settings, Shared, SignWebhook,
    VerifyWebhook, breaker::Window,
};

fn text(value: impl Display) -> Yaml {
    Yaml::String(value.to_string())
}

fn number(value: u32) -> Yaml {
    Yaml::Integer(value.into())
}

fn rate(value: Rate) -> Yaml {
    Yaml::Real(value.to_string())
}

fn list<T: Display>(values: &[T]) -> Yaml {
    Yaml::Array(values.iter().map(text).collect())
}

/// A mapping in the order in which a reader expects it, without what is unset.
fn mapping<const N: usize>(entries: [(&str, Option<Yaml>); N]) -> Yaml {
    let mut hash = Hash::new();
    for (key, value) in entries {
        if let Some(value) = value {
            hash.insert(text(key), value);
        }
    }
    Yaml::Hash(hash)
}

impl Settings {
    /// As YAML, with every secret shown as `***`.
    pub(crate) fn to_yaml(&self) -> String {
        let (limits, shutdown) = (&self.limits, &self.shutdown);
        let networks: Vec<_> = self.trusted_proxies.iter().map(|net| net.0).collect();
        let document = mapping([
            ("listen", Some(text(self.listen.0))),
            ("admin", Some(text(self.admin.0))),
            (
                "tls",
                self.tls.as_ref().map(|tls| {
                    mapping([
                        ("cert", Some(text(&tls.cert))),
                        ("key", Some(text(&tls.key))),
                    ])
                }),
            ),
            ("log_format", self.log_format.map(text)),
            ("trusted_proxies", Some(list(&networks))),
            (
                "admin_token",
                self.admin_token.as_ref().map(|_| text("***")),
            ),
            ("redis", self.redis.as_ref().map(redis)),
            (
                "shutdown",
                Some(mapping([
                    ("drain_delay", Some(text(shutdown.drain_delay))),
                    ("timeout", Some(text(shutdown.timeout))),
                    ("hook_reserve", Some(text(shutdown.hook_reserve))),
                ])),
            ),
            (
                "limits",
                Some(mapping([
                    ("max_body", Some(text(limits.max_body))),
                    ("max_path", Some(text(limits.max_path))),
                    ("max_headers", Some(text(limits.max_headers))),
                    ("header_timeout", Some(text(limits.header_timeout))),
                    ("idle_timeout", Some(text(limits.idle_timeout))),
                    ("max_connections", Some(number(limits.max_connections.0))),
                ])),
            ),
            (
                "routes",
                Some(Yaml::Array(self.routes.iter().map(route).collect())),
            ),
        ]);
        let mut out = String::new();
        YamlEmitter::new(&mut out)
            .dump(&document)
            .expect("a string takes all");
        // Without the mark of a document's start, which nobody writes.
        out.strip_prefix("---\n").unwrap_or(&out).to_owned() + "\n"
    }
}

fn redis(redis: &Redis) -> Yaml {
    let urls = redis.url.as_ref().map(|urls| match &*urls.0 {
        [url] => text(url),
        urls => list(urls),
    });
    mapping([
        ("url", urls),
        ("key_prefix", Some(text(&redis.key_prefix))),
        ("timeout", Some(text(redis.timeout))),
    ])
}

fn route(route: &Route) -> Yaml {
    let path = match route.path.0.as_str() {
        "" => "/",
        path => path,
    };
    mapping([
        ("name", Some(text(&route.name.0))),
        ("path", Some(text(path))),
        ("host", route.host.as_ref().map(|host| text(&host.0))),
        ("strip_prefix", Some(Yaml::Boolean(route.strip_prefix))),
        ("upstream", Some(list(&route.upstream))),
        ("timeout", Some(text(route.timeout))),
        ("rate_limit", route.rate_limit.as_ref().map(rate_limit)),
        (
            "circuit_breaker",
            route.circuit_breaker.as_ref().map(circuit_breaker),
        ),
        ("retry", route.retry.as_ref().map(retry)),
        (
            "verify_webhook",
            route.verify_webhook.as_ref().map(verify_webhook),
        ),
        (
            "sign_webhook",
            route.sign_webhook.as_ref().map(sign_webhook),
        ),
    ])
}

fn rate_limit(rule: &RateLimit) -> Yaml {
    mapping([
        ("limit", Some(number(rule.limit.0))),
        ("period", Some(text(rule.period))),
        ("burst", Some(number(rule.burst.unwrap_or(rule.limit).0))),
        ("key", Some(text(&rule.key))),
        ("headers", Some(list(&rule.headers))),
        ("max_keys", Some(number(rule.max_keys.0))),
        ("mode", Some(text(rule.mode))),
        ("on_store_error", Some(text(rule.on_store_error))),
    ])
}

fn circuit_breaker(rule: &CircuitBreaker) -> Yaml {
    let threshold = rule.effective_threshold();
    let (window, minimum) = rule.effective_window().unzip();
    let window = window.map(|window| {
        mapping([match window {
            Window::Requests(calls) => ("requests", Some(number(calls.0))),
            Window::Time(span) => ("time", Some(text(span))),
        }])
    });
    let slow_call = rule.slow_call.map(|slow| {
        mapping([
            ("duration", Some(text(slow.duration))),
            ("rate", Some(rate(slow.rate))),
        ])
    });
    let shared = match rule.shared {
        Shared::Not => Yaml::Boolean(false),
        Shared::By(Count(1)) => Yaml::Boolean(true),
        Shared::By(Count(quorum)) => mapping([("quorum", Some(number(quorum)))]),
    };
    let statuses = rule.failure_statuses.iter();
    mapping([
        ("preset", Some(text(rule.preset))),
        ("failure_threshold", threshold.map(|count| number(count.0))),
        ("failure_rate", rule.failure_rate.map(rate)),
        ("window", window),
        ("minimum_requests", minimum.map(|count| number(count.0))),
        ("slow_call", slow_call),
        (
            "failure_statuses",
            Some(Yaml::Array(
                statuses.map(|status| number(status.0.into())).collect(),
            )),
        ),
        ("reset_timeout", Some(text(rule.effective_reset_timeout()))),
        (
            "half_open_requests",
            Some(number(rule.half_open_requests.0)),
        ),
        ("per", Some(text(rule.per))),
        ("shared", Some(shared)),
    ])
}

fn retry(rule: &Retry) -> Yaml {
    let statuses = rule.statuses.iter();
    mapping([
        ("preset", Some(text(rule.preset))),
        (
            "max_attempts",
            Some(number(rule.effective_max_attempts().0)),
        ),
        ("backoff", Some(text(rule.backoff))),
        ("initial_delay", Some(text(rule.effective_initial_delay()))),
        ("max_delay", Some(text(rule.max_delay))),
        ("total_timeout", Some(text(rule.effective_total_timeout()))),
        ("attempt_timeout", rule.attempt_timeout.map(text)),
        (
            "budget",
            Some(mapping([
                ("percent", Some(number(rule.budget.percent.0))),
                ("min_per_second", Some(number(rule.budget.min_per_second.0))),
            ])),
        ),
        ("methods", Some(list(&rule.methods))),
        (
            "statuses",
            Some(Yaml::Array(
                statuses.map(|status| number(status.0.into())).collect(),
            )),
        ),
        ("max_body", Some(text(rule.max_body))),
    ])
}

fn verify_webhook(rule: &VerifyWebhook) -> Yaml {
    let protected = rule.effective_replay_protection();
    mapping([
        ("scheme", Some(text(rule.scheme))),
        ("secrets", Some(list(&rule.secrets))),
        ("tolerance", Some(text(rule.tolerance))),
        ("replay_protection", Some(Yaml::Boolean(protected))),
        ("on_store_error", Some(text(rule.on_store_error))),
    ])
}

fn sign_webhook(rule: &SignWebhook) -> Yaml {
    mapping([
        ("scheme", Some(text(rule.scheme))),
        ("secret", Some(text(&rule.secret))),
    ])
}
