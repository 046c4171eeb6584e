//! From a request to its route, and the stack of layers that each route has.

use std::{collections::HashMap, sync::Arc};

use buttress::{
    Head, ProblemResponder, Refusal, RefusalKind, Responder, ServiceBuilderExt,
    body::{BodyEnd, BodyGuard, GuardedBody, ResponseBody},
    circuit_breaker::{Breaker, Sharing},
    drain::{DrainBody, DrainLayer, Label, Shutdown},
    key::{ClientIp, ExtractKeyExt, Global, SharedKey, cookie, header},
    rate_limit::{
        HeaderFormat, Limit, RateLimitBuilder, RateLimitLayer,
        redis::{FleetHandle, Mode, OnStoreError},
    },
    redis::Redis,
    retry::{Memory, RetryLayer},
    tower_errors::RefuseErrorsLayer,
    webhook::{MessageIdLayer, VerifyBody},
};
use http::{HeaderValue, Request, Response, Version, header::CONNECTION};
use http_body_util::Either as EitherBody;
use hyper::body::Incoming;
use tower::{
    ServiceBuilder, ServiceExt, service_fn,
    util::{BoxCloneSyncService, Either, MapRequestLayer, MapResponse},
};

use crate::{
    access::{Facts, Line, Meters},
    balance::Balance,
    body::SILENCE,
    forward::{self, Failed, Forward, Rules},
    grpc_timeout::GrpcTimeout,
    headers,
    settings::{
        self, CircuitBreaker, Count, Key, LimitHeaders, Limits, Per, Retry, Settings, Shared,
    },
    upstream::{CONNECT, Endpoint},
    webhook::{self, Upload},
};

/// A route's answer, which a shutdown waits for: the upstream's, or a refusal of
/// the retry, of what is inside it, of the verifying where there is one, or of
/// the limiter.
type RouteBody = DrainBody<ResponseBody<EitherBody<VerifyBody<InnerBody>, InnerBody>>>;

/// What is inside of the verifying.
type InnerBody = ResponseBody<ResponseBody<forward::Body>>;

/// What a client gets: that, or that there is no route, and the line of the log
/// that ends with it.
pub(crate) type Body = GuardedBody<ResponseBody<RouteBody>, Last>;

/// Everything behind the proxy's port.
pub(crate) struct Proxy {
    /// In the order in which they are tried.
    routes: Vec<Route>,
    /// Those of all routes, in the order of the file.
    pub(crate) breakers: Vec<Breaker>,
    /// The limits that are kept in Redis.
    limiters: Vec<FleetHandle>,
    limits: Arc<Limits>,
    /// For the requests that have no route.
    unrouted: (Arc<str>, Arc<Meters>),
}

struct Route {
    host: Option<String>,
    prefix: String,
    balance: Balance,
    name: Arc<str>,
    meters: Arc<Meters>,
    service: BoxCloneSyncService<Request<Incoming>, Response<RouteBody>, std::convert::Infallible>,
}

/// What all routes have in common.
struct Common {
    shutdown: Shutdown,
    scheme: &'static str,
    limits: Arc<Limits>,
    client_ip: ClientIp,
    grpc_timeout: GrpcTimeout,
    memory: Memory,
    /// Where there is one, what routes keep is kept there.
    redis: Option<Redis>,
}

impl Proxy {
    /// Makes the routes and their state. The settings have been checked.
    pub(crate) fn new(settings: &Settings, shutdown: &Shutdown) -> Self {
        let redis = settings.redis.as_ref().map(settings::Redis::handle);
        let limits = Arc::new(settings.limits.clone());
        let networks = settings.trusted_proxies.iter().map(|net| net.0.to_string());
        let client_ip = ClientIp::new()
            .trust(networks)
            .expect("checked in the settings");
        let common = Common {
            shutdown: shutdown.clone(),
            scheme: settings.tls.as_ref().map_or("http", |_| "https"),
            limits: Arc::clone(&limits),
            client_ip,
            grpc_timeout: GrpcTimeout::new(),
            memory: Memory::default(),
            redis: redis.clone(),
        };
        let mut breakers = Breakers {
            made: Vec::new(),
            redis,
            fleets: HashMap::new(),
        };
        let mut limiters = Vec::new();
        let routes = settings.routes.iter();
        let mut routes: Vec<_> = routes
            .map(|route| Route::new(route, &common, &mut breakers, &mut limiters))
            .collect();
        // A host's own routes go first, and then the longest prefix.
        routes.sort_by_key(|route| {
            let depth = route.prefix.matches('/').count();
            std::cmp::Reverse((route.host.is_some(), depth))
        });
        Self {
            routes,
            breakers: breakers.made,
            limiters,
            limits,
            unrouted: (Arc::from(""), Meters::new("")),
        }
    }

