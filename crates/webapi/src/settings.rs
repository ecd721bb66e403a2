//! The cluster's settings, as they were a moment ago.

use crate::failure;
use api::kubevirt::{KubeVirt, Spec};
use apiserver::status::Failure;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// What was read so long ago is read anew.
const FRESH: Duration = Duration::from_secs(1);

pub struct Settings {
    client: Client,
    read: Mutex<Option<(Instant, Arc<Spec>)>>,
}

impl Settings {
    pub fn new(client: Client) -> Self {
        Self { client, read: Mutex::default() }
    }

    /// The settings; the defaults where there are none.
    pub async fn get(&self) -> Result<Arc<Spec>, Failure> {
        let mut read = self.read.lock().await;
        if let Some((_, spec)) = read.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Ok(spec.clone());
        }
        let spec = Arc::new(self.look().await?);
        *read = Some((Instant::now(), spec.clone()));
        Ok(spec)
    }

    async fn look(&self) -> Result<Spec, Failure> {
        let all: Api<KubeVirt> = Api::all(self.client.clone());
        match all.list(&ListParams::default()).await {
            // The one that controllers go by, too.
            Ok(found) => Ok(found
                .items
                .into_iter()
                .min_by_key(|one| (one.namespace(), one.name_any()))
                .map(|one| one.spec)
                .unwrap_or_default()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Spec::default()),
            Err(error) => Err(failure(error)),
        }
    }
}
