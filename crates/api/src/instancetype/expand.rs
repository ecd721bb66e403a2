//! A template with all that it takes.

use super::What;
use super::fields::{INSTANCETYPE, OF_DISKS, OF_INPUTS, OF_INTERFACES, PREFERENCE, RESOURCES, Row};
use super::topology::topology;
use crate::support::{self, at};
use crate::validate::{Cause, Report};
use crate::vmi::Topology;
use crate::{quantity, vmi};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const TEMPLATE: &str = "spec.template.spec";
const DISKS: &str = "domain.devices.disks";
const LOADER: &str = "domain.firmware.bootloader";

/// The specs of what a VM takes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Types<'a> {
    /// Of its instancetype.
    pub instancetype: Option<&'a Value>,
    /// Of its preference.
    pub preference: Option<&'a Value>,
}

impl<'a> Types<'a> {
    /// Those of objects, each of one of the kinds.
    pub fn of(objects: impl Iterator<Item = (What, &'a Value)>) -> Self {
        let mut types = Self::default();
        for (what, object) in objects {
            match what {
                What::Instancetype => types.instancetype = Some(&object["spec"]),
                What::Preference => types.preference = Some(&object["spec"]),
            }
        }
        types
    }
}

/// A field of a VMI's spec that its template does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Who says it.
    pub what: What,
    /// The field that says it.
    pub from: &'static str,
    /// The field of the VMI's spec: `domain.devices.disks[0].disk.bus`.
    pub to: String,
}

/// A template with all that it takes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Expanded {
    /// The VMI's spec.
    pub spec: Value,
    /// The VMI's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The class of storage of disks that do not name one.
    pub storage_class: Option<String>,
    /// What the template does not say.
    pub given: Vec<Given>,
    /// What does not go together, by the fields of a VM.
    pub faults: Vec<Cause>,
}

/// A template with all that it takes, if that is whole and goes together.
///
/// # Errors
/// All that does not, by the fields of a VM.
pub fn apply(
    template: &Value,
    annotations: &BTreeMap<String, String>,
    types: Types<'_>,
) -> Result<Expanded, Report> {
    let expanded = expand(template, annotations, types);
    let mut causes = expanded.faults.clone();
    causes.extend(requirements(&expanded, types));
    match causes.is_empty() {
        true => Ok(expanded),
        false => Err(Report { causes, ..Report::default() }),
    }
}

/// A template with what it takes, and all that does not go together.
pub fn expand(
    template: &Value,
    annotations: &BTreeMap<String, String>,
    types: Types<'_>,
) -> Expanded {
    let mut made = Expanded {
        spec: template.clone(),
        annotations: annotations.clone(),
        ..Expanded::default()
    };
    if let Some(spec) = types.instancetype {
        made.instancetype(spec, types.preference.unwrap_or(&Value::Null));
    }
    if let Some(spec) = types.preference {
        made.preference(spec);
    }
    made
}

/// What a preference requires that the guest does not have.
pub fn requirements(expanded: &Expanded, types: Types<'_>) -> Vec<Cause> {
    let Some(required) = types.preference.map(|preference| &preference["requirements"]) else {
        return Vec::new();
    };
    // What cannot be read is told of elsewhere.
    let Ok((spec, _)) = support::parse::<vmi::Spec>(&expanded.spec) else { return Vec::new() };
    let mut report = Report::default();
    let field = |own: &str| match types.instancetype {
        Some(_) => "spec.instancetype".to_owned(),
        None => format!("{TEMPLATE}.{own}"),
    };
    let vcpus = spec.domain.cpu.topology().vcpus().map_or(u64::MAX, u64::from);
    let least = required["cpu"]["guest"].as_u64().unwrap_or_default();
    report.demand(vcpus >= least, &field("domain.cpu"), || {
        format!("the guest has {vcpus} processors, and its preference requires {least}")
    });
    let least = &required["memory"]["guest"];
    let memory = spec.memory().map(|memory| memory.0.clone()).unwrap_or_default();
    let enough = size(least)
        .is_none_or(|least| quantity::bytes(&memory).is_some_and(|memory| memory >= least));
    report.demand(enough, &field("domain.memory.guest"), || {
        let least = least.as_str().map_or(least.to_string(), str::to_owned);
        format!("the guest has {memory} of memory, and its preference requires {least}")
    });
    let wanted = required["architecture"].as_str().unwrap_or_default();
    let is = spec.architecture.as_deref().filter(|said| !said.is_empty()).unwrap_or("amd64");
    report.demand(wanted.is_empty() || wanted == is, &format!("{TEMPLATE}.architecture"), || {
        format!("the guest is {is}, and its preference requires {wanted}")
    });
    report.causes
}

