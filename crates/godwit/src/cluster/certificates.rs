//! The certificates of a cluster's parts, kept fresh: acts on `controllers::certificates`.
//!
//! ```text
//! CA/N/ca.{crt,key}   the CAs, each in a folder of its number
//! kubevirt-ca         a ConfigMap: the certificates of those that are believed, for everybody
//! a watch per part    its credentials, as they are renewed
//! ```

use crate::trust::{self, Others, Sources};
use anyhow::{Context, Result, anyhow};
use api::kubevirt::{self, KubeVirt};
use channel::identity::{Ca, Credentials, SpiffeId, Validity};
use controllers::certificates::{Authority, Held, Leaf, Plan, Step, Terms, plan};
use kube::runtime::watcher;
use kube::{Api, Client};
use reconcile::kept::Keeper;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// What could not be done is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);
/// Nothing is looked at more often, or less often.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3600));

/// The CAs, and all that they vouch for.
pub struct Certificates {
    folder: PathBuf,
    cluster: String,
    authorities: Vec<(Ca, Authority)>,
    parts: Vec<Part>,
    terms: Terms,
    /// Other clusters' CAs.
    others: Others,
    /// The bundle that everybody can have.
    published: String,
}

struct Part {
    id: SpiffeId,
    leaf: Leaf,
    credentials: watch::Sender<Credentials>,
}

fn held(validity: Validity) -> Held {
    Held { made: validity.made, until: validity.until }
}

impl Certificates {
    /// Reads the CAs of a folder; makes one if there is none that is believed.
    ///
    /// # Errors
    /// When they cannot be read or made.
    pub fn open(folder: &Path, cluster: &str, terms: Terms) -> Result<Self> {
        let mut certificates = Self {
            folder: folder.into(),
            cluster: cluster.into(),
            authorities: Vec::new(),
            parts: Vec::new(),
            terms,
            others: Others::none(cluster),
            published: String::new(),
        };
        for number in numbers(folder)? {
            let ca = Ca::load(&folder.join(number.to_string()))?;
            // N.B. whoever starts now has it from the first moment.
            let published = Some(ca.validity().made);
            let authority = Authority { number, held: held(ca.validity()), published };
            certificates.authorities.push((ca, authority));
        }
        certificates.settle()?;
        Ok(certificates)
    }

