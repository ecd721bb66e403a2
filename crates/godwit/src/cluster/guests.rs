//! The API role's way to guests: their nodes' handlers, over mTLS.

use apiserver::extension::Later;
use apiserver::status::Failure;
use channel::identity::{Identity, Role, SpiffeId, Trust};
use channel::tls;
use handler::cluster::node::HANDLER;
use handler::cluster::serve::{self, Act, Ask, Told};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, ResourceExt};
use reconcile::why;
use tokio::io::AsyncWriteExt;

/// Asks handlers.
pub struct Handlers {
    /// For the nodes' addresses.
    pub client: Client,
    /// The way.
    pub tls: tls::Client,
    /// The cluster, as certificates name it.
    pub cluster: String,
}

impl Handlers {
    /// With the API role's identity.
    pub fn new(client: Client, identity: Identity, trust: Trust) -> Self {
        let cluster = identity.id().cluster().to_owned();
        Self { client, tls: tls::Client::new(identity, trust), cluster }
    }

    async fn ask(
        &self,
        node: &str,
        namespace: &str,
        name: &str,
        act: Act,
    ) -> Result<Box<dyn webapi::Stream>, Failure> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let found = nodes.get(node).await.map_err(|error| Failure::internal(why(&error)))?;
        let address = found.annotations().get(HANDLER).ok_or_else(|| {
            failure(Told {
                code: 503,
                message: format!("node {node} has no handler that could be asked"),
            })
        })?;
        let handler = SpiffeId::new(&self.cluster, Role::Handler, node)
            .map_err(|error| Failure::internal(error.to_string()))?;
        let ask = Ask { act, namespace: namespace.into(), name: name.into() };
        let stream = serve::ask(&self.tls, address, &handler, &ask).await.map_err(failure)?;
        Ok(Box::new(stream))
    }
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
}
