//! The handlers' way to other clusters: their own synchronizer.

use crate::wire::{self, Ask, Told};
use channel::identity::Credentials;
use handover::ledger::Response;
use tokio::sync::watch;

/// Asks the owner record `ask` is about, in another cluster, through the synchronizer at `address`.
///
/// # Errors
/// Why there is no answer, for people. Then nobody knows what became of it.
pub async fn ask(
    credentials: &watch::Receiver<Credentials>,
    address: Option<&str>,
    cluster: &str,
    ask: Ask,
) -> Result<Response, String> {
    let address = address.ok_or(
        "this cluster has no synchronizer: is gate DecentralizedLiveMigration of the settings open?",
    )?;
    let credentials = credentials.borrow().clone();
    let own = credentials.identity.id().cluster().to_owned();
    let forward = Ask::Forward { cluster: cluster.into(), question: Box::new(ask) };
    match wire::ask(&credentials, address, Some(&own), &forward).await?.1 {
        Told::Owner { response } => Ok(response),
        Told::Refused { why } | Told::Unknown { why } => Err(why),
        _ => Err("the synchronizer answers what was not asked".into()),
    }
}
