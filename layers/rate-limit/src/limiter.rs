//! From a request to a decision: bypass, keys, costs, quotas, and then the
//! store; and what is counted and told of it.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use buttress_core::{
    Refusal, RefusalKind, View,
    clock::{self, Instant},
    key::{ExtractKey, Key, SharedKey},
};

use crate::{
    Gcra, MissingKey,
    metrics::{self, Metrics},
    store::{self, Ask, Decision, Detail, MAX_LIMITS, Table, Verdict},
};

/// A user's rule over a request.
pub(crate) type Callback<V, T> = Arc<dyn for<'a> Fn(<V as View>::Ref<'a>) -> T + Send + Sync>;

/// What a limit reads off a request.
pub(crate) struct Rule<V: View> {
    pub(crate) key: SharedKey<V>,
    pub(crate) cost: u32,
    pub(crate) cost_by: Option<Callback<V, u32>>,
    pub(crate) quota_by: Option<Callback<V, Gcra>>,
    pub(crate) missing: MissingKey,
}

/// What one request asks of all limits that apply to it.
pub(crate) struct Asks {
    asks: [Option<Ask>; MAX_LIMITS],
    len: usize,
}

/// The state and the rules of a layer.
pub(crate) struct Limiter<V: View> {
    name: Cow<'static, str>,
    rules: Box<[Rule<V>]>,
    tables: Arc<[Table]>,
    bypass: Option<Callback<V, bool>>,
    shadow: bool,
    metrics: Metrics,
}

/// What is to be done with a request.
pub(crate) enum Admission {
    /// No decision was made.
    Bypass,
    /// It passes.
    Pass(Decision),
    /// It passes, although it should not: shadow mode.
    Shadow,
    /// It does not pass.
    Refuse(Refusal, Decision),
}