impl Expanded {
    /// Who says a field of the VMI's spec, or what is below it.
    pub fn giver(&self, field: &str) -> Option<&Given> {
        let below = |above: &str, field: &str| {
            field
                .strip_prefix(above)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        // What is wrong with all of a guest's processors is wrong with what says how many.
        let is = |given: &&Given| {
            below(&given.to, field) || given.what == What::Instancetype && below(field, &given.to)
        };
        self.given.iter().find(is)
    }

    /// The spec of a DataVolume, in the class of storage that is preferred where it names none.
    pub fn disk(&self, spec: &Value) -> Value {
        let mut spec = spec.clone();
        for form in ["pvc", "storage"] {
            let named = says(&spec, &format!("{form}.storageClassName")).is_some();
            if let Some(class) = self.storage_class.as_deref().filter(|_| !named)
                && let Some(claim) = spec.get_mut(form).and_then(Value::as_object_mut)
            {
                claim.insert("storageClassName".into(), class.into());
            }
        }
        spec
    }

    /// A VMI's spec without what the instancetype says.
    pub fn without_instancetype(&self, spec: &Value) -> Value {
        let mut rest = spec.clone();
        for given in self.given.iter().filter(|given| given.what == What::Instancetype) {
            let (above, last) = given.to.rsplit_once('.').unwrap_or(("", &given.to));
            let mut above = above.split('.').filter(|part| !part.is_empty());
            let place = above.try_fold(&mut rest, |place, part| place.get_mut(part));
            if let Some(fields) = place.and_then(Value::as_object_mut) {
                fields.remove(last);
            }
        }
        rest
    }

    fn fault(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.faults.push(Cause { field: field.into(), message: message.into() });
    }

    fn conflict(&mut self, field: &str) {
        self.fault(field, "conflicts with the instancetype, which says it: remove it here, or name no instancetype");
    }

    fn give(&mut self, what: What, from: &'static str, to: &str, value: Value) {
        put(&mut self.spec, to, value);
        self.given.push(Given { what, from, to: to.into() });
    }

    /// What an instancetype says is said by nobody else.
    fn take(&mut self, from: &'static str, to: &str, value: Value) {
        match says(&self.spec, to) {
            Some(_) => self.conflict(&format!("{TEMPLATE}.{to}")),
            None => self.give(What::Instancetype, from, to, value),
        }
    }

    /// What a preference says is said by it where nobody else does.
    fn prefer(&mut self, from: &'static str, to: &str, value: &Value) {
        if says(&self.spec, to).is_none() {
            self.give(What::Preference, from, to, value.clone());
        }
    }

    fn instancetype(&mut self, spec: &Value, preference: &Value) {
        for field in RESOURCES {
            if says(&self.spec, field).is_some() {
                self.conflict(&format!("{TEMPLATE}.{field}"));
            }
        }
        for (from, to) in INSTANCETYPE {
            if let Some(value) = says(spec, from) {
                self.take(from, to, value.clone());
            }
        }
        match topology(spec["cpu"]["guest"].as_u64().unwrap_or_default(), preference) {
            Ok(Topology { sockets, cores, threads }) => {
                let parts = [("sockets", sockets), ("cores", cores), ("threads", threads)];
                for (part, count) in parts {
                    self.take("cpu.guest", &format!("domain.cpu.{part}"), count.into());
                }
            }
            Err((field, why)) => self.fault(field, why),
        }
        self.overcommit(&spec["memory"]);
        for (name, value) in texts(&spec["annotations"]) {
            match self.annotations.get(&name) {
                Some(said) if *said != value => {
                    self.conflict(&format!("spec.template.metadata.annotations[{name}]"));
                }
                _ => {
                    self.annotations.insert(name, value);
                }
            }
        }
    }

    /// The pod asks for less than the guest sees.
    fn overcommit(&mut self, memory: &Value) {
        let Some(percent) = memory["overcommitPercent"].as_i64().filter(|percent| *percent != 0)
        else {
            return;
        };
        let guest = size(&memory["guest"]);
        match (guest, percent) {
            (Some(guest), 1..=100) => {
                let bytes = guest * (100 - i128::from(percent)) / 100;
                let to = "domain.resources.requests.memory";
                self.give(
                    What::Instancetype,
                    "memory.overcommitPercent",
                    to,
                    bytes.to_string().into(),
                );
            }
            // What is no size is told of elsewhere.
            (None, _) => {}
            _ => self.fault("spec.instancetype", "memory.overcommitPercent: must be 0 to 100"),
        }
    }

    fn preference(&mut self, spec: &Value) {
        for (from, to) in PREFERENCE {
            if let Some(value) = says(spec, from) {
                self.prefer(from, to, value);
            }
        }
        for (index, kind) in self.disks().into_iter().enumerate() {
            let rows = OF_DISKS.iter().filter(|(of, _)| *of == kind).map(|(_, row)| *row);
            self.prefer_each(spec, rows, DISKS, index);
        }
        for (list, rows) in [
            ("domain.devices.interfaces", &OF_INTERFACES[..]),
            ("domain.devices.inputs", &OF_INPUTS[..]),
        ] {
            let count = at(&self.spec, list).and_then(Value::as_array).map_or(0, Vec::len);
            for index in 0..count {
                self.prefer_each(spec, rows.iter().copied(), list, index);
            }
        }
        self.firmware(&spec["firmware"]);
        for (name, value) in texts(&spec["annotations"]) {
            self.annotations.entry(name).or_insert(value);
        }
        let class = spec["volumes"]["preferredStorageClassName"].as_str();
        self.storage_class = class.filter(|class| !class.is_empty()).map(str::to_owned);
    }

    fn prefer_each(
        &mut self,
        spec: &Value,
        rows: impl Iterator<Item = Row>,
        list: &str,
        index: usize,
    ) {
        for (from, to) in rows {
            if let Some(value) = says(spec, from) {
                self.prefer(from, &format!("{list}[{index}].{to}"), value);
            }
        }
    }

    /// What each disk is; one that does not say it is a disk.
    fn disks(&self) -> Vec<&'static str> {
        let disks = at(&self.spec, DISKS).and_then(Value::as_array).into_iter().flatten();
        let kind = |disk: &Value| {
            ["cdrom", "lun"].into_iter().find(|kind| !disk[kind].is_null()).unwrap_or("disk")
        };
        disks.map(kind).collect()
    }

