//! The gRPC health protocol (grpc.health.v1), through `tonic-health`.

use std::{
    fmt,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use buttress_core::{
    clock,
    health::{Health, HealthSource, ReadinessGate},
    sync::Mutex,
};
use futures_util::{
    FutureExt, Stream,
    future::{BoxFuture, Shared},
};
use tokio::task::unconstrained;
use tonic::{Request, Response, Status};
use tonic_health::{
    ServingStatus,
    pb::{
        HealthCheckRequest, HealthCheckResponse, health_check_response,
        health_server::{Health as Protocol, HealthServer},
    },
    server::{HealthReporter, HealthService, WatchStream},
};

use crate::{
    ConfigError, HealthRegistry,
    check::{CheckCell, unless_panicked},
    config::{part, unique},
    error::{self, Problem},
    registry::{Inner, closed},
};

/// The gRPC health service of a registry: add it to a tonic server.
pub type GrpcServer = HealthServer<GrpcHealth>;

/// A gRPC service whose health is told under its own name.
///
/// It serves where the whole is ready, and nothing that is added here speaks
/// against it: with nothing added it goes with the whole.
///
/// ```
/// use buttress_health::{Check, Gate, GrpcService, HealthRegistry, Indicator};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (maintenance, index) = (Gate::open(), Indicator::new("index"));
/// let health = HealthRegistry::builder()
///     .check(Check::optional("search", async || Ok::<_, std::io::Error>(())))
///     .grpc_service(
///         GrpcService::new("shop.v1.Search")
///             .check("search")
///             .gate(maintenance.clone())
///             .source(index.clone(), 0.5),
///     )
///     .build()?;
/// let server = health.grpc_server();
/// # let _ = server;
/// # Ok(())
/// # }
/// ```
#[must_use = "nobody is told of it until the registry is given it"]
pub struct GrpcService {
    name: Arc<str>,
    gates: Vec<Arc<dyn ReadinessGate>>,
    sources: Vec<(Arc<dyn HealthSource>, f64)>,
    checks: Vec<Arc<str>>,
}

impl GrpcService {
    /// The service of this name: `package.Service`, as tonic has it in
    /// `NamedService::NAME`.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            gates: Vec::new(),
            sources: Vec::new(),
            checks: Vec::new(),
        }
    }

    /// It does not serve while this is closed.
    pub fn gate(mut self, gate: impl ReadinessGate + 'static) -> Self {
        self.gates.push(Arc::new(gate));
        self
    }

    /// It does not serve while this is below `least`: above 0.0 and at most
    /// 1.0. Asked at every [look](crate::HealthRegistryBuilder::look_every).
    pub fn source(mut self, source: impl HealthSource + 'static, least: f64) -> Self {
        self.sources.push((Arc::new(source), least));
        self
    }

    /// It does not serve unless this check passes, which is one of the
    /// registry's; one that is optional, as a rule, since a required one counts
    /// for the whole.
    pub fn check(mut self, name: impl Into<Arc<str>>) -> Self {
        self.checks.push(name.into());
        self
    }
}

impl fmt::Debug for GrpcService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcService")
            .field("name", &self.name)
            .field("checks", &self.checks)
            .finish_non_exhaustive()
    }
}

impl HealthRegistry {
    /// The gRPC health service: Check and Watch, for `""`, the whole, and the
    /// services that were [named](crate::HealthRegistryBuilder::grpc_service).
    /// Each call makes one more for the same registry.
    ///
    /// It says UNKNOWN unless the registry is [started](Self::start). Whoever
    /// watches hears of a change when the background does: within 50 ms, unless
    /// [set otherwise](crate::HealthRegistryBuilder::look_every), and at once
    /// after [`look`](Self::look), which belongs where a drain is begun. On a
    /// port that drains, [`grpc_server_until`](Self::grpc_server_until).
    #[must_use]
    pub fn grpc_server(&self) -> GrpcServer {
        self.serve_grpc(None)
    }

    /// The same, whose watches end once `leaving` is ready: for a port that is
    /// about to close. A Watch is a stream that never ends, and so what a drain
    /// would wait for until it cuts it off.
    ///
    /// Whoever watches is told NOT_SERVING, if that was not the last word, and
    /// then gets UNAVAILABLE, by which gRPC clients know to watch elsewhere. So
    /// does a Watch that begins later. Check goes on.
    ///
    /// Of a drain `leaving` is `shutdown.reached(Phase::Closing)`: before that
    /// all is served, and the watches say NOT_SERVING as soon as the drain is
    /// the registry's gate. It is polled by the watches alone, for as long as
    /// there are any.
    ///
    /// ```
    /// use buttress_health::{Gate, HealthRegistry};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (leave, left) = tokio::sync::oneshot::channel::<()>();
    /// let health = HealthRegistry::builder().build()?;
    /// let server = health.grpc_server_until(async {
    ///     let _ = left.await;
    /// });
    /// # let _ = (server, leave);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn grpc_server_until(
        &self,
        leaving: impl Future<Output = ()> + Send + 'static,
    ) -> GrpcServer {
        self.serve_grpc(Some(leaving.boxed().shared()))
    }

    fn serve_grpc(&self, leaving: Option<Leaving>) -> GrpcServer {
        let reporter = self.0.grpc.reporter.clone();
        HealthServer::new(GrpcHealth {
            inner: HealthService::from_health_reporter(reporter),
            leaving,
        })
    }
}

type Leaving = Shared<BoxFuture<'static, ()>>;

/// The methods of the gRPC health service: what a [`GrpcServer`] serves.
pub struct GrpcHealth {
    inner: HealthService,
    leaving: Option<Leaving>,
}

