//! Which policy a migration is made by. Pure.

use api::migration::{MigrationPolicy, Options};
use kube::ResourceExt;
use std::cmp::Reverse;
use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

/// The options that are in effect, and the policy's name.
pub fn resolve<'a>(
    policies: impl IntoIterator<Item = &'a MigrationPolicy>,
    namespace: &Labels,
    vmi: &Labels,
    cluster: &Options,
) -> (Option<String>, Options) {
    let policy = select(policies, namespace, vmi);
    let own = policy.map(|policy| policy.spec.options.clone()).unwrap_or_default();
    (policy.map(ResourceExt::name_any), own.or(cluster).or(&Options::defaults()))
}

/// The policy all of whose selectors match: the one with most of them, then with most that are the
/// VMI's, then the one whose name comes first, as KubeVirt has it.
fn select<'a>(
    policies: impl IntoIterator<Item = &'a MigrationPolicy>,
    namespace: &Labels,
    vmi: &Labels,
) -> Option<&'a MigrationPolicy> {
    let matches = |wanted: &Labels, labels: &Labels| {
        wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
    };
    let fitting = policies.into_iter().filter_map(|policy| {
        let selectors = policy.spec.selectors.as_ref()?;
        let (of_namespace, of_vmi) =
            (&selectors.namespace_selector, &selectors.virtual_machine_instance_selector);
        let all = of_namespace.len() + of_vmi.len();
        (all > 0 && matches(of_namespace, namespace) && matches(of_vmi, vmi)).then_some((
            policy,
            all,
            of_vmi.len(),
        ))
    });
    let best =
        fitting.min_by_key(|(policy, all, own)| (Reverse(*all), Reverse(*own), policy.name_any()));
    best.map(|(policy, _, _)| policy)
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn policy(name: &str, namespace: &[(&str, &str)], vmi: &[(&str, &str)]) -> MigrationPolicy {
        serde_json::from_value(json!({
            "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
            "metadata": {"name": name},
            "spec": {"maxDowntimeMs": 7, "selectors": {
                "namespaceSelector": labels(namespace), "virtualMachineInstanceSelector": labels(vmi),
            }},
        }))
        .unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_most_exact_policy_counts_and_a_vmi_without_labels_matches_none_that_asks_for_some() {
        let all = [
            policy("b-namespace", &[("env", "prod")], &[]),
            policy("a-vmi", &[], &[("app", "db")]),
            policy("c-both", &[("env", "prod")], &[("app", "db")]),
            policy("d-other", &[("env", "prod")], &[("app", "web")]),
            policy("e-none", &[], &[]),
        ];
        let name = |namespace: &[(&str, &str)], vmi: &[(&str, &str)]| {
            select(&all, &labels(namespace), &labels(vmi)).map(ResourceExt::name_any)
        };
        assert_eq!(name(&[("env", "prod")], &[("app", "db")]).as_deref(), Some("c-both"));
        assert_eq!(name(&[("env", "test")], &[("app", "db")]).as_deref(), Some("a-vmi"));
        assert_eq!(name(&[("env", "prod")], &[]).as_deref(), Some("b-namespace"));
        assert_eq!(name(&[], &[]), None);
        // As many labels: those of the VMI count more.
        let equal = [&all[0], &all[1]];
        let found = select(equal, &labels(&[("env", "prod")]), &labels(&[("app", "db")]));
        assert_eq!(found.map(ResourceExt::name_any).as_deref(), Some("a-vmi"));
    }

    #[test]
    fn a_policy_overrules_the_cluster_and_the_cluster_the_defaults() {
        let cluster =
            Options { max_downtime_ms: Some(5), progress_timeout: Some(9), ..Options::default() };
        let all = [policy("p", &[], &[("app", "db")])];
        let (name, options) = resolve(&all, &Labels::new(), &labels(&[("app", "db")]), &cluster);
        assert_eq!(name.as_deref(), Some("p"));
        assert_eq!((options.max_downtime_ms, options.progress_timeout), (Some(7), Some(9)));
        let (name, options) = resolve(&all, &Labels::new(), &Labels::new(), &cluster);
        assert_eq!((name, options.max_downtime_ms), (None, Some(5)));
        assert_eq!(options.allow_auto_converge, Some(false));
    }
}
