//! The endpoints.

use std::{
    convert::Infallible,
    fmt,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::{
    Head, Refusal, RefusalKind, Responder, clock,
    respond::{SharedResponder, integer},
};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body_util::Full;
use tower_service::Service;

use crate::{
    CheckState, ConfigError, HealthRegistry, Latch, Standing, error::Problem, json::Object,
};

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// Is the process alive? `/health/live`: 200 as long as it answers, drain
    /// included.
    Live,
    /// Are new requests welcome? `/health/ready`: 200 or 503.
    Ready,
    /// Has it started? `/health/startup`: 503 until it has, then 200 for good.
    Startup,
    /// How does all of it stand? `/health`: the status of ready.
    Summary,
}

impl Endpoint {
    /// With the prefix, and as a router leaves it that nests by one.
    const fn usual(self) -> &'static [&'static str] {
        match self {
            Self::Live => &["/health/live", "/live"],
            Self::Ready => &["/health/ready", "/ready"],
            Self::Startup => &["/health/startup", "/startup"],
            Self::Summary => &["/health", "/health/", "/", ""],
        }
    }
}

/// What outsiders are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Details {
    /// Readiness and the score; of a check whose fault it is that the process
    /// is not ready, the name.
    #[default]
    Hidden,
    /// All sources, checks, gates and latches, too: for a port that is not
    /// open to everybody.
    Shown,
    /// And what the errors of checks said, which may hold addresses, names and
    /// whatever else the makers of an error put in.
    WithErrors,
}

/// The endpoints of a [`HealthRegistry`]: a [`Service`] that answers GET and
/// HEAD with JSON, which is never stored. Anything that a request can have for
/// a body is taken, and not read.
///
/// | path | 200 | 503 |
/// | --- | --- | --- |
/// | `/health/live` | `{"live":true}` | `{"live":false,"reason":"stalled","stalled_ms":5210}`, only with a [limit](crate::HealthRegistryBuilder::stall_limit) |
/// | `/health/ready` | `{"ready":true,"score":1.0}` | `{"ready":false,"reason":"check_failed","check":"database","score":1.0}` |
/// | `/health/startup` | `{"started":true}` | `{"started":false,"reason":"starting"}` |
/// | `/health` | `{"ready":true,"score":1.0,"started":true}` | the same, with a reason |
///
/// [`Reason::as_str`](crate::Reason::as_str) has the reasons. Other methods get
/// 405, other paths 404, as `application/problem+json`.
///
/// It is served under these paths, and nested under any prefix that a router
/// takes off:
///
/// ```
/// use axum::Router;
/// use buttress_health::HealthRegistry;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let health = HealthRegistry::builder().build()?;
/// let nested: Router = Router::new().nest_service("/health", health.service());
/// let single: Router = Router::new().route_service("/health/ready", health.service());
/// # let _ = (nested, single);
/// # Ok(())
/// # }
/// ```
///
/// Keep it out of what a drain counts and a rate limit charges, best on a port
/// of its own.
#[derive(Clone)]
pub struct HealthService {
    registry: HealthRegistry,
    shared: Arc<Shared>,
}

struct Shared {
    paths: Vec<(Arc<str>, Endpoint)>,
    details: Details,
    responder: SharedResponder,
}

impl HealthService {
    /// The usual paths, and no details.
    #[must_use]
    pub fn new(registry: &HealthRegistry) -> Self {
        let builder = Self::builder(registry);
        builder.build().expect("the usual paths are sound")
    }

    /// Starts one with paths of your own, or details.
    pub fn builder(registry: &HealthRegistry) -> HealthServiceBuilder {
        HealthServiceBuilder {
            registry: registry.clone(),
            paths: Vec::new(),
            details: Details::Hidden,
            responder: SharedResponder::default(),
        }
    }

    fn answer(&self, request: Head<'_>) -> Response<Full<Bytes>> {
        let path = request.uri.path();
        let mut paths = self.shared.paths.iter();
        let mut response = match paths.find(|(known, _)| **known == *path) {
            None => self.refuse(&RefusalKind::NoRoute.into(), request),
            Some(_) if !matches!(*request.method, Method::GET | Method::HEAD) => {
                let refusal = Refusal::new(RefusalKind::BadRequest)
                    .with_status(StatusCode::METHOD_NOT_ALLOWED)
                    .with_reason("method_not_allowed")
                    .with_detail("only GET and HEAD are understood here");
                let mut response = self.refuse(&refusal, request);
                let headers = response.headers_mut();
                headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
                response
            }
            Some((_, endpoint)) => self.tell(*endpoint),
        };
        let length = response.body().len() as u64;
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // For HEAD, whose body is not there to be measured.
        headers.insert(CONTENT_LENGTH, integer(length));
        if request.method == Method::HEAD {
            response.body_mut().clear();
        }
        response.map(Full::new)
    }

