//! ClusterLink: another cluster, which this one believes and moves guests with. It has that cluster's id as
//! its name.

use crate::conditions::Condition;
use kube::CustomResource;
use serde::{Deserialize, Serialize};

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "godwit.dev",
    version = "v1alpha1",
    kind = "ClusterLink",
    plural = "clusterlinks",
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Where its synchronizer is found, `host:port`.
    pub addresses: Vec<String>,
    /// The certificates of its CAs, PEM. Both clusters keep that true by themselves.
    pub ca_bundle: String,
}

/// How it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// `Ready`: it answers, and believes this cluster.
    pub conditions: Vec<Condition>,
    /// When the first of its CAs ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}