    /// Adds a part that needs credentials; they come, and come anew, by the watch.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn add(&mut self, id: SpiffeId) -> Result<watch::Receiver<Credentials>> {
        let plan = self.settle()?.0;
        let (leaf, credentials) = self.issue(&id, &plan)?;
        let (sender, receiver) = watch::channel(credentials);
        self.parts.push(Part { id, leaf, credentials: sender });
        Ok(receiver)
    }

    /// Keeps all of them fresh. Never ends by itself.
    pub async fn run(mut self, client: Client) {
        let mut keeper = Keeper::default();
        let settings =
            keeper.keep(Api::<KubeVirt>::all(client.clone()), watcher::Config::default());
        let sources = Sources::open(&mut keeper, &client);
        reconcile::ready!(settings);
        sources.ready().await;
        self.others.recall(&client, &sources).await;
        loop {
            let found = kubevirt::foremost(settings.state());
            let strategy = found.map(|one| one.spec.certificate_rotate_strategy.clone());
            self.terms = Terms::of(&strategy.unwrap_or_default());
            let text = sources.external();
            self.others.believe(&sources);
            let again = match self.take(&client, &text).await {
                Ok(again) => again.duration_since(SystemTime::now()).unwrap_or_default(),
                Err(error) => {
                    tracing::warn!("certificates are not renewed: {error:#}");
                    AGAIN
                }
            };
            tokio::select! {
                () = tokio::time::sleep(again.clamp(PAUSES.0, PAUSES.1)) => {}
                () = keeper.bell.notified() => {}
            }
        }
    }

    /// Does all that is to be done, and then takes what people have put among other clusters' CAs.
    async fn take(&mut self, client: &Client, text: &str) -> Result<SystemTime> {
        let again = self.look(client).await?;
        trust::take(client, text).await?;
        Ok(again)
    }

    /// Does all that is to be done now; returns when there is more.
    async fn look(&mut self, client: &Client) -> Result<SystemTime> {
        loop {
            let (plan, acted) = self.settle()?;
            let bundle = self.bundle();
            if bundle != self.published {
                self.others.publish(client, &bundle).await?;
                self.published = bundle;
                let now = SystemTime::now();
                for (_, authority) in &mut self.authorities {
                    authority.published.get_or_insert(now);
                }
            } else if !acted {
                return Ok(plan.again);
            }
        }
    }

    /// Makes what is to be made, and hands it to the parts. Returns whether there was anything.
    fn settle(&mut self) -> Result<(Plan, bool)> {
        loop {
            let now = SystemTime::now();
            let authorities: Vec<Authority> = self.authorities.iter().map(|(_, a)| *a).collect();
            let leaves: Vec<Option<Leaf>> = self.parts.iter().map(|part| Some(part.leaf)).collect();
            match plan(&authorities, &leaves, &self.terms, now) {
                Step::Make(life) => self.make(life)?,
                Step::Go(plan) => {
                    let acted = self.follow(&plan)?;
                    return Ok((plan, acted));
                }
            }
        }
    }

    fn make(&mut self, life: Duration) -> Result<()> {
        let number = self.authorities.last().map_or(1, |(_, last)| last.number + 1);
        let ca = Ca::create_for(&self.cluster, life)?;
        let (draft, place) = (self.folder.join("new"), self.folder.join(number.to_string()));
        ca.save(&draft)?;
        std::fs::rename(&draft, &place)
            .with_context(|| format!("cannot keep the CA {}", place.display()))?;
        tracing::info!(number, "there is a new CA, for {life:?}");
        let authority = Authority { number, held: held(ca.validity()), published: None };
        self.authorities.push((ca, authority));
        Ok(())
    }

    fn follow(&mut self, plan: &Plan) -> Result<bool> {
        let (kept, over): (Vec<_>, Vec<_>) = std::mem::take(&mut self.authorities)
            .into_iter()
            .partition(|(_, authority)| plan.trusted.contains(&authority.number));
        self.authorities = kept;
        for (_, authority) in over {
            // One that is left is forgotten at the next start.
            let _ = std::fs::remove_dir_all(self.folder.join(authority.number.to_string()));
        }
        let bundle = self.bundle();
        for place in 0..self.parts.len() {
            let identity = self.parts[place].credentials.borrow().identity.clone();
            let (leaf, credentials) = match plan.renew.contains(&place) {
                true => self.issue(&self.parts[place].id, plan)?,
                false => (self.parts[place].leaf, Credentials::new(identity, &bundle)?),
            };
            let part = &mut self.parts[place];
            part.leaf = leaf;
            part.credentials.send_if_modified(|known| known.replace(credentials));
        }
        Ok(!plan.renew.is_empty())
    }

    fn issue(&self, id: &SpiffeId, plan: &Plan) -> Result<(Leaf, Credentials)> {
        let (ca, _) = self
            .authorities
            .iter()
            .find(|(_, authority)| authority.number == plan.signer)
            .ok_or_else(|| anyhow!("CA {} is not there", plan.signer))?;
        let life = plan.until.duration_since(SystemTime::now()).unwrap_or_default();
        let identity = ca.issue(id, life)?;
        let leaf = Leaf { issuer: plan.signer, held: held(identity.validity()?) };
        Ok((leaf, Credentials::new(identity, &self.bundle())?))
    }

    /// The certificates of all that are believed.
    fn bundle(&self) -> String {
        let own = self.authorities.iter().map(|(ca, _)| ca.certificate_pem());
        own.collect::<String>() + &self.others.pem()
    }
}

/// The numbers of a folder's CAs, in order.
fn numbers(folder: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", folder.display()));
        }
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u64> = names.filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