    fn refuse(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes> {
        self.shared.responder.respond(refusal, request)
    }

    fn tell(&self, endpoint: Endpoint) -> Response<Bytes> {
        let mut object = Object::new();
        let fine = match endpoint {
            Endpoint::Live => self.live(&mut object),
            Endpoint::Ready => {
                let standing = self.registry.readiness();
                readiness(&mut object, &standing, self.registry.score());
                standing.is_ready()
            }
            Endpoint::Startup => self.startup(&mut object),
            Endpoint::Summary => self.summary(&mut object),
        };
        let mut response = Response::new(Bytes::from(object.end()));
        if !fine {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    fn live(&self, object: &mut Object) -> bool {
        let stalled = self.registry.0.stalled(clock::now());
        object.put("live", stalled.is_none());
        if let Some(age) = stalled {
            object.put("reason", "stalled");
            object.put("stalled_ms", millis(age));
        }
        stalled.is_none()
    }

    fn startup(&self, object: &mut Object) -> bool {
        let started = self.registry.has_started();
        object.put("started", started);
        if !started {
            object.put("reason", "starting");
        }
        if self.shared.details > Details::Hidden {
            let latches = &self.registry.0.latches;
            let waiting = latches.iter().filter(|latch| !latch.is_released());
            let waiting: Vec<&str> = waiting.map(Latch::name).collect();
            object.put("waiting", waiting);
        }
        started
    }

    fn summary(&self, object: &mut Object) -> bool {
        let report = self.registry.report();
        readiness(object, &report.standing, report.score);
        object.put("started", report.started);
        if self.shared.details == Details::Hidden {
            return report.standing.is_ready();
        }
        let sources = report.sources.iter().map(|source| {
            let mut object = Object::new();
            object.put("name", &*source.name);
            object.put("score", source.score);
            object.put("weight", source.weight);
            object.put("critical", source.critical);
            object
        });
        object.list("sources", sources);
        let checks = report.checks.iter().map(|check| {
            let mut object = Object::new();
            object.put("name", &*check.name);
            object.put("required", check.required);
            object.put("state", check.state.as_str());
            if let CheckState::Failing(failure) = check.state {
                object.put("failure", failure.as_str());
            }
            object.put("age_ms", check.age.map(millis));
            object.put("took_ms", check.took.map(millis));
            if self.shared.details == Details::WithErrors {
                object.put("error", check.error.as_deref());
            }
            object
        });
        object.list("checks", checks);
        let gates = report.gates.iter().map(|gate| {
            let mut object = Object::new();
            object.put("name", &*gate.name);
            object.put("open", gate.closed.is_none());
            if let Some(reason) = gate.closed {
                object.put("reason", reason);
            }
            object
        });
        object.list("gates", gates);
        let latches = report.latches.iter().map(|latch| {
            let mut object = Object::new();
            object.put("name", &*latch.name);
            object.put("released", latch.released);
            object
        });
        object.list("latches", latches);
        report.standing.is_ready()
    }
}

fn readiness(object: &mut Object, standing: &Standing, score: f64) {
    object.put("ready", standing.is_ready());
    if let Some(reason) = standing.reason() {
        object.put("reason", reason.as_str());
        if let Some(check) = reason.check() {
            object.put("check", check);
        }
    }
    object.put("score", score);
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

impl<B> Service<Request<B>> for HealthService {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ready(Ok(self.answer(Head::from(&request))))
    }
}

impl fmt::Debug for HealthService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthService")
            .field("registry", &self.registry.name())
            .field("paths", &self.shared.paths)
            .field("details", &self.shared.details)
            .finish_non_exhaustive()
    }
}

/// Builds a [`HealthService`].
#[must_use = "nothing is served before `build()`"]
pub struct HealthServiceBuilder {
    registry: HealthRegistry,
    paths: Vec<(Arc<str>, Endpoint)>,
    details: Details,
    responder: SharedResponder,
}

impl HealthServiceBuilder {
    /// Answers under this path in place of the usual ones, with the prefix or
    /// without, of this endpoint; once more adds another. Compared as it is,
    /// with what of it a router that nests leaves: no prefix, no pattern.
    ///
    /// ```
    /// use buttress_health::{Endpoint, HealthRegistry, HealthService};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let health = HealthRegistry::builder().build()?;
    /// let service = HealthService::builder(&health)
    ///     .path(Endpoint::Live, "/livez")
    ///     .path(Endpoint::Ready, "/readyz")
    ///     .build()?;
    /// # let _ = service;
    /// # Ok(())
    /// # }
    /// ```
    pub fn path(mut self, endpoint: Endpoint, path: impl Into<Arc<str>>) -> Self {
        self.paths.push((path.into(), endpoint));
        self
    }

    /// What outsiders are shown. Default: [`Details::Hidden`].
    pub fn details(mut self, details: Details) -> Self {
        self.details = details;
        self
    }

    /// Makes the answers 404 and 405. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder).
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.responder = SharedResponder::new(responder);
        self
    }

    /// Checks the paths and makes the service.
    ///
    /// # Errors
    ///
    /// If a path is none, or two are the same.
    pub fn build(self) -> Result<HealthService, ConfigError> {
        let mut paths = self.paths;
        for (path, _) in &paths {
            let sound = path
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte));
            if !path.starts_with('/') || !sound {
                return Err(Problem::Path.into());
            }
        }
        for endpoint in [
            Endpoint::Live,
            Endpoint::Ready,
            Endpoint::Startup,
            Endpoint::Summary,
        ] {
            if paths.iter().any(|(_, named)| *named == endpoint) {
                continue;
            }
            // What is named for another is that other's.
            for path in endpoint.usual() {
                if !paths.iter().any(|(named, _)| **named == **path) {
                    paths.push(((*path).into(), endpoint));
                }
            }
        }
        for (index, (path, _)) in paths.iter().enumerate() {
            if paths[..index].iter().any(|(earlier, _)| earlier == path) {
                return Err(Problem::SamePath(Arc::clone(path)).into());
            }
        }
        Ok(HealthService {
            registry: self.registry,
            shared: Arc::new(Shared {
                paths,
                details: self.details,
                responder: self.responder,
            }),
        })
    }
}

impl fmt::Debug for HealthServiceBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthServiceBuilder")
            .field("paths", &self.paths)
            .field("details", &self.details)
            .finish_non_exhaustive()
    }
}
