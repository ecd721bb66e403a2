//! Linking two clusters where nobody holds both: one invites, by a token that is good once and not for
//! long; the other joins with it.
//!
//! ```text
//! `godwit cluster invite` in east: a Secret with what the invited one knows, and how long --> token
//! `godwit cluster join TOKEN` in west: a link to east, and a Secret with that
//! west's synchronizer --"I was invited, and these are my CAs"--> east's: a link to west; both Secrets go
//! ```
//!
//! The token has east's CAs, so that west knows whom it tells; it proves nothing any more once it was used.

use crate::links;
use crate::wire::{self, Ask, Told};
use crate::world::World;
use api::link::{ClusterLink, Spec as Link};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use channel::identity::{Trust, linked};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// Annotation of an invitation: until when it is good.
pub const UNTIL: &str = "godwit.dev/until";
/// What a Secret of either kind has.
pub const SECRET: &str = "secret";
/// Which invitation is taken up, in the Secret of who joins.
pub const INVITATION: &str = "invitation";
/// A token is a few certificates at most.
const MOST: usize = 64 << 10;

/// An invitation, as it is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The cluster that invites.
    pub cluster: String,
    /// Where its synchronizer is found.
    pub addresses: Vec<String>,
    /// The certificates of its CAs, PEM.
    pub bundle: String,
    /// Which invitation.
    pub invitation: String,
    /// What only who was invited knows.
    pub secret: String,
}

impl Token {
    /// As text, without a space in it.
    pub fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    /// Reads one.
    ///
    /// # Errors
    /// Why it is none, for people.
    pub fn read(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() > MOST {
            return Err("it is too long for a token".into());
        }
        let bytes = URL_SAFE_NO_PAD.decode(text);
        let bytes = bytes.map_err(|_| "it is no token: was it copied whole?".to_owned())?;
        serde_json::from_slice(&bytes).map_err(|_| "it is no token of this version".to_owned())
    }
}

/// The Secret of an invitation.
pub fn invitation_name(invitation: &str) -> String {
    format!("cluster-invitation-{invitation}")
}

/// The Secret by which a cluster is joined.
pub fn joining_name(cluster: &str) -> String {
    format!("cluster-joining-{cluster}")
}

fn secrets(world: &World) -> Api<Secret> {
    Api::namespaced(world.client.clone(), api::NAMESPACE)
}

fn field(secret: &Secret, name: &str) -> String {
    let found = secret.data.as_ref().and_then(|data| data.get(name));
    found.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned()).unwrap_or_default()
}

/// Whether two secrets are the same; how long it takes says nothing of where they differ.
fn is_same(one: &str, other: &str) -> bool {
    let differences = one.bytes().zip(other.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
    !one.is_empty() && one.len() == other.len() && differences == 0
}

/// Links a cluster that was invited.
///
/// # Errors
/// Why not, for people.
pub async fn admit(
    world: &World,
    (invitation, secret): (&str, &str),
    bundle: &str,
    address: &str,
) -> Result<(), String> {
    let unknown = || "there is no such invitation: it was used, or is over".to_owned();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if invitation.is_empty() || invitation.len() > 63 || !invitation.chars().all(plain) {
        return Err(unknown());
    }
    let name = invitation_name(invitation);
    let found = secrets(world).get_opt(&name).await.map_err(|error| why(&error))?;
    let found = found.filter(|found| is_same(&field(found, SECRET), secret)).ok_or_else(unknown)?;
    let until = found.annotations().get(UNTIL).and_then(|until| until.parse::<Timestamp>().ok());
    if until.is_none_or(|until| until < Timestamp::now()) {
        return Err(unknown());
    }
    let certificates = linked(bundle, &world.cluster(), SystemTime::now()).concat();
    let mut trust = Trust::new();
    trust.add_pem(&certificates).map_err(|error| format!("its CAs make no sense: {error}"))?;
    let mut clusters = trust.clusters();
    let (Some(cluster), None) = (clusters.next(), clusters.next()) else {
        return Err("it brings the CAs of no cluster, or of several".into());
    };
    if world.link(cluster).is_some() {
        return Err(format!("a cluster {cluster} is linked already: unlink it first"));
    }
    // N.B. first: whoever is the one that takes it away is the one that it was good for.
    let uid = found.uid();
    let only = DeleteParams::default().preconditions(Preconditions { uid, resource_version: None });
    match secrets(world).delete(&name, &only).await {
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Err(unknown()),
        other => other.map(|_| ()).map_err(|error| why(&error)),
    }?;
    let spec = Link { addresses: vec![address.to_owned()], ca_bundle: certificates.clone() };
    let links: Api<ClusterLink> = Api::all(world.client.clone());
    let made = links.create(&PostParams::default(), &ClusterLink::new(cluster, spec)).await;
    made.map_err(|error| format!("the link cannot be made: {}", why(&error)))?;
    tracing::info!(cluster, "a cluster that was invited has joined");
    Ok(())
}

/// Takes up an invitation of a cluster, if there is one that was not taken up yet.
///
/// # Errors
/// Why it was not, for people; None: there is none.
pub async fn take_up(world: &World, link: &ClusterLink) -> Result<(), Option<String>> {
    let cluster = link.name_any();
    let name = joining_name(&cluster);
    let found = secrets(world).get_opt(&name).await.map_err(|error| Some(why(&error)))?;
    let found = found.ok_or(None)?;
    let ask = Ask::Join {
        invitation: field(&found, INVITATION),
        secret: field(&found, SECRET),
        bundle: links::own(world),
        address: world.address(),
    };
    let mut last = format!("the link to cluster {cluster} does not say where that is");
    for address in &link.spec.addresses {
        let mut trust = Trust::new();
        trust.add_pem(&link.spec.ca_bundle).map_err(|error| Some(error.to_string()))?;
        match wire::ask_as_guest(trust, address, &cluster, &ask).await {
            Ok(Told::Trust { .. }) => {
                let _ = secrets(world).delete(&name, &DeleteParams::default()).await;
                return Ok(());
            }
            Ok(Told::Refused { why }) => last = why,
            Ok(_) => last = format!("{address}: it answers what was not asked"),
            Err(why) => last = why,
        }
    }
    Err(Some(last))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written_and_nothing_else_is_one() {
        let token = Token {
            cluster: "east".into(),
            addresses: vec!["east.example.org:9185".into()],
            bundle: "-----BEGIN CERTIFICATE-----".into(),
            invitation: "i".into(),
            secret: "s".into(),
        };
        assert_eq!(Token::read(&format!(" {}\n", token.text())), Ok(token.clone()));
        let text = token.text();
        for wrong in ["", "{}", "e30", &text[1..], &text[..text.len() - 4], &"a".repeat(MOST + 1)] {
            Token::read(wrong).expect_err(wrong);
        }
        assert!(is_same("abc", "abc"));
        for (one, other) in [("", ""), ("abc", "abd"), ("abc", "ab"), ("abc", "")] {
            assert!(!is_same(one, other));
        }
    }
}
