//! `godwit cluster`: clusters that believe each other, and no longer.

use crate::cli::{ClusterAct, ClusterCommand, Invite, Join, Pair, Place};
use crate::cluster::kubeconfig_of;
use crate::trust::BUNDLE;
use crate::vms::{Cluster, plain};
use anyhow::{Context, Result, anyhow, bail, ensure};
use api::conditions;
use api::keys;
use api::kubevirt::KubeVirt;
use api::link::ClusterLink;
use channel::identity::linked_of;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};
use synchronizer::join::{self, Token};
use uuid::Uuid;

/// Two clusters that believe each other answer each other within this time.
const ANSWERS: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(250);
/// A token that is read is no longer than this.
const MOST: u64 = 64 << 10;

/// Links two clusters, or ends that.
///
/// # Errors
/// What is wrong, and what can be done.
pub async fn run(command: ClusterCommand) -> Result<ExitCode> {
    match command.act {
        ClusterAct::Link(pair) => link(&pair).await,
        ClusterAct::Unlink(pair) => unlink(&pair).await,
        ClusterAct::Invite(invite) => self::invite(&invite).await,
        ClusterAct::Join(join) => self::join(&join).await,
    }
}

/// A cluster as its administrator sees it.
struct End {
    client: Client,
    /// Its id.
    id: String,
    /// Where its synchronizer is found.
    addresses: Vec<String>,
    /// The certificates of its own CAs.
    bundle: String,
}

impl End {
    async fn open(client: Client, name: &str) -> Result<Self> {
        let settings: Api<KubeVirt> = Api::all(client.clone());
        let settings = settings.list(&ListParams::default()).await.map_err(plain)?.items;
        let settings = settings.into_iter().min_by_key(|one| (one.namespace(), one.name_any()));
        let settings = settings.with_context(|| format!("{name} has no KubeVirt object"))?;
        let addresses = settings.status.unwrap_or_default().synchronization_addresses;
        ensure!(
            !addresses.is_empty(),
            "{name} has no synchronizer: open the feature gate {} in its KubeVirt object, and see the \
             log of its synchronizer",
            api::kubevirt::DECENTRALIZED
        );
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), api::NAMESPACE);
        let map = maps.get(BUNDLE).await.map_err(plain)?;
        let id = map.annotations().get(keys::CLUSTER).cloned().with_context(|| {
            format!("ConfigMap {BUNDLE} of {name} does not say its cluster's id: is it Godwit's?")
        })?;
        let text = map.data.and_then(|mut data| data.remove("ca-bundle")).unwrap_or_default();
        let bundle = linked_of(&text, &id, SystemTime::now()).concat();
        ensure!(!bundle.is_empty(), "ConfigMap {BUNDLE} of {name} has no CA of cluster {id}");
        Ok(Self { client, id, addresses, bundle })
    }

    fn links(&self) -> Api<ClusterLink> {
        Api::all(self.client.clone())
    }

    /// Believes another one from now on.
    async fn believe(&self, other: &Self) -> Result<()> {
        let spec = json!({"addresses": other.addresses, "caBundle": other.bundle});
        let link = json!({
            "apiVersion": "godwit.dev/v1alpha1", "kind": "ClusterLink",
            "metadata": {"name": other.id}, "spec": spec,
        });
        let made = serde_json::from_value(link)?;
        match self.links().create(&PostParams::default(), &made).await {
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
            other => return other.map(|_| ()).map_err(plain),
        }
        let patch = Patch::Merge(json!({"spec": spec}));
        self.links().patch(&other.id, &PatchParams::default(), &patch).await.map_err(plain)?;
        Ok(())
    }

    /// Waits until another one answers.
    async fn until_ready(&self, other: &str) -> Result<()> {
        let began = Instant::now();
        loop {
            let link = self.links().get(other).await.map_err(plain)?;
            let conditions = link.status.unwrap_or_default().conditions;
            if conditions::is(&conditions, "Ready") {
                return Ok(());
            }
            if began.elapsed() > ANSWERS {
                let why = conditions.first().and_then(|condition| condition.message.clone());
                let why = why.unwrap_or_else(|| "its synchronizer has not tried yet".into());
                bail!(
                    "cluster {} does not reach cluster {other} after {ANSWERS:?}: {why}. The link stays, \
                     and is tried on: `kubectl get clusterlinks` tells more",
                    self.id
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// The way to a cluster: an embedded one of this name, or a context of the kubeconfig.
async fn client(pair: &Pair, name: &str) -> Result<Client> {
    let embedded = kubeconfig_of(pair.dir.as_deref(), name);
    let place = match embedded.filter(|_| pair.kubeconfig.is_none()) {
        Some(path) => crate::cli::Place { kubeconfig: Some(path), context: None, namespace: None },
        None => crate::cli::Place {
            kubeconfig: pair.kubeconfig.clone(),
            context: Some(name.to_owned()),
            namespace: None,
        },
    };
    let opened = Cluster::open(&place).await.with_context(|| {
        format!("{name} is neither an embedded cluster nor a context of the kubeconfig")
    })?;
    Ok(opened.client)
}

/// Both ends of a pair.
async fn both(pair: &Pair) -> Result<(End, End)> {
    let one = End::open(client(pair, &pair.one).await?, &pair.one).await?;
    let other = End::open(client(pair, &pair.other).await?, &pair.other).await?;
    Ok((one, other))
}

async fn link(pair: &Pair) -> Result<ExitCode> {
    let (one, other) = both(pair).await?;
    ensure!(
        one.id != other.id,
        "both clusters have the id {}: a cluster is not linked to itself, and ids are told apart by \
         certificates. Give one of them another name when it is made",
        one.id
    );
    one.believe(&other).await?;
    other.believe(&one).await?;
    one.until_ready(&other.id).await?;
    other.until_ready(&one.id).await?;
    println!("clusters {} and {} are linked", one.id, other.id);
    Ok(ExitCode::SUCCESS)
}

async fn unlink(pair: &Pair) -> Result<ExitCode> {
    let (one, other) = both(pair).await?;
    for (here, there) in [(&one, &other), (&other, &one)] {
        match here.links().delete(&there.id, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => drop(other.map_err(plain)?),
        }
    }
    println!("clusters {} and {} are not linked any more", one.id, other.id);
    Ok(ExitCode::SUCCESS)
}

/// The one cluster that is meant.
async fn here(place: &Place) -> Result<End> {
    End::open(Cluster::open(place).await?.client, "this cluster").await
}

/// Makes a Secret in the namespace of what runs the cluster.
async fn keep_secret(client: &Client, secret: Value) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), api::NAMESPACE);
    let made: Secret = serde_json::from_value(secret)?;
    let name = made.name_any();
    let _ = secrets.delete(&name, &DeleteParams::default()).await;
    secrets.create(&PostParams::default(), &made).await.map_err(plain)?;
    Ok(())
}

/// Takes away what nobody can use any more.
async fn forget_old_invitations(client: &Client) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), api::NAMESPACE);
    let is_over = |secret: &Secret| {
        let until = secret.annotations().get(join::UNTIL);
        until
            .and_then(|until| until.parse::<Timestamp>().ok())
            .is_some_and(|u| u < Timestamp::now())
    };
    let all = secrets.list(&ListParams::default()).await.map_err(plain)?;
    for old in all.iter().filter(|secret| is_over(secret)) {
        // Somebody else may have taken it away.
        let _ = secrets.delete(&old.name_any(), &DeleteParams::default()).await;
    }
    Ok(())
}