    /// How it boots, as a whole: UEFI's own form first, as in KubeVirt.
    fn firmware(&mut self, spec: &Value) {
        let on = |field: &str| spec[field] == true;
        let silent = ["bios", "efi"]
            .into_iter()
            .all(|loader| says(&self.spec, &format!("{LOADER}.{loader}")).is_none());
        if silent && !spec["preferredEfi"].is_null() {
            let efi = format!("{LOADER}.efi");
            return self.prefer("firmware.preferredEfi", &efi, &spec["preferredEfi"]);
        }
        if silent && on("preferredUseBios") {
            let serial = says(spec, "preferredUseBiosSerial");
            let bios = serial.map_or(json!({}), |serial| json!({"useSerial": serial}));
            self.prefer("firmware.preferredUseBios", &format!("{LOADER}.bios"), &bios);
        } else if silent && on("preferredUseEfi") {
            self.prefer("firmware.preferredUseEfi", &format!("{LOADER}.efi"), &json!({}));
        }
        let efi = says(&self.spec, &format!("{LOADER}.efi")).is_some();
        if let Some(secure) = says(spec, "preferredUseSecureBoot").filter(|_| efi) {
            let to = format!("{LOADER}.efi.secureBoot");
            self.prefer("firmware.preferredUseSecureBoot", &to, secure);
        }
    }
}

/// What a field says. None: nothing.
fn says<'a>(spec: &'a Value, field: &str) -> Option<&'a Value> {
    at(spec, field).filter(|value| !value.is_null() && *value != "")
}