    fn find(&self, host: Option<&str>, path: &str) -> Option<&Route> {
        let path = headers::plain_path(path);
        // The dot at the end of a full name says nothing more.
        let host = host.map(|host| host.strip_suffix('.').unwrap_or(host));
        self.routes.iter().find(|route| {
            let here = match (&route.host, host) {
                (None, _) => true,
                (Some(own), Some(host)) => host.eq_ignore_ascii_case(own),
                (Some(_), None) => false,
            };
            // On whole segments: `/orders` has nothing to do with `/orders2`.
            here && path
                .strip_prefix(&*route.prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Answers a request. It has its line of the log before the future is
    /// polled: hyper may see a client go, and never poll it.
    pub(crate) fn answer(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Body>> + Send + use<> {
        let (mut head, body) = request.into_parts();
        let id = headers::request_id(&mut head.headers);
        let route = headers::unambiguous(&head)
            .and_then(|()| headers::authority(&head))
            .and_then(|authority| {
                let host = authority.as_ref().map(http::uri::Authority::host);
                match self.find(host, head.uri.path()) {
                    Some(route) => Ok(route),
                    None => Err(forward::too_long(&head.uri, &self.limits)
                        .err()
                        .unwrap_or(Refusal::new(RefusalKind::NoRoute))),
                }
            });
        let labels = match &route {
            Ok(route) => (Arc::clone(&route.name), Arc::clone(&route.meters)),
            Err(_) => self.unrouted.clone(),
        };
        let mut line = Line::new(&head, id.clone(), labels);
        let service = route.map(|route| route.service.clone());

        async move {
            let facts = Arc::clone(&line.facts);
            let mut response = match service {
                Ok(service) => {
                    head.extensions.insert(Arc::clone(&facts));
                    let request = Request::from_parts(head, body);
                    match service.oneshot(request).await {
                        Ok(response) => response.map(ResponseBody::inner),
                        Err(never) => match never {},
                    }
                }
                Err(refusal) => {
                    let mut response = ProblemResponder.respond(&refusal, Head::from(&head));
                    if refusal.kind() != RefusalKind::NoRoute && head.version != Version::HTTP_2 {
                        // Where a request is not understood, nobody can be sure
                        // where the next one begins.
                        response
                            .headers_mut()
                            .insert(CONNECTION, HeaderValue::from_static("close"));
                    }
                    response.map(ResponseBody::refusal)
                }
            };

            response
                .headers_mut()
                .entry(headers::X_REQUEST_ID)
                .or_insert(id);
            line.status = response.status().as_u16();
            if let Some(tunnel) = facts.take_tunnel() {
                // What the server calls it, if it has to cut it off.
                let route = Label::from(Arc::clone(&line.route));
                response.extensions_mut().insert(route);
                // The 101 has to leave before either side is there.
                tokio::spawn(tunnel.run(line));
                return response.map(|body| GuardedBody::new(body, Last(None)));
            }
            response.map(|body| GuardedBody::new(body, Last(Some(line))))
        }
    }

    /// Gives back what was taken of limits ahead and is not used up: for others
    /// to use, who go on.
    pub(crate) async fn give_back(&self) {
        for limiter in &self.limiters {
            limiter.give_back().await;
        }
    }

    /// Writes what is in flight into the gauges: read when someone looks, so
    /// that a request need not.
    pub(crate) fn gauge(&self) {
        for route in &self.routes {
            for endpoint in route.balance.endpoints() {
                metrics::gauge!(
                    "proxy_upstream_requests_in_flight",
                    "route" => Arc::clone(&route.name),
                    "upstream" => Arc::clone(&endpoint.url),
                )
                .set(endpoint.in_flight() as f64);
            }
        }
    }
}

/// Lets the line go when the response has ended, unless a tunnel has it.
pub(crate) struct Last(Option<Line>);

impl BodyGuard for Last {
    fn ended(self, end: BodyEnd<'_>, bytes: u64) {
        if let Some(line) = self.0 {
            line.ended(end, bytes);
        }
    }
}

impl Route {
    fn new(
        route: &settings::Route,
        common: &Common,
        breakers: &mut Breakers,
        limiters: &mut Vec<FleetHandle>,
    ) -> Self {
        let name: Arc<str> = route.name.0.as_str().into();
        let balance = balance(route, breakers);
        let strip = if route.strip_prefix {
            &*route.path.0
        } else {
            ""
        };
        let judge = route.circuit_breaker.as_ref().map(CircuitBreaker::judge);
        let forward = Forward::new(Rules {
            balance: balance.clone(),
            limits: Arc::clone(&common.limits),
            client_ip: common.client_ip.clone(),
            scheme: common.scheme,
            grpc_timeout: common.grpc_timeout.clone(),
            strip: strip.to_owned(),
            timeout: route.timeout.0,
            silence: SILENCE,
            judge: judge.unwrap_or_default(),
            retried: route.retry.as_ref().map(|retry| retry.statuses().collect()),
        });

        // Outermost first: what is to be counted and named when the proxy
        // stops; then the limiter, which sees the errors of all others as
        // responses, and so tells every client how it stands. The breakers are
        // in `forward`, which knows the endpoint: each attempt asks one anew.
        let forward = match &route.sign_webhook {
            Some(rule) => Either::Left(
                ServiceBuilder::new()
                    .map_err(Failed::from)
                    .layer(webhook::sign(&route.name, rule, &common.limits))
                    .service(forward),
            ),
            None => Either::Right(forward),
        };
        let attempts = match &route.retry {
            Some(rule) => Either::Left(
                ServiceBuilder::new()
                    .layer(retry(route, rule, &balance, &common.memory))
                    .service(forward),
            ),
            None => Either::Right(MapResponse::new(forward, bare)),
        };
        // One id for all attempts.
        let ids = route.sign_webhook.as_ref();
        let ids = ids.map(|rule| {
            (
                MapRequestLayer::new(webhook::signable(rule)),
                MessageIdLayer::new(),
            )
        });
        let attempts = ServiceBuilder::new().option_layer(ids).service(attempts);
        let adopts = common.grpc_timeout.clone();
        let attempts = service_fn(move |request| {
            let (attempts, adopts) = (attempts.clone(), adopts.clone());
            async move { attempts.oneshot(adopts.adopt(request).await?).await }
        });
        let inside = ServiceBuilder::new()
            .layer(RefuseErrorsLayer::new().catch_all())
            .map_err(Refusal::from)
            .service(attempts);
        let verified = match &route.verify_webhook {
            Some(rule) => Either::Left(
                ServiceBuilder::new()
                    .map_response(|response: Response<_>| response.map(EitherBody::Left))
                    .map_request(Upload::of(Some(SILENCE)))
                    .layer(webhook::verify(
                        &route.name,
                        rule,
                        &common.limits,
                        common.redis.as_ref(),
                    ))
                    .map_request(Upload::whole)
                    .service(inside),
            ),
            None => Either::Right(
                ServiceBuilder::new()
                    .map_response(|response: Response<_>| response.map(EitherBody::Right))
                    .map_request(Upload::of(route.sign_webhook.is_some().then_some(SILENCE)))
                    .service(inside),
            ),
        };
        let limited = match (&route.rate_limit, &common.redis) {
            (Some(rule), Some(redis)) => {
                let limit = rate_limit(&route.name, rule, &common.client_ip);
                let limit = limit
                    .redis(redis)
                    .mode(mode(rule.mode))
                    .on_store_error(on_store_error(rule.on_store_error))
                    .build()
                    .expect("checked in the settings");
                limiters.push(limit.handle());
                let service = ServiceBuilder::new().limit_rate(limit).service(verified);
                Either::Left(Either::Left(service))
            }
            (Some(rule), None) => {
                let limit = rate_limit(&route.name, rule, &common.client_ip);
                let limit = limit.build().expect("checked in the settings");
                let service = ServiceBuilder::new().limit_rate(limit).service(verified);
                Either::Left(Either::Right(service))
            }
            (None, _) => Either::Right(MapResponse::new(verified, bare)),
        };
        let service = ServiceBuilder::new()
            .drain_requests(DrainLayer::new(&common.shutdown).route(Arc::clone(&name)))
            .service(limited);

        Self {
            host: route.host.as_ref().map(|host| host.0.clone()),
            prefix: route.path.0.clone(),
            balance,
            name,
            meters: Meters::new(&route.name.0),
            service: BoxCloneSyncService::new(service),
        }
    }
}

/// As the layer would hand it on that is not there.
fn bare<B>(response: Response<B>) -> Response<ResponseBody<B>> {
    response.map(ResponseBody::inner)
}

/// The circuit breakers of all routes.
struct Breakers {
    made: Vec<Breaker>,
    redis: Option<Redis>,
    /// By the quorum: one task and one connection for all that have the same.
    fleets: HashMap<u32, Sharing>,
}

impl Breakers {
    fn get(&mut self, name: String, rule: &CircuitBreaker) -> Breaker {
        // The same endpoint named twice has one breaker.
        if let Some(breaker) = self.made.iter().find(|it| **it.name() == *name) {
            return breaker.clone();
        }
        let mut builder = Breaker::builder(name).settings(rule.settings());
        if let (Shared::By(Count(quorum)), Some(redis)) = (rule.shared, &self.redis) {
            let fleet = self.fleets.entry(quorum);
            let fleet = fleet.or_insert_with(|| Sharing::new(redis).quorum(quorum));
            builder = builder.redis(fleet.clone());
        }
        let breaker = builder.build().expect("checked in the settings");
        self.made.push(breaker.clone());
        breaker
    }
}

/// A route's endpoints with their circuit breakers, which are added to those
/// that there are.
fn balance(route: &settings::Route, breakers: &mut Breakers) -> Balance {
    let rule = |per| {
        route
            .circuit_breaker
            .as_ref()
            .filter(|rule| rule.per == per)
    };
    // Where there are others, there must be time left for them.
    let attempt = route.attempt();
    let patience = match route.upstream.len() {
        1 => CONNECT,
        _ => CONNECT.min(attempt / 2),
    };
    let around = rule(Per::Route).map(|rule| breakers.get(route.name.0.clone(), rule));
    let endpoints = route.upstream.iter().map(|upstream| {
        let own = rule(Per::Upstream).map(|rule| breakers.get(route.breaker_at(upstream), rule));
        Endpoint::new(upstream, own, patience)
    });
    Balance::new(endpoints, around)
}

fn retry(route: &settings::Route, rule: &Retry, balance: &Balance, memory: &Memory) -> RetryLayer {
    let balance = balance.clone();
    RetryLayer::builder()
        .name(route.name.0.clone())
        .settings(rule.settings(route.timeout.0))
        .budget(rule.budget.build())
        .methods(rule.methods())
        .statuses(rule.statuses())
        .max_body(rule.max_body.in_memory())
        .memory(memory.clone())
        // Where every breaker would refuse the next attempt, the client hears
        // so at once.
        .refuse_if(move |head, _| {
            let open = balance.refusal()?;
            if let Some(facts) = head.extensions.get::<Arc<Facts>>() {
                facts.failed(open.to_string());
            }
            Some(open.into())
        })
        .build()
        .expect("checked in the settings")
}

fn rate_limit(
    name: &settings::Name,
    rule: &settings::RateLimit,
    client_ip: &ClientIp,
) -> RateLimitBuilder {
    let key = match &rule.key {
        Key::ClientIp => SharedKey::new(client_ip.clone()),
        Key::Global => SharedKey::new(Global),
        Key::Header(name) => header(name.clone()).or(client_ip.clone()).shared(),
        Key::Cookie(name) => cookie(name.as_str()).or(client_ip.clone()).shared(),
    };
    let limit = Limit::new(rule.quota())
        .key(key)
        .max_keys(usize::try_from(rule.max_keys.0).unwrap_or(usize::MAX));
    RateLimitLayer::builder()
        .name(name.0.clone())
        .limit(limit)
        .headers(rule.headers.iter().map(|headers| match headers {
            LimitHeaders::XRateLimit => HeaderFormat::XRateLimit,
            LimitHeaders::Draft => HeaderFormat::Draft11,
        }))
}

fn mode(mode: settings::Mode) -> Mode {
    match mode {
        settings::Mode::Strict => Mode::Strict,
        settings::Mode::Leased => Mode::leased(),
    }
}

fn on_store_error(rule: settings::OnStoreError) -> OnStoreError {
    match rule {
        settings::OnStoreError::Local => OnStoreError::Local,
        settings::OnStoreError::Allow => OnStoreError::Allow,
        settings::OnStoreError::Deny => OnStoreError::Deny,
    }
}
