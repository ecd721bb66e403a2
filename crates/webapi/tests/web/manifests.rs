//! What people get wrong: each is refused with its field, and with words that help.

use crate::bad::{INSTANCETYPE, PREFERENCE, Row, VM, VOLUME};
use crate::types::{INSTANCETYPES, PREFERENCES, instancetype, preference};
use crate::world::{MOVES, VMIS, VMS, VOLUMES, World, admin, migration, user, vm, vmi, volume};
use http::Method;
use serde_json::{Value, json};

/// Sets or removes what is at a path.
fn set(object: &mut Value, path: &str, value: &str) {
    let path = path.replacen('~', "/spec/template/spec", 1);
    let (above, last) = path.rsplit_once('/').unwrap();
    let at = object.pointer_mut(above).unwrap_or_else(|| panic!("{above} is not there"));
    let value = (!value.is_empty()).then(|| serde_json::from_str::<Value>(value).unwrap());
    match (at, value) {
        (Value::Object(fields), Some(value)) => drop(fields.insert(last.into(), value)),
        (Value::Object(fields), None) => drop(fields.remove(last)),
        (Value::Array(list), Some(value)) => match last.parse::<usize>().unwrap() {
            index if index < list.len() => list[index] = value,
            _ => list.push(value),
        },
        (Value::Array(list), None) => drop(list.remove(last.parse().unwrap())),
        (other, _) => panic!("{path} is below {other}"),
    }
}

async fn each_is_refused(path: &str, good: Value, table: &[Row]) {
    let (world, editor) = (World::new().await, user("editor"));
    let path = format!("{path}?fieldValidation=Strict&dryRun=All");
    let mut wrong = Vec::new();
    for (at, value, field, word) in table {
        let mut bad = good.clone();
        set(&mut bad, at, value);
        let reply = world.post(&editor, &path, &bad).await;
        let causes = reply.body["details"]["causes"].as_array().cloned().unwrap_or_default();
        let named = |cause: &Value| cause["field"].as_str().is_some_and(|f| f.contains(field));
        // What the schema does not know is told before there are causes.
        let told = reply.code == 400 || causes.iter().any(named);
        let message = reply.message();
        if !(400..=422).contains(&reply.code)
            || !told
            || !message.contains(field)
            || !message.contains(word)
        {
            wrong.push(format!("{at} = {value} ({field}, {word}): {} {message}", reply.code));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), table.len(), wrong.join("\n"));
}

#[tokio::test]
async fn each_bad_vm_is_refused_with_its_field_and_a_remedy() {
    each_is_refused(VMS, vm(), VM).await;
}

#[tokio::test]
async fn each_bad_instancetype_and_preference_is_refused_with_its_field_and_a_remedy() {
    each_is_refused(INSTANCETYPES, instancetype(), INSTANCETYPE).await;
    each_is_refused(PREFERENCES, preference(), PREFERENCE).await;
}

#[tokio::test]
async fn each_bad_data_volume_is_refused_with_its_field_and_a_remedy() {
    each_is_refused(VOLUMES, volume(), VOLUME).await;
}

