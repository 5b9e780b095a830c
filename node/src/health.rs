//! Is this process alive, and may it be sent work?

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use prost::Message as _;
use serde_json::json;
use tokio::sync::watch;

use crate::report::PeerReports;

/// What a node is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not serving yet.
    Starting,
    /// Serving.
    Serving,
    /// Draining; streams end, leaderships move.
    Stopping,
}

/// The state that `/readyz`, gRPC health and `GET /v1/status` report. Clones share it.
#[derive(Clone, Debug)]
pub struct Health {
    phase: watch::Sender<Phase>,
    /// What is not well, by component.
    troubles: Arc<Mutex<BTreeMap<&'static str, String>>>,
}

impl Default for Health {
    fn default() -> Self {
        Self { phase: watch::channel(Phase::Starting).0, troubles: Arc::default() }
    }
}

impl Health {
    /// What the node is doing now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Follows what the node is doing.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Moves on.
    pub fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Notes that `component` is not well, and what to do about it; `None` when it is well again.
    pub fn trouble(&self, component: &'static str, what: Option<String>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match what {
            Some(what) => troubles.insert(component, what),
            None => troubles.remove(component),
        };
    }

    /// What is not well now, by component.
    pub fn troubles(&self) -> BTreeMap<&'static str, String> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `/metrics`, `/healthz`, `/readyz` and `/report`: for operators, on the metrics listener. `reports` is set once the node has
/// started far enough to be asked.
pub fn router(health: Health, metrics: &'static PrometheusHandle, reports: Arc<OnceLock<PeerReports>>) -> Router {
    let (ready, alive) = (health.clone(), health.clone());
    Router::new()
        .route(
            "/metrics",
            get(move || async move {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
            }),
        )
        .route("/healthz", get(move || async move { liveness(&alive) }))
        .route("/readyz", get(move || async move { readiness(&ready) }))
        .route("/report", get(move || report(reports)))
}

/// An `ensign.admin.v1.ClusterReportReply`. Nobody has logged in for it, so names of topics are left out.
async fn report(reports: Arc<OnceLock<PeerReports>>) -> Response {
    let Some(reports) = reports.get() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the node is starting\n").into_response();
    };
    let reply = reports.nameless().await.encode_to_vec();
    ([(header::CONTENT_TYPE, "application/x-protobuf")], reply).into_response()
}

/// A node that is alive says so, whatever ails it: restarting it would not help, and would seal a vault that people unseal.
fn liveness(health: &Health) -> String {
    let troubles = health.troubles();
    let mut text = "ok\n".to_owned();
    for (component, what) in &troubles {
        text.extend([component, ": ", what, "\n"]);
    }
    text
}

fn readiness(health: &Health) -> Response {
    let phase = health.phase();
    let troubles = health.troubles();
    let (code, status) = match phase {
        Phase::Serving if troubles.is_empty() => (StatusCode::OK, "ready"),
        Phase::Serving => (StatusCode::SERVICE_UNAVAILABLE, "degraded"),
        Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        Phase::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    (code, axum::Json(json!({ "status": status, "troubles": troubles }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_follows_phase_and_troubles() {
        let health = Health::default();
        assert_eq!(readiness(&health).status(), StatusCode::SERVICE_UNAVAILABLE);
        health.set(Phase::Serving);
        assert_eq!(readiness(&health).status(), StatusCode::OK);
        health.trouble("vault", Some("sealed: no root key".to_owned()));
        assert_eq!(readiness(&health).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(liveness(&health), "ok\nvault: sealed: no root key\n");
        health.trouble("vault", None);
        assert_eq!(liveness(&health), "ok\n");
        assert_eq!(readiness(&health).status(), StatusCode::OK);
        health.set(Phase::Stopping);
        assert_eq!(readiness(&health).status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
