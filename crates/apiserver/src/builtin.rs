//! The built-in resources, as data.

use crate::resource::{Resource, Subresource};
use crate::schema::{self, Schema};
use std::sync::Arc;

/// A row of the table.
struct Row {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    /// `n`: namespaced; `s`: has a status; `q`: a question, which is not stored.
    flags: &'static str,
    /// The published definition, behind `io.k8s.`.
    definition: &'static str,
    selectable: &'static [&'static str],
}

const fn row(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    flags: &'static str,
    definition: &'static str,
    selectable: &'static [&'static str],
) -> Row {
    Row { group, kind, plural, short, flags, definition, selectable }
}

const PODS: &[&str] = &[
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
];
const EVENTS: &[&str] = &[
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];

const RBAC: &str = "rbac.authorization.k8s.io";
const STORAGE: &str = "storage.k8s.io";
const WEBHOOKS: &str = "admissionregistration.k8s.io";
const AUTHZ: &str = "authorization.k8s.io";
const AUTHN: &str = "authentication.k8s.io";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row("", "ConfigMap", "configmaps", &["cm"], "n", "api.core.v1.ConfigMap", &[]),
    row("", "Endpoints", "endpoints", &["ep"], "n", "api.core.v1.Endpoints", &[]),
    row("", "Event", "events", &["ev"], "n", "api.core.v1.Event", EVENTS),
    row("", "LimitRange", "limitranges", &["limits"], "n", "api.core.v1.LimitRange", &[]),
    row("", "Namespace", "namespaces", &["ns"], "s", "api.core.v1.Namespace", &["status.phase"]),
    row("", "Node", "nodes", &["no"], "s", "api.core.v1.Node", &["spec.unschedulable"]),
    row("", "PersistentVolumeClaim", "persistentvolumeclaims", &["pvc"], "ns", "api.core.v1.PersistentVolumeClaim", &[]),
    row("", "PersistentVolume", "persistentvolumes", &["pv"], "s", "api.core.v1.PersistentVolume", &[]),
    row("", "Pod", "pods", &["po"], "ns", "api.core.v1.Pod", PODS),
    row("", "ResourceQuota", "resourcequotas", &["quota"], "ns", "api.core.v1.ResourceQuota", &[]),
    row("", "Secret", "secrets", &[], "n", "api.core.v1.Secret", &["type"]),
    row("", "ServiceAccount", "serviceaccounts", &["sa"], "n", "api.core.v1.ServiceAccount", &[]),
    row("", "Service", "services", &["svc"], "ns", "api.core.v1.Service", &["spec.clusterIP", "spec.type"]),
    row(WEBHOOKS, "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", &[], "", "api.admissionregistration.v1.MutatingWebhookConfiguration", &[]),
    row(WEBHOOKS, "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", &[], "", "api.admissionregistration.v1.ValidatingWebhookConfiguration", &[]),
    row("apiextensions.k8s.io", "CustomResourceDefinition", "customresourcedefinitions", &["crd", "crds"], "s", "apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition", &[]),
    row("apiregistration.k8s.io", "APIService", "apiservices", &[], "s", "kube-aggregator.pkg.apis.apiregistration.v1.APIService", &[]),
    row("apps", "ControllerRevision", "controllerrevisions", &[], "n", "api.apps.v1.ControllerRevision", &[]),
    row(AUTHN, "SelfSubjectReview", "selfsubjectreviews", &[], "q", "api.authentication.v1.SelfSubjectReview", &[]),
    row(AUTHN, "TokenReview", "tokenreviews", &[], "q", "api.authentication.v1.TokenReview", &[]),
    row(AUTHZ, "LocalSubjectAccessReview", "localsubjectaccessreviews", &[], "nq", "api.authorization.v1.LocalSubjectAccessReview", &[]),
    row(AUTHZ, "SelfSubjectAccessReview", "selfsubjectaccessreviews", &[], "q", "api.authorization.v1.SelfSubjectAccessReview", &[]),
    row(AUTHZ, "SelfSubjectRulesReview", "selfsubjectrulesreviews", &[], "q", "api.authorization.v1.SelfSubjectRulesReview", &[]),
    row(AUTHZ, "SubjectAccessReview", "subjectaccessreviews", &[], "q", "api.authorization.v1.SubjectAccessReview", &[]),
    row("coordination.k8s.io", "Lease", "leases", &[], "n", "api.coordination.v1.Lease", &[]),
    row("discovery.k8s.io", "EndpointSlice", "endpointslices", &[], "n", "api.discovery.v1.EndpointSlice", &[]),
    row("policy", "PodDisruptionBudget", "poddisruptionbudgets", &["pdb"], "ns", "api.policy.v1.PodDisruptionBudget", &[]),
    row(RBAC, "ClusterRoleBinding", "clusterrolebindings", &[], "", "api.rbac.v1.ClusterRoleBinding", &[]),
    row(RBAC, "ClusterRole", "clusterroles", &[], "", "api.rbac.v1.ClusterRole", &[]),
    row(RBAC, "RoleBinding", "rolebindings", &[], "n", "api.rbac.v1.RoleBinding", &[]),
    row(RBAC, "Role", "roles", &[], "n", "api.rbac.v1.Role", &[]),
    row("scheduling.k8s.io", "PriorityClass", "priorityclasses", &["pc"], "", "api.scheduling.v1.PriorityClass", &[]),
    row(STORAGE, "CSIDriver", "csidrivers", &[], "", "api.storage.v1.CSIDriver", &[]),
    row(STORAGE, "CSINode", "csinodes", &[], "", "api.storage.v1.CSINode", &[]),
    row(STORAGE, "StorageClass", "storageclasses", &["sc"], "", "api.storage.v1.StorageClass", &[]),
    row(STORAGE, "VolumeAttachment", "volumeattachments", &[], "s", "api.storage.v1.VolumeAttachment", &[]),
];