/// Writes a field as [`at`] reads it, if all above it are of its kind.
fn put(spec: &mut Value, field: &str, value: Value) {
    let mut place = spec;
    for part in field.split(['.', '[']).filter(|part| !part.is_empty()) {
        let next = match part.strip_suffix(']').map(str::parse::<usize>) {
            Some(Ok(index)) => place.get_mut(index),
            _ => {
                if place.is_null() {
                    *place = json!({});
                }
                place.as_object_mut().map(|fields| fields.entry(part).or_insert(Value::Null))
            }
        };
        let Some(next) = next else { return };
        place = next;
    }
    *place = value;
}

/// A quantity in bytes, as text or as a number.
fn size(quantity: &Value) -> Option<i128> {
    match quantity {
        Value::Number(number) => quantity::bytes(&number.to_string()),
        other => quantity::bytes(other.as_str()?),
    }
}

fn texts(map: &Value) -> impl Iterator<Item = (String, String)> {
    let map = map.as_object().into_iter().flatten();
    map.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
}

#[cfg(test)]
mod test {
    use super::*;

    fn expanded(template: Value, instancetype: &Value, preference: &Value) -> Expanded {
        let preference = Some(preference).filter(|preference| !preference.is_null());
        let types = Types { instancetype: Some(instancetype), preference };
        expand(&template, &BTreeMap::new(), types)
    }

    fn u1(more: Value) -> Value {
        let mut spec = json!({"cpu": {"guest": 8}, "memory": {"guest": "2Gi"}});
        for (field, value) in more.as_object().expect("fields") {
            put(&mut spec, field, value.clone());
        }
        spec
    }

    #[test]
    fn processors_are_arranged_as_the_preference_has_it_and_are_as_many_as_the_instancetype_says() {
        let spread = |across: &str, ratio: u32| {
            json!({"cpu": {"preferredCPUTopology": "spread",
                "spreadOptions": {"across": across, "ratio": ratio}}})
        };
        let plain = |topology: &str| json!({"cpu": {"preferredCPUTopology": topology}});
        for (preference, sockets, cores, threads) in [
            (Value::Null, 8, 1, 1),
            (plain("preferSockets"), 8, 1, 1),
            (plain("any"), 8, 1, 1),
            (plain("cores"), 1, 8, 1),
            (plain("preferThreads"), 1, 1, 8),
            (plain("spread"), 4, 2, 1),
            (spread("SocketsCores", 4), 2, 4, 1),
            (spread("CoresThreads", 2), 1, 4, 2),
            (spread("SocketsCoresThreads", 2), 2, 2, 2),
        ] {
            let made = expanded(json!({}), &u1(json!({})), &preference);
            assert_eq!(made.faults, [], "{preference}");
            let (spec, _) = support::parse::<vmi::Spec>(&made.spec).expect("a spec");
            let wanted = Topology { sockets, cores, threads };
            assert_eq!(spec.domain.cpu.topology(), wanted, "{preference}");
            assert_eq!(wanted.vcpus(), Some(8));
        }
        for wrong in [spread("SocketsCores", 3), spread("CoresThreads", 4), plain("none")] {
            let faults = expanded(json!({}), &u1(json!({})), &wrong).faults;
            assert_eq!(faults.len(), 1, "{wrong}: {faults:?}");
            assert_eq!(faults[0].field, "spec.preference");
        }
    }

    #[test]
    fn what_an_instancetype_says_no_template_says() {
        let spec = u1(json!({
            "cpu.model": "host-passthrough", "nodeSelector": {"a": "b"}, "annotations": {"c": "d"},
            "memory.overcommitPercent": 50,
        }));
        let made = expanded(json!({"domain": {"devices": {}}}), &spec, &Value::Null);
        assert_eq!(made.faults, []);
        assert_eq!(made.spec["domain"]["memory"]["guest"], "2Gi");
        assert_eq!(made.spec["domain"]["resources"]["requests"]["memory"], (1 << 30).to_string());
        assert_eq!(made.spec["nodeSelector"]["a"], "b");
        assert_eq!(made.annotations["c"], "d");
        assert_eq!(made.without_instancetype(&made.spec)["domain"]["cpu"], json!({}));
        for (field, value) in [
            ("domain.cpu.cores", json!(2)),
            ("domain.cpu.model", json!("host-model")),
            ("domain.memory.guest", json!("2Gi")),
            ("domain.resources.limits.cpu", json!("1")),
            ("nodeSelector", json!({})),
        ] {
            let mut template = json!({});
            put(&mut template, field, value);
            let faults = expanded(template, &spec, &Value::Null).faults;
            let fields: Vec<&str> = faults.iter().map(|fault| &*fault.field).collect();
            assert_eq!(fields, [format!("spec.template.spec.{field}")]);
        }
    }

