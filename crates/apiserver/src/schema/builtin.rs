//! The schemas of the built-in kinds, as Kubernetes publishes them: `schemas/builtin.json`, made
//! by `scripts/schemas`.

use super::Schema;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

static DATA: &[u8] = include_bytes!("../../schemas/builtin.json");

/// All of them, by the names of their definitions. Parts that several have are shared.
static KNOWN: LazyLock<BTreeMap<String, Arc<Schema>>> = LazyLock::new(|| {
    let mut known = BTreeMap::new();
    // A test reads it: it is an object of definitions.
    let definitions: Map<String, Value> = serde_json::from_slice(DATA).unwrap_or_default();
    for name in definitions.keys() {
        Schema::of_definition(&definitions, name, &mut known);
    }
    known
});

/// The schema of a definition, such as `io.k8s.api.core.v1.Pod`.
pub fn builtin(name: &str) -> Option<Arc<Schema>> {
    KNOWN.get(name).cloned()
}

/// That of every object's metadata.
pub fn metadata() -> Arc<Schema> {
    static METADATA: LazyLock<Arc<Schema>> = LazyLock::new(|| {
        let name = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
        builtin(name)
            .unwrap_or_else(|| Arc::new(Schema { preserve_unknown: true, ..Schema::default() }))
    });
    METADATA.clone()
}