/// Of a resource key: its subresources besides `status`, with the kind of their bodies and verbs.
fn subresources(key: &str) -> Vec<Subresource> {
    let one = |name: &str, kind: (&str, &str, &str), verb: &str| Subresource {
        name: name.into(),
        kind: (kind.0.into(), kind.1.into(), kind.2.into()),
        verbs: vec![verb.into()],
    };
    match key {
        "pods" => vec![
            one("binding", ("", "v1", "Binding"), "create"),
            one("eviction", ("policy", "v1", "Eviction"), "create"),
            one("log", ("", "v1", "Pod"), "get"),
        ],
        "serviceaccounts" => vec![one("token", (AUTHN, "v1", "TokenRequest"), "create")],
        "namespaces" => vec![one("finalize", ("", "v1", "Namespace"), "update")],
        _ => Vec::new(),
    }
}

fn resource(row: &Row) -> Resource {
    let definition = format!("io.k8s.{}", row.definition);
    // Each row's definition is in the data: a test sees to it.
    let schema = schema::builtin(&definition).unwrap_or_else(|| Arc::new(Schema::default()));
    let mut resource = Resource {
        group: row.group.into(),
        version: "v1".into(),
        kind: row.kind.into(),
        list_kind: format!("{}List", row.kind).into(),
        plural: row.plural.into(),
        singular: row.kind.to_lowercase().into(),
        short_names: row.short.iter().map(|s| (*s).into()).collect(),
        categories: Vec::new(),
        namespaced: row.flags.contains('n'),
        stored: !row.flags.contains('q'),
        status: row.flags.contains('s'),
        subresources: Vec::new(),
        scale: None,
        schema,
        columns: Vec::new(),
        selectable: row.selectable.iter().map(|s| (*s).into()).collect(),
        deprecated: None,
        crd: None,
        storage_version: "v1".into(),
    };
    resource.subresources = subresources(&resource.key());
    if matches!(row.plural, "pods" | "services") {
        resource.categories.push("all".into());
    }
    if row.group == "apiextensions.k8s.io" || row.group == "apiregistration.k8s.io" {
        resource.categories.push("api-extensions".into());
    }
    if row.group == WEBHOOKS {
        resource.categories.push("api-extensions".into());
    }
    resource
}

/// All of them, by group and name.
pub fn resources() -> Vec<Arc<Resource>> {
    ROWS.iter().map(|row| Arc::new(resource(row))).collect()
}