    #[test]
    fn a_template_without_what_the_instancetype_says_is_the_same_with_it_again() {
        let spec = u1(json!({"schedulerName": "s", "memory.overcommitPercent": 10}));
        let template = json!({"domain": {"devices": {"disks": [{"name": "a"}]}}});
        let preference = json!({"devices": {"preferredDiskBus": "sata"}});
        let once = expanded(template, &spec, &preference);
        let again = expanded(once.without_instancetype(&once.spec), &spec, &preference);
        assert_eq!((again.faults, again.spec), (vec![], once.spec));
    }

    #[test]
    fn what_a_template_says_no_preference_changes() {
        let preference = json!({
            "devices": {"preferredDiskBus": "sata", "preferredCdromBus": "scsi", "preferredRng": {},
                "preferredInterfaceModel": "e1000e"},
            "firmware": {"preferredUseEfi": true, "preferredUseSecureBoot": false},
            "machine": {"preferredMachineType": "pc"},
            "preferredTerminationGracePeriodSeconds": 5,
            "annotations": {"a": "preferred", "b": "preferred"},
            "volumes": {"preferredStorageClassName": "fast"},
        });
        let template = json!({
            "domain": {"devices": {
                "disks": [
                    {"name": "a"}, {"name": "b", "disk": {"bus": "virtio"}}, {"name": "c", "cdrom": {}},
                ],
                "interfaces": [{"name": "n", "model": "virtio"}, {"name": "m"}],
            }},
            "terminationGracePeriodSeconds": 0,
        });
        let types = Types { instancetype: None, preference: Some(&preference) };
        let said = [("a".to_owned(), "said".to_owned())].into();
        let made = expand(&template, &said, types);
        let devices = &made.spec["domain"]["devices"];
        assert_eq!(devices["disks"][0]["disk"]["bus"], "sata");
        assert_eq!(devices["disks"][1]["disk"]["bus"], "virtio");
        assert_eq!(devices["disks"][2], json!({"name": "c", "cdrom": {"bus": "scsi"}}));
        assert_eq!(devices["interfaces"][0]["model"], "virtio");
        assert_eq!(devices["interfaces"][1]["model"], "e1000e");
        let loader = &made.spec["domain"]["firmware"]["bootloader"];
        assert_eq!(*loader, json!({"efi": {"secureBoot": false}}));
        assert_eq!(made.spec["domain"]["machine"]["type"], "pc");
        assert_eq!(made.spec["terminationGracePeriodSeconds"], 0);
        assert_eq!((&*made.annotations["a"], &*made.annotations["b"]), ("said", "preferred"));
        assert_eq!(made.storage_class.as_deref(), Some("fast"));
        let bios = json!({"domain": {"firmware": {"bootloader": {"bios": {}}}}});
        let made = expand(&bios, &BTreeMap::new(), types);
        assert_eq!(made.spec["domain"]["firmware"], bios["domain"]["firmware"]);
    }

    #[test]
    fn what_a_preference_requires_the_guest_has() {
        let preference = json!({"requirements": {
            "cpu": {"guest": 8}, "memory": {"guest": "2Gi"}, "architecture": "amd64",
        }});
        let spec = u1(json!({}));
        let types = Types { instancetype: Some(&spec), preference: Some(&preference) };
        assert!(apply(&json!({}), &BTreeMap::new(), types).is_ok());
        let small = u1(json!({"cpu.guest": 7, "memory.guest": "2047Mi"}));
        let types = Types { instancetype: Some(&small), ..types };
        let causes = apply(&json!({}), &BTreeMap::new(), types).expect_err("too small").causes;
        assert_eq!(causes.len(), 2, "{causes:?}");
        assert!(causes[1].message.contains("requires 2Gi"), "{causes:?}");
        let alone = Types { instancetype: None, ..types };
        let template = json!({"domain": {"cpu": {"cores": 4}, "memory": {"guest": "4Gi"}}});
        let causes = apply(&template, &BTreeMap::new(), alone).expect_err("too few").causes;
        assert_eq!(causes[0].field, "spec.template.spec.domain.cpu");
    }
}
