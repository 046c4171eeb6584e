//! The admin port: is it alive, what does it count, and a page for a person.

use std::{net::SocketAddr, sync::Arc};

use buttress::{Head, ProblemResponder, Refusal, RefusalKind, Responder};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body_util::Full;
use hyper::body::Incoming;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::{proxy::Proxy, serve::Busy, settings::Secret};

/// What the admin port shows.
pub(crate) struct Admin {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) metrics: PrometheusHandle,
    pub(crate) token: Option<Secret>,
}

impl Admin {
    /// Answers a request.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "it is the handler that serve wants"
    )]
    pub(crate) fn answer(
        &self,
        request: Request<Incoming>,
        _peer: SocketAddr,
        _busy: Busy,
    ) -> Response<Full<Bytes>> {
        let mut response = self.route(&request);
        response
            .headers_mut()
            .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response.map(Full::new)
    }

    fn route(&self, request: &Request<Incoming>) -> Response<Bytes> {
        let path = request.uri().path();
        // Probes carry no token, and learn nothing that a connection would not
        // tell them.
        if !path.starts_with("/health/") && !self.may(request) {
            let challenge = HeaderValue::from_static("Bearer realm=\"admin\"");
            let mut response = refuse(request, &RefusalKind::Unauthenticated.into());
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return response;
        }
        let (content_type, body) = match path {
            "/health/live" => ("application/json", Bytes::from_static(b"{\"live\":true}")),
            "/metrics" => {
                self.proxy.gauge();
                let text = self.metrics.render().into();
                ("text/plain; version=0.0.4; charset=utf-8", text)
            }
            "/" => (
                "text/html; charset=utf-8",
                Bytes::from_static(PAGE.as_bytes()),
            ),
            _ => return refuse(request, &RefusalKind::NoRoute.into()),
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let refusal = Refusal::new(RefusalKind::BadRequest)
                .with_status(StatusCode::METHOD_NOT_ALLOWED)
                .with_detail("only GET and HEAD are understood here");
            let mut response = refuse(request, &refusal);
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let mut response = Response::new(body);
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
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

/// Whether two secrets are the same, in a time that does not tell how far
/// they agree.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

/// Reads `/metrics` every second and shows it as a table. The program has
/// nothing else to show, so that the page needs no data of its own.
const PAGE: &str = include_str!("admin.html");
