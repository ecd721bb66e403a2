//! The way to another cluster's node: straight, or through both synchronizers where that alone is open.

use super::super::Shared;
use channel::gateway::Gateway;
use channel::identity::SpiffeId;
use channel::passage::Passage;
use std::sync::Arc;
use synchronizer::passage::Opener;

/// A way that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// What is dialled.
    pub address: String,
    /// Why it goes through the synchronizers, for people. None: it goes straight.
    pub through: Option<String>,
}

/// Finds the way to the gateway of a node of another cluster. The straight one is taken where it works.
///
/// # Errors
/// Why there is none, for people.
pub async fn find(
    shared: &Shared,
    gateway: &Gateway,
    straight: &str,
    id: &SpiffeId,
) -> Result<Way, String> {
    let failed = match gateway.reach(straight, id).await {
        Ok(_) => return Ok(Way { address: straight.to_owned(), through: None }),
        Err(error) => launcher::chain(&error),
    };
    let passage = passage(shared, id).await.map_err(|why| format!("{failed}; {why}"))?;
    let address = passage.address().to_string();
    if let Err(error) = gateway.reach(&address, id).await {
        let why = launcher::chain(&error);
        return Err(format!("{failed}; nor through both clusters' synchronizers: {why}"));
    }
    let node = id.instance();
    let through = format!(
        "node {} does not reach node {node} of cluster {} ({failed}): the way goes through both clusters' \
         synchronizers",
        shared.config.node,
        id.cluster()
    );
    Ok(Way { address, through: Some(through) })
}

/// The way through the synchronizers to one node. It stays open: moves that have begun may come back to it.
async fn passage(shared: &Shared, id: &SpiffeId) -> Result<Arc<Passage>, String> {
    let mut known = shared.moves.passages.lock().await;
    if let Some(passage) = known.get(id) {
        return Ok(Arc::clone(passage));
    }
    let opener = Opener {
        credentials: shared.config.credentials.clone(),
        settings: shared.settings.clone(),
        cluster: id.cluster().into(),
        node: id.instance().into(),
    };
    let passage = Passage::start(shared.config.listen.ip(), opener).await;
    let passage = Arc::new(passage.map_err(|error| format!("no port for a way through: {error}"))?);
    known.insert(id.clone(), Arc::clone(&passage));
    Ok(passage)
}
