//! For those who keep the server that they have.

#[cfg(feature = "axum")]
pub(crate) mod axum;
#[cfg(feature = "tonic")]
pub(crate) mod tonic;

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{Phase, Shutdown, serve::slots::Slots};

/// When such a server is told to shut down gracefully: once the listener is
/// closed, and after a moment for connections that have sent nothing yet.
async fn graceful(shutdown: Shutdown, slots: Arc<Slots>, grace: Duration) {
    shutdown.reached(Phase::Closed).await;
    if slots.fresh() > 0 {
        sleep(grace).await;
    }
}
