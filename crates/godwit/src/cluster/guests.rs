//! The API role's way to guests: their nodes' handlers, over mTLS.

use apiserver::extension::Later;
use apiserver::status::Failure;
use channel::identity::{Credentials, Role, SpiffeId};
use channel::tls;
use handler::cluster::moves;
use handler::cluster::node::HANDLER;
use handler::cluster::serve::{self, Act, Ask, Told};
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use reconcile::why;
use serde_json::Value;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use webapi::{Measured, Sample};

/// A handler that works says so within this time.
const PROMPTLY: Duration = Duration::from_secs(5);

/// Asks handlers.
pub struct Handlers {
    /// For the nodes' addresses.
    pub client: Client,
    /// The API role's, as they are renewed.
    pub credentials: watch::Receiver<Credentials>,
}

impl Handlers {
    /// Where the handler of a node is.
    async fn address(&self, node: &str) -> Result<String, Failure> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let found = nodes.get(node).await.map_err(|error| Failure::internal(why(&error)))?;
        found.annotations().get(HANDLER).cloned().ok_or_else(|| {
            failure(Told {
                code: 503,
                message: format!("node {node} has no handler that could be asked"),
            })
        })
    }

    async fn ask(
        &self,
        node: &str,
        namespace: &str,
        name: &str,
        act: Act,
    ) -> Result<Box<dyn webapi::Stream>, Failure> {
        let address = self.address(node).await?;
        let (tls, handler) = self.way(node)?;
        let ask = Ask { act, namespace: namespace.into(), name: name.into(), plan: None };
        let stream = serve::ask(&tls, &address, &handler, &ask).await.map_err(failure)?;
        Ok(Box::new(stream))
    }

    /// What a move of a guest on the node `source` would take.
    ///
    /// # Errors
    /// Why that is not known.
    pub async fn forecast(
        &self,
        source: &str,
        (namespace, name): (&str, &str),
        plan: moves::Plan,
    ) -> Result<Value, Failure> {
        let address = self.address(source).await?;
        let (tls, handler) = self.way(source)?;
        let (namespace, name) = (namespace.into(), name.into());
        let ask = Ask { act: Act::Forecast, namespace, name, plan: Some(plan) };
        let told = serve::forecast(&tls, &address, &handler, &ask).await.map_err(failure)?;
        serde_json::to_value(told).map_err(|error| Failure::internal(error.to_string()))
    }

    /// Who asks, and whom.
    fn way(&self, node: &str) -> Result<(tls::Client, SpiffeId), Failure> {
        let Credentials { identity, trust, .. } = self.credentials.borrow().clone();
        let handler = SpiffeId::new(identity.id().cluster(), Role::Handler, node)
            .map_err(|error| Failure::internal(error.to_string()))?;
        Ok((tls::Client::new(identity, trust), handler))
    }

    /// Whether a node's handler answers.
    pub async fn answers(&self, node: &str) -> bool {
        let asked = self.ask(node, "", "", Act::Answer);
        tokio::time::timeout(PROMPTLY, asked).await.is_ok_and(|told| told.is_ok())
    }

    /// What the guests of all nodes have used whose handlers answer.
    async fn measure(&self) -> Result<Measured, Failure> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let nodes = nodes.list(&ListParams::default()).await;
        let nodes = nodes.map_err(|error| Failure::internal(why(&error)))?;
        let mut asked = JoinSet::new();
        for node in nodes {
            let Some(address) = node.annotations().get(HANDLER).cloned() else { continue };
            let (tls, handler) = self.way(&node.name_any())?;
            asked.spawn(async move { serve::measure(&tls, &address, &handler).await });
        }
        let mut measured = Measured::default();
        for told in asked.join_all().await {
            match told {
                Ok(samples) => {
                    measured.handlers += 1;
                    measured.samples.extend(samples.into_iter().map(sample));
                }
                Err(Told { message, .. }) => tracing::warn!("{message}"),
            }
        }
        Ok(measured)
    }
}

fn sample(measured: handler::cluster::measure::Sample) -> Sample {
    let handler::cluster::measure::Sample { name, labels, value } = measured;
    Sample { name, labels, value }
}

/// What a handler told, as the API tells it.
fn failure(told: Told) -> Failure {
    let reason = match told.code {
        404 => "NotFound",
        409 => "Conflict",
        501 => "NotImplemented",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    Failure { code: told.code, reason, message: told.message, details: serde_json::Value::Null }
}

impl webapi::Guests for Handlers {
    fn act<'a>(
        &'a self,
        node: &'a str,
        namespace: &'a str,
        name: &'a str,
        what: webapi::Act,
    ) -> Later<'a, ()> {
        let act = match what {
            webapi::Act::Pause => Act::Pause,
            webapi::Act::Unpause => Act::Unpause,
            webapi::Act::Reset => Act::Reset,
            webapi::Act::SoftReboot => Act::SoftReboot,
        };
        Box::pin(async move {
            let mut stream = self.ask(node, namespace, name, act).await?;
            let _ = stream.shutdown().await;
            Ok(())
        })
    }

    fn console<'a>(
        &'a self,
        node: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Later<'a, Box<dyn webapi::Stream>> {
        Box::pin(self.ask(node, namespace, name, Act::Console))
    }

    fn forecast<'a>(&'a self, plan: webapi::Plan<'a>) -> Later<'a, Value> {
        let webapi::Plan { source, namespace, name, node, all, options } = plan;
        let (node, options) = (node.into(), options.clone());
        let plan = moves::Plan { node, all, options, ..moves::Plan::default() };
        Box::pin(self.forecast(source, (namespace, name), plan))
    }

    fn measure(&self) -> Later<'_, Measured> {
        Box::pin(self.measure())
    }
}