#[tonic::async_trait]
impl Protocol for GrpcHealth {
    type WatchStream = GrpcWatch;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.inner.check(request).await
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<GrpcWatch>, Status> {
        let watch = self.inner.watch(request).await?;
        Ok(watch.map(|inner| GrpcWatch {
            inner,
            told: None,
            end: match &self.leaving {
                Some(leaving) => End::At(leaving.clone()),
                None => End::Never,
            },
        }))
    }
}

impl fmt::Debug for GrpcHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcHealth")
            .field("ends_watches", &self.leaving.is_some())
            .finish_non_exhaustive()
    }
}

/// What a Watch is told, one status after the other.
pub struct GrpcWatch {
    inner: WatchStream,
    /// The last status, as it is sent.
    told: Option<i32>,
    end: End,
}

enum End {
    Never,
    At(Leaving),
    Now,
    Over,
}

impl Stream for GrpcWatch {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        const NOT_SERVING: i32 = health_check_response::ServingStatus::NotServing as i32;
        let this = &mut *self;
        if let End::Over = this.end {
            return Poll::Ready(None);
        }
        if let Poll::Ready(item) = Pin::new(&mut this.inner).poll_next(cx) {
            if let Some(Ok(response)) = &item {
                this.told = Some(response.status);
            }
            return Poll::Ready(item);
        }
        if let End::At(leaving) = &mut this.end
            && leaving.poll_unpin(cx).is_ready()
        {
            this.end = End::Now;
        }
        let End::Now = this.end else {
            return Poll::Pending;
        };
        // The background may be a moment behind, or know of no drain.
        if this.told != Some(NOT_SERVING) {
            this.told = Some(NOT_SERVING);
            let status = NOT_SERVING;
            return Poll::Ready(Some(Ok(HealthCheckResponse { status })));
        }
        this.end = End::Over;
        Poll::Ready(Some(Err(Status::unavailable("shutting down"))))
    }
}

impl fmt::Debug for GrpcWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcWatch").finish_non_exhaustive()
    }
}

/// What is told by gRPC.
pub(crate) struct Grpc {
    reporter: HealthReporter,
    /// The whole first, whose name is empty.
    services: Box<[Told]>,
}

struct Told {
    name: Arc<str>,
    gates: Vec<Arc<dyn ReadinessGate>>,
    sources: Vec<(Arc<dyn HealthSource>, f64)>,
    /// By their places.
    checks: Vec<usize>,
    /// The last that was said. A word that is said again would wake all who
    /// watch.
    said: Mutex<ServingStatus>,
}

impl Grpc {
    pub(crate) fn new(
        services: Vec<GrpcService>,
        cells: &[CheckCell],
    ) -> Result<Self, ConfigError> {
        unique(
            "a gRPC service",
            services.iter().map(|service| &service.name),
        )?;
        let mut told = vec![Told {
            name: "".into(),
            gates: Vec::new(),
            sources: Vec::new(),
            checks: Vec::new(),
            said: Mutex::new(ServingStatus::Unknown),
        }];
        for service in services {
            error::name("a gRPC service", &service.name)?;
            for (_, least) in &service.sources {
                part("the least score of a source of a gRPC service", *least)?;
            }
            let mut checks = Vec::new();
            for name in service.checks {
                let place = cells.iter().position(|cell| **cell.name() == *name);
                checks.push(place.ok_or(Problem::NoCheck(name))?);
            }
            told.push(Told {
                name: service.name,
                gates: service.gates,
                sources: service.sources,
                checks,
                said: Mutex::new(ServingStatus::Unknown),
            });
        }
        let grpc = Self {
            reporter: HealthReporter::new(),
            services: told.into(),
        };
        grpc.unknown();
        Ok(grpc)
    }

    /// Says what has changed.
    pub(crate) async fn tell(&self, inner: &Inner) {
        let now = clock::now();
        let ready = inner.standing(now).is_ready();
        for service in &self.services {
            let serves = ready
                && service.gates.iter().all(|gate| closed(&**gate).is_none())
                && service.sources.iter().all(|(source, least)| {
                    let health = unless_panicked(|| source.health());
                    let score = health.unwrap_or(Health::UNHEALTHY).score();
                    score.is_none_or(|score| score >= *least)
                })
                && service
                    .checks
                    .iter()
                    .all(|place| inner.checks[*place].state(now).is_passing());
            let status = if serves {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            if *service.said.lock() == status {
                continue;
            }
            self.reporter
                .set_service_status(&*service.name, status)
                .await;
            *service.said.lock() = status;
        }
    }

    /// Says that nothing is known when it is dropped.
    pub(crate) const fn until_dropped(&self) -> impl Drop + use<'_> {
        struct Until<'a>(&'a Grpc);
        impl Drop for Until<'_> {
            fn drop(&mut self) {
                self.0.unknown();
            }
        }
        Until(self)
    }

    fn unknown(&self) {
        for service in &self.services {
            let said = self
                .reporter
                .set_service_status(&*service.name, ServingStatus::Unknown);
            // Others hold the lock for as long as a look into a map takes, and never
            // across an await: a few turns at most. There may be no runtime
            // to wait in.
            let mut said = pin!(unconstrained(said));
            let mut context = Context::from_waker(Waker::noop());
            for _ in 0..10_000 {
                if let Poll::Ready(()) = said.as_mut().poll(&mut context) {
                    break;
                }
                std::thread::yield_now();
            }
            *service.said.lock() = ServingStatus::Unknown;
        }
    }
}
