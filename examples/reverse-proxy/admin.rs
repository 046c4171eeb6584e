//! The admin port: is it alive and ready, what does it count, how do its
//! circuit breakers stand, and a page for a person.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use buttress::{
    Head, ProblemResponder, Refusal, RefusalKind, Responder,
    circuit_breaker::Breaker,
    clock::{self, Instant, SystemClock, WallClock},
    health::{Details, HealthRegistry, HealthService, Latch, ReadinessGate},
};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN, WWW_AUTHENTICATE},
};
use http_body_util::Full;
use hyper::body::Incoming;
use metrics_exporter_prometheus::PrometheusHandle;
use tower::Service;

use crate::{proxy::Proxy, serve::Busy, settings::Secret};

/// What probes ask. They carry no token, and learn no more than whether they
/// are to send somebody here.
const PROBES: [&str; 3] = ["/health/live", "/health/ready", "/health/startup"];

/// What the admin port shows.
pub(crate) struct Admin {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) health: HealthService,
    pub(crate) metrics: PrometheusHandle,
    pub(crate) token: Option<Secret>,
}

/// What is known of the proxy's health. Its breakers are the score, which is
/// shown and decides nothing; the start and the drain decide.
pub(crate) fn health(
    proxy: &Proxy,
    routes: &Latch,
    drain: impl ReadinessGate + 'static,
) -> (HealthRegistry, HealthService) {
    let mut health = HealthRegistry::builder()
        .name("proxy")
        .latch(routes)
        .gate("drain", drain);
    for breaker in &proxy.breakers {
        health = health.source(breaker.clone());
    }
    let health = health.build().expect("each breaker has a name of its own");
    let service = HealthService::builder(&health).details(Details::Shown);
    let service = service.build().expect("the usual paths are sound");
    (health, service)
}

impl Admin {
    /// Answers a request.
    pub(crate) fn answer(
        &self,
        request: Request<Incoming>,
        _peer: SocketAddr,
        _busy: Busy,
    ) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let is_probe = PROBES.contains(&path);
        if is_probe || (path == "/health" && self.may(&request)) {
            let answer = self.health.clone().call(request).into_inner();
            return answer.unwrap_or_else(|never| match never {});
        }
        let mut response = self.route(&request);
        response
            .headers_mut()
            .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response.map(Full::new)
    }

    fn route(&self, request: &Request<Incoming>) -> Response<Bytes> {
        let path = request.uri().path();
        if !self.may(request) {
            let challenge = HeaderValue::from_static("Bearer realm=\"admin\"");
            let mut response = refuse(request, &RefusalKind::Unauthenticated.into());
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return response;
        }
        if let Some(command) = path.strip_prefix("/breakers/") {
            return self.command(request, command);
        }
        let (content_type, body) = match path {
            "/metrics" => {
                self.proxy.gauge();
                let text = self.metrics.render().into();
                ("text/plain; version=0.0.4; charset=utf-8", text)
            }
            "/breakers" => ("application/json", breakers(&self.proxy.breakers)),
            "/" => (
                "text/html; charset=utf-8",
                Bytes::from_static(PAGE.as_bytes()),
            ),
            _ => return refuse(request, &RefusalKind::NoRoute.into()),
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return not_allowed(request, "GET, HEAD");
        }
        let mut response = Response::new(body);
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        response
    }

    /// Does what an operator wants of a breaker: `{name}/{open,close,reset}`.
    fn command(&self, request: &Request<Incoming>, command: &str) -> Response<Bytes> {
        let (name, verb) = command.rsplit_once('/').unwrap_or_default();
        let name = percent_decoded(name).unwrap_or_default();
        let mut breakers = self.proxy.breakers.iter();
        let breaker = breakers.find(|breaker| **breaker.name() == *name);
        let act = match verb {
            "open" => Breaker::force_open,
            "close" => Breaker::force_closed,
            "reset" => Breaker::reset,
            _ => return refuse(request, &RefusalKind::NoRoute.into()),
        };
        let Some(breaker) = breaker else {
            let refusal = Refusal::new(RefusalKind::NoRoute);
            return refuse(request, &refusal.with_detail("no breaker has this name"));
        };
        if request.method() != Method::POST {
            return not_allowed(request, "POST");
        }
        if is_from_elsewhere(request) {
            let refusal = Refusal::new(RefusalKind::BadRequest)
                .with_status(StatusCode::FORBIDDEN)
                .with_detail("this is not for the pages of other sites");
            return refuse(request, &refusal);
        }
        act(breaker);
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = StatusCode::NO_CONTENT;
        response
    }

    fn may(&self, request: &Request<Incoming>) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = request
            .headers()
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        given.is_some_and(|given| same(given.as_bytes(), token.expose().as_bytes()))
    }
}

fn refuse(request: &Request<Incoming>, refusal: &Refusal) -> Response<Bytes> {
    ProblemResponder.respond(refusal, Head::from(request))
}

fn not_allowed(request: &Request<Incoming>, allowed: &'static str) -> Response<Bytes> {
    let refusal = Refusal::new(RefusalKind::BadRequest)
        .with_status(StatusCode::METHOD_NOT_ALLOWED)
        .with_detail(format!("only {allowed} is understood here"));
    let mut response = refuse(request, &refusal);
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

/// Whether a browser sends it for a page that is not ours: any page that
/// somebody has open may POST to a loopback port, and browsers say whose it is.
fn is_from_elsewhere(request: &Request<Incoming>) -> bool {
    let header = |name| request.headers().get(name).map(HeaderValue::as_bytes);
    header(ORIGIN).is_some_and(|origin| {
        let (Some(host), Ok(origin)) = (header(HOST), str::from_utf8(origin)) else {
            return true;
        };
        let origin = origin.split_once("://").map_or(origin, |(_, host)| host);
        !origin.as_bytes().eq_ignore_ascii_case(host)
    })
}

/// All breakers as JSON: times in Unix seconds, as in `X-RateLimit-Reset`, the
/// next probe's rounded up.
fn breakers(breakers: &[Breaker]) -> Bytes {
    let (now, wall) = (clock::now(), SystemClock.unix_now());
    let unix = |at: Instant| (wall + (at - now)).saturating_sub(now - at);
    let list = breakers.iter().map(|breaker| {
        let status = breaker.status();
        let next_probe = status.next_probe.map(unix);
        serde_json::json!({
            "name": &**breaker.name(),
            "state": status.state.as_str(),
            "failures": status.failures,
            "since": unix(status.since).as_secs(),
            "next_probe": next_probe.map(|at| (at + Duration::from_nanos(999_999_999)).as_secs()),
        })
    });
    serde_json::Value::from_iter(list).to_string().into()
}

/// Undoes percent-encoding; `None` for what is none.
fn percent_decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut decoded = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (hex, rest) = part.split_at_checked(2)?;
        if !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        decoded.push(u8::from_str_radix(hex, 16).ok()?);
        decoded.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(decoded).ok()
}

/// Whether two secrets are the same, in a time that does not tell how far
/// they agree.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

/// Reads `/breakers` and `/metrics` every second and shows them as tables. The
/// page needs no data of its own.
const PAGE: &str = include_str!("admin.html");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_decoded_as_browsers_encode_them() {
        for text in [
            "a@127.0.0.1:9001",
            "a%40127.0.0.1%3A9001",
            "%61@127.0.0.1%3a9001",
        ] {
            assert_eq!(percent_decoded(text).as_deref(), Some("a@127.0.0.1:9001"));
        }
        for text in ["%", "%4", "%4g", "%+4", "%é", "%ff"] {
            assert_eq!(percent_decoded(text), None, "{text}");
        }
    }
}
