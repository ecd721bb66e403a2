//! What a new VMI gets that does not say it.

use api::{keys, kubevirt};
use apiserver::meta;
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// How long a guest may take to shut down.
const GRACE: u64 = 30;
/// The machine type where the settings name none.
const MACHINE: &str = "q35";

type Fields = Map<String, Value>;

pub fn instance(object: &mut Value, cluster: &kubevirt::Spec) {
    meta::add_finalizer(object, keys::VMI_FINALIZER);
    let name = format!("{}/{}", meta::text(object, "namespace"), meta::text(object, "name"));
    let annotations = meta::map(object, "annotations");
    let keeps = annotations.and_then(|a| a.get(keys::NO_FREE_PAGE_REPORTING));
    let keeps = keeps.is_some_and(|said| said == "true");
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let configuration = &cluster.configuration;
    set(spec, "terminationGracePeriodSeconds", GRACE);
    if let Some(strategy) = &configuration.eviction_strategy {
        set(spec, "evictionStrategy", strategy.as_str());
    }
    if let Some(domain) = below(spec, "domain") {
        if let Some(machine) = below(domain, "machine") {
            set(machine, "type", configuration.machine_type.as_deref().unwrap_or(MACHINE));
        }
        if let Some(model) = &configuration.cpu_model
            && let Some(cpu) = below(domain, "cpu")
        {
            set(cpu, "model", model.as_str());
        }
        disks(domain);
        let options = configuration.virtual_machine_options.as_ref();
        let keeps = keeps || options.is_some_and(|o| o.disable_free_page_reporting.is_some());
        if let Some(devices) = below(domain, "devices") {
            set(devices, "autoattachMemBalloon", !keeps);
        }
    }
    networks(spec);
    interfaces(spec, &name);
}

/// Sets a field that says nothing.
fn set(fields: &mut Fields, name: &str, value: impl Into<Value>) {
    if fields.get(name).is_none_or(|found| found.is_null() || found == "") {
        fields.insert(name.into(), value.into());
    }
}

/// The fields of a field, which is made; None where it is of another type.
fn below<'a>(fields: &'a mut Fields, name: &str) -> Option<&'a mut Fields> {
    set(fields, name, json!({}));
    fields.get_mut(name)?.as_object_mut()
}

/// The elements of a list of a field.
fn each<'a>(fields: &'a mut Fields, list: &str) -> impl Iterator<Item = &'a mut Fields> {
    let list = fields.get_mut(list).and_then(Value::as_array_mut);
    list.into_iter().flatten().filter_map(Value::as_object_mut)
}

fn is_empty(fields: &Fields, list: &str) -> bool {
    fields.get(list).is_none_or(|l| l.is_null() || l.as_array().is_some_and(Vec::is_empty))
}

fn disks(domain: &mut Fields) {
    let Some(devices) = below(domain, "devices") else { return };
    for disk in each(devices, "disks") {
        let said = |kind: &str| disk.get(kind).is_some_and(|target| !target.is_null());
        // What is not built is judged later.
        if !["disk", "cdrom", "lun"].into_iter().any(said) {
            disk.insert("disk".into(), json!({}));
        }
        for (kind, bus) in [("disk", "virtio"), ("cdrom", "sata")] {
            if let Some(target) = disk.get_mut(kind).and_then(Value::as_object_mut) {
                set(target, "bus", bus);
            }
        }
    }
}

/// Who asks for no network gets the pod's.
fn networks(spec: &mut Fields) {
    let none = is_empty(spec, "networks");
    let Some(devices) = below(spec, "domain").and_then(|domain| below(domain, "devices")) else {
        return;
    };
    let unwanted = devices.get("autoattachPodInterface") == Some(&Value::Bool(false));
    if !none || unwanted || !is_empty(devices, "interfaces") {
        return;
    }
    devices.insert("interfaces".into(), json!([{"name": "default", "masquerade": {}}]));
    spec.insert("networks".into(), json!([{"name": "default", "pod": {}}]));
}

fn interfaces(spec: &mut Fields, vmi: &str) {
    let pods: Vec<Value> = each(spec, "networks")
        .filter(|network| network.get("pod").is_some_and(Value::is_object))
        .filter_map(|network| network.get("name").cloned())
        .collect();
    let Some(devices) = below(spec, "domain").and_then(|domain| below(domain, "devices")) else {
        return;
    };
    for interface in each(devices, "interfaces") {
        let Some(name) = interface.get("name").and_then(Value::as_str).map(str::to_owned) else {
            continue;
        };
        set(interface, "macAddress", mac(vmi, &name));
        let known = ["name", "macAddress", "model", "ports", "state", "tag"];
        let known = |field: &&String| known.contains(&&***field);
        let bound = interface.iter().any(|(f, value)| !known(&f) && value.is_object());
        if !bound && pods.contains(&Value::from(name)) {
            interface.insert("masquerade".into(), json!({}));
        }
    }
}

/// A hardware address that stays the same at each start: locally administered, of one card.
fn mac(vmi: &str, interface: &str) -> String {
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{vmi}/{interface}").as_bytes());
    let bytes = hash.as_bytes();
    let [a, b, c, d, e] = [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]];
    format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}
