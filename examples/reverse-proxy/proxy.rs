//! From a request to its route, and the stack of layers that the route has.

use std::{convert::Infallible, net::SocketAddr, sync::{Arc, Mutex}};

use buttress::rate_limit::{HeaderFormat, Limit, Quota, RateLimitLayer};
use buttress_core::{
    BoxError, Head, ProblemResponder, Refusal, RefusalKind, Responder,
    body::{GuardedBody, ResponseBody},
    key::{ClientIp, ExtractKeyExt, Global, ParseError, PeerAddr, SharedKey, cookie, header},
};
use http::{Request, Response};
use hyper::body::Incoming;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, timeout::TimeoutLayer, util::BoxCloneSyncService};

use crate::{
    access::{Line, Meters},
    balance::Balance,
    forward::{self, Forward},
    headers,
    serve::Busy,
    settings::{self, Key, LimitHeaders, Settings},
    upstream::Endpoint,
};