#[tokio::test]
async fn all_that_is_wrong_is_told_at_once_and_as_kubernetes_tells_it() {
    let (world, editor) = (World::new().await, user("editor"));
    let mut bad = vm();
    set(&mut bad, "~/domain/devices/disks/0/disk/bus", r#""ide""#);
    set(&mut bad, "~/domain/devices/tpm", "{}");
    set(&mut bad, "~/hostname", r#""My_Host""#);
    let reply = world.post(&editor, VMS, &bad).await;
    assert_eq!((reply.code, &reply.body["reason"]), (422, &json!("Invalid")));
    assert_eq!(reply.body["details"]["kind"], "VirtualMachine");
    assert_eq!(reply.body["details"]["causes"].as_array().unwrap().len(), 3);
    for word in ["VirtualMachine.kubevirt.io \"vm\" is invalid", "ide", "TPM", "hostname"] {
        assert!(reply.message().contains(word), "{word}: {}", reply.message());
    }
}

#[tokio::test]
async fn what_is_right_passes_without_a_word_and_what_has_no_effect_is_named() {
    let (world, editor) = (World::new().await, user("editor"));
    for (path, good) in [(VMS, vm()), (VMIS, vmi()), (VOLUMES, volume())] {
        let path = format!("{path}?fieldValidation=Strict");
        let reply = world.post(&editor, &path, &good).await;
        assert_eq!((reply.code, reply.warnings()), (201, vec![]), "{}", reply.body);
    }
    let mut odd = vm();
    set(&mut odd, "/metadata/name", r#""odd""#);
    set(&mut odd, "~/domain/clock", r#"{"utc": {}}"#);
    set(&mut odd, "~/domain/devices/blockMultiQueue", "true");
    set(&mut odd, "~/domain/devices/disks/0/io", r#""native""#);
    let reply = world.post(&editor, VMS, &odd).await;
    assert_eq!(reply.code, 201, "{}", reply.body);
    let warnings = reply.warnings().join(" ");
    for field in [
        "spec.template.spec.domain.clock",
        "spec.template.spec.domain.devices.blockMultiQueue",
        "spec.template.spec.domain.devices.disks[0].io",
    ] {
        assert!(warnings.contains(field), "{field}: {warnings}");
    }
    // Who changes something else is not warned again.
    let patch = json!({"metadata": {"labels": {"a": "b"}}});
    let reply = world.merge(&editor, &format!("{VMS}/odd"), &patch).await;
    assert_eq!((reply.code, reply.warnings()), (200, vec![]));
}

#[tokio::test]
async fn settings_and_policies_are_judged_and_the_settings_count_a_moment_later() {
    let world = World::new().await;
    let kubevirts = "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts";
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kubevirt"},
    });
    world.create(&admin(), "/api/v1/namespaces", &namespace).await;
    let mut settings = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "kubevirt"},
        "spec": {"configuration": {
            "machineType": "pc-q35-9.2", "evictionStrategy": "LiveMigrate",
            "developerConfiguration": {"featureGates": ["HostDisk", "NoSuch"]},
        }},
    });
    let reply = world.post(&admin(), kubevirts, &settings).await;
    assert_eq!(reply.code, 201, "{}", reply.body);
    assert!(reply.warnings().join(" ").contains("NoSuch"), "{:?}", reply.warnings());
    set(&mut settings, "/metadata/name", r#""other""#);
    set(&mut settings, "/spec/configuration/developerConfiguration/featureGates", r#""HostDisk""#);
    assert_eq!(world.post(&admin(), kubevirts, &settings).await.code, 422);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut vm = vm();
    set(&mut vm, "/spec/dataVolumeTemplates", "[]");
    let disk = r#"{"name": "root", "hostDisk": {"path": "/disk", "type": "Disk"}}"#;
    set(&mut vm, "~/volumes/0", disk);
    world.create(&user("editor"), VMS, &vm).await;
    let made = world.create(&user("editor"), VMIS, &vmi()).await;
    assert_eq!(made["spec"]["domain"]["machine"]["type"], "pc-q35-9.2");
    assert_eq!(made["spec"]["evictionStrategy"], "LiveMigrate");
    // What certificates could not live by is told, field by field.
    let odd = json!({"spec": {"certificateRotateStrategy": {"selfSigned": {
        "ca": {"duration": "1h", "renewBefore": "1h"}, "server": {"duration": "2h", "renewBefore": "x"},
    }}}});
    let reply = world.merge(&admin(), &format!("{kubevirts}/kubevirt"), &odd).await;
    let fields = ["ca.renewBefore", "server.renewBefore", "server.duration"];
    let told = reply.body.to_string();
    assert!(reply.code == 422 && fields.iter().all(|field| told.contains(field)), "{told}");
    // A gate that closes keeps nobody from stopping what is there.
    let gates = json!({"spec": {"configuration": {"developerConfiguration": null}}});
    assert_eq!(world.merge(&admin(), &format!("{kubevirts}/kubevirt"), &gates).await.code, 200);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let path = format!("{VMS}/vm");
    let start = json!({"spec": {"runStrategy": "Always"}});
    assert_eq!(world.merge(&user("editor"), &path, &start).await.code, 200);
    let worse = json!({"spec": {"template": {"spec": {"hostname": "My_Host"}}}});
    assert_eq!(world.merge(&user("editor"), &path, &worse).await.code, 422);

    let policies = "/apis/migrations.kubevirt.io/v1alpha1/migrationpolicies";
    let policy = json!({
        "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
        "metadata": {"name": "p"},
        "spec": {"selectors": {}, "bandwidthPerMigration": "-1Mi", "completionTimeoutPerGiB": -1},
    });
    let reply = world.post(&admin(), policies, &policy).await;
    assert_eq!(reply.code, 422, "{}", reply.body);
    assert_eq!(reply.body["details"]["causes"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn an_instance_gets_what_it_does_not_say_and_the_same_address_each_time() {
    let (world, editor) = (World::new().await, user("editor"));
    let bare = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {"name": "bare"},
        "spec": {
            "domain": {"memory": {"guest": "64Mi"}, "devices": {"disks": [
                {"name": "a"}, {"name": "b", "cdrom": {}},
            ]}},
            "volumes": [
                {"name": "a", "containerDisk": {"image": "i"}},
                {"name": "b", "cloudInitNoCloud": {"userData": "x"}},
            ],
        },
    });
    let made = world.create(&editor, VMIS, &bare).await;
    let spec = &made["spec"];
    let devices = &spec["domain"]["devices"];
    assert_eq!(made["metadata"]["finalizers"], json!(["foregroundDeleteVirtualMachine"]));
    assert_eq!(spec["terminationGracePeriodSeconds"], 30);
    assert_eq!(spec["domain"]["machine"]["type"], "q35");
    assert_eq!(spec["networks"], json!([{"name": "default", "pod": {}}]));
    assert_eq!(devices["interfaces"][0]["masquerade"], json!({}));
    assert_eq!(devices["disks"][0]["disk"]["bus"], "virtio");
    assert_eq!(devices["disks"][1]["cdrom"]["bus"], "sata");
    let mac = devices["interfaces"][0]["macAddress"].as_str().unwrap();
    assert!(mac.starts_with("02:") && mac.len() == 17, "{mac}");
    let path = format!("{VMIS}/bare");
    world.ask(&editor, Method::DELETE, &path, "", None).await;
    let free = json!({"metadata": {"finalizers": null}});
    world.merge(&admin(), &path, &free).await;
    let again = world.create(&editor, VMIS, &bare).await;
    assert_eq!(again["spec"]["domain"]["devices"]["interfaces"], devices["interfaces"]);

    let mut own = vmi();
    set(&mut own, "/metadata/name", r#""own""#);
    let interfaces = r#"[{"name": "default", "macAddress": "02:00:00:00:00:07"}, {"name": "lan", "bridge": {}}]"#;
    set(&mut own, "/spec/domain/devices/interfaces", interfaces);
    set(&mut own, "/spec/networks/1", r#"{"name": "lan", "multus": {"networkName": "br0"}}"#);
    let made = world.create(&editor, VMIS, &own).await;
    let interfaces = &made["spec"]["domain"]["devices"]["interfaces"];
    assert_eq!(interfaces[0]["macAddress"], "02:00:00:00:00:07");
    assert_eq!(interfaces[0]["masquerade"], json!({}));
    assert_eq!(interfaces[1]["masquerade"], Value::Null);
    assert_ne!(interfaces[1]["macAddress"], interfaces[0]["macAddress"]);

    let mut alone = vmi();
    set(&mut alone, "/metadata/name", r#""alone""#);
    set(&mut alone, "/spec/networks", "[]");
    set(&mut alone, "/spec/domain/devices/interfaces", "[]");
    set(&mut alone, "/spec/domain/devices/autoattachPodInterface", "false");
    let made = world.create(&editor, VMIS, &alone).await;
    assert_eq!(made["spec"]["networks"], json!([]));
}

#[tokio::test]
async fn a_shape_that_is_no_instance_is_refused_and_breaks_nothing() {
    let (world, editor) = (World::new().await, user("editor"));
    for (at, value) in [
        ("/spec", "7"),
        ("/spec/domain", r#""big""#),
        ("/spec/domain/devices", "[]"),
        ("/spec/domain/devices/disks", "{}"),
        ("/spec/domain/devices/disks/0", "null"),
        ("/spec/domain/devices/disks/0/disk", "true"),
        ("/spec/domain/devices/interfaces/0", r#""default""#),
        ("/spec/networks", "7"),
        ("/spec/domain/machine", "7"),
    ] {
        let mut bad = vmi();
        set(&mut bad, at, value);
        let reply = world.post(&editor, VMIS, &bad).await;
        assert_eq!(reply.code, 422, "{at} = {value}: {}", reply.body);
    }
}

#[tokio::test]
async fn a_disk_or_a_move_that_is_made_is_not_changed_into_another() {
    let (world, editor, mover) = (World::new().await, user("editor"), user("mover"));
    world.create(&editor, VOLUMES, &volume()).await;
    let larger = json!({"spec": {"storage": {"resources": {"requests": {"storage": "4Gi"}}}}});
    let reply = world.merge(&editor, &format!("{VOLUMES}/disk"), &larger).await;
    assert_eq!(reply.code, 422, "{}", reply.body);
    assert!(reply.message().contains("cannot be changed"), "{}", reply.message());
    world.instance("a", "Running").await;
    let made = world.create(&mover, MOVES, &migration("m", "a")).await;
    assert_eq!(made["metadata"]["labels"]["kubevirt.io/vmi-name"], "a");
    assert_eq!(made["metadata"]["finalizers"], json!(["kubevirt.io/migrationJobFinalize"]));
    for patch in [
        json!({"spec": {"vmiName": "b"}}),
        json!({"metadata": {"labels": {"kubevirt.io/vmi-name": "b"}}}),
    ] {
        let reply = world.merge(&mover, &format!("{MOVES}/m"), &patch).await;
        assert_eq!(reply.code, 422, "{patch}: {}", reply.body);
    }
}

#[tokio::test]
async fn only_an_instance_that_can_move_is_moved_and_once_at_a_time() {
    let (world, mover) = (World::new().await, user("mover"));
    for (name, phase) in [("runs", "Running"), ("over", "Succeeded"), ("stays", "Running")] {
        world.instance(name, phase).await;
    }
    let condition = json!({"status": {"conditions": [{
        "type": "LiveMigratable", "status": "False",
        "reason": "DisksNotLiveMigratable", "message": "disk 'root' is on its node alone",
    }]}});
    let path = format!("{VMIS}/stays/status");
    assert_eq!(world.merge(&crate::world::own(), &path, &condition).await.code, 200);
    world.create(&mover, MOVES, &migration("first", "runs")).await;
    for (vmi, words) in [
        ("", "name the virtual machine instance"),
        ("nobody", "there is no virtual machine instance 'nobody'"),
        ("over", "has ended"),
        ("stays", "disk 'root' is on its node alone"),
        ("runs", "migration 'first'"),
    ] {
        let reply = world.post(&mover, MOVES, &migration("m", vmi)).await;
        assert_eq!(reply.code, 422, "{vmi}: {}", reply.body);
        assert!(reply.message().contains(words), "{vmi}: {}", reply.message());
        assert!(reply.message().contains("spec.vmiName"), "{vmi}: {}", reply.message());
    }
    let mut far = migration("far", "runs");
    far["spec"]["receive"] = json!({"migrationID": "x"});
    let reply = world.post(&mover, MOVES, &far).await;
    assert!(reply.message().contains("'runs' does not wait for a guest"), "{}", reply.message());
    // Once that one is over, another may begin.
    let over = json!({"status": {"phase": "Failed"}});
    let path = format!("{MOVES}/first/status");
    assert_eq!(world.merge(&crate::world::own(), &path, &over).await.code, 200);
    world.create(&mover, MOVES, &migration("second", "runs")).await;
}