/// Prints a token by which another cluster can join.
async fn invite(invite: &Invite) -> Result<ExitCode> {
    let End { client, id, addresses, bundle } = here(&invite.place).await?;
    forget_old_invitations(&client).await?;
    let invitation = Uuid::new_v4().to_string();
    let secret = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    let until = Timestamp::now() + SignedDuration::from_mins(invite.minutes.into());
    let kept = json!({
        "metadata": {
            "name": join::invitation_name(&invitation),
            "annotations": {join::UNTIL: conditions::moment(until)},
        },
        "stringData": {join::SECRET: secret},
    });
    keep_secret(&client, kept).await?;
    let token = Token { cluster: id.clone(), addresses, bundle, invitation, secret };
    eprintln!(
        "whoever has this token can link one cluster to {id}, once, within {} minutes, by: \
         godwit cluster join TOKEN",
        invite.minutes
    );
    println!("{}", token.text());
    Ok(ExitCode::SUCCESS)
}

/// Links this cluster to the one that has invited it.
async fn join(arguments: &Join) -> Result<ExitCode> {
    let text = match &*arguments.token {
        "-" => std::io::read_to_string(std::io::stdin().take(MOST))?,
        text => text.to_owned(),
    };
    let token = Token::read(&text).map_err(|why| anyhow!("this token cannot be used: {why}"))?;
    let here = here(&arguments.place).await?;
    ensure!(
        here.id != token.cluster,
        "this cluster has the id {}, as the one that has invited it: a cluster is not linked to itself",
        here.id
    );
    let Token { cluster, addresses, bundle, invitation, secret } = token;
    let bundle = linked_of(&bundle, &cluster, SystemTime::now()).concat();
    ensure!(!bundle.is_empty(), "the token has no CA of cluster {cluster} that is good now");
    let kept = json!({
        "metadata": {"name": join::joining_name(&cluster)},
        "stringData": {join::INVITATION: invitation, join::SECRET: secret},
    });
    keep_secret(&here.client, kept).await?;
    here.believe(&End { client: here.client.clone(), id: cluster.clone(), addresses, bundle })
        .await?;
    here.until_ready(&cluster).await?;
    println!("clusters {} and {cluster} are linked", here.id);
    Ok(ExitCode::SUCCESS)
}
