//! Instancetypes and preferences, and VMs that take them.

use crate::world::{SUB, VMS, World, admin, user, vm};
use serde_json::{Value, json};

const GROUP: &str = "/apis/instancetype.kubevirt.io/v1beta1";
pub const INSTANCETYPES: &str =
    "/apis/instancetype.kubevirt.io/v1beta1/namespaces/default/virtualmachineinstancetypes";
pub const PREFERENCES: &str =
    "/apis/instancetype.kubevirt.io/v1beta1/namespaces/default/virtualmachinepreferences";

/// One that nothing is wrong with.
pub fn instancetype() -> Value {
    json!({
        "apiVersion": "instancetype.kubevirt.io/v1beta1", "kind": "VirtualMachineInstancetype",
        "metadata": {"name": "small"},
        "spec": {"cpu": {"guest": 4}, "memory": {"guest": "256Mi", "overcommitPercent": 50}},
    })
}

/// One that nothing is wrong with.
pub fn preference() -> Value {
    json!({
        "apiVersion": "instancetype.kubevirt.io/v1beta1", "kind": "VirtualMachinePreference",
        "metadata": {"name": "plain"},
        "spec": {
            "cpu": {"preferredCPUTopology": "spread"}, "devices": {"preferredRng": {}},
            "annotations": {"of": "plain"}, "requirements": {"cpu": {"guest": 4}},
        },
    })
}

/// A VM that takes both of its namespace.
fn taker() -> Value {
    let mut vm = vm();
    let domain = &mut vm["spec"]["template"]["spec"]["domain"];
    domain["cpu"] = Value::Null;
    domain["memory"] = Value::Null;
    vm["spec"]["instancetype"] = json!({"name": "small", "kind": "VirtualMachineInstancetype"});
    vm["spec"]["preference"] = json!({"name": "plain", "kind": "virtualmachinepreference"});
    vm
}

#[tokio::test]
async fn a_vm_is_judged_with_what_it_takes_and_shown_with_it() {
    let (world, editor) = (World::new().await, user("editor"));
    let dry = format!("{VMS}?dryRun=All");
    let early = world.post(&editor, &dry, &taker()).await;
    assert_eq!(early.code, 201, "{}", early.body);
    let warned = early.warnings().join(" ");
    assert!(warned.contains("no VirtualMachineInstancetype small"), "{warned}");
    world.create(&editor, INSTANCETYPES, &instancetype()).await;
    world.create(&editor, PREFERENCES, &preference()).await;

    world.create(&editor, VMS, &taker()).await;
    let expand = format!("{SUB}/virtualmachines/vm/expand-spec");
    let whole = world.ask(&editor, http::Method::GET, &expand, "", None).await.body;
    let spec = &whole["spec"]["template"]["spec"];
    assert_eq!(spec["domain"]["cpu"], json!({"sockets": 2, "cores": 2, "threads": 1}), "{whole}");
    assert_eq!(spec["domain"]["memory"]["guest"], "256Mi");
    assert_eq!(spec["domain"]["resources"]["requests"]["memory"], (128 << 20).to_string());
    assert_eq!(spec["domain"]["devices"]["rng"], json!({}));
    assert_eq!(whole["spec"]["template"]["metadata"]["annotations"]["of"], "plain");
    assert!(whole["spec"].get("instancetype").is_none(), "{whole}");

    // What both say, and what does not go together, is refused with the field.
    let refused = async |path: &str, value: Value, field: &str, word: &str| {
        let mut bad = taker();
        *bad.pointer_mut(path).expect(path) = value;
        let reply = world.post(&editor, &dry, &bad).await;
        let (code, message) = (reply.code, reply.message());
        assert!(code == 422 && message.contains(field) && message.contains(word), "{message}");
    };
    let domain = "/spec/template/spec/domain";
    let memory = json!({"guest": "256Mi"});
    refused(&format!("{domain}/memory"), memory, "domain.memory.guest", "conflicts").await;
    refused(&format!("{domain}/cpu"), json!({"cores": 4}), "domain.cpu.cores", "conflicts").await;
    let large = json!({"name": "plain", "spec": {"requirements": {"cpu": {"guest": 5}}}});
    world.merge(&editor, &format!("{PREFERENCES}/plain"), &large).await;
    refused("/metadata/name", "vm2".into(), "spec.instancetype", "requires 5").await;
}

#[tokio::test]
async fn everybody_reads_what_is_for_all_and_its_owners_write_what_is_a_namespaces() {
    let (world, nobody) = (World::new().await, user("nobody"));
    let clusters = format!("{GROUP}/virtualmachineclusterinstancetypes");
    let mut of_all = instancetype();
    of_all["kind"] = "VirtualMachineClusterInstancetype".into();
    world.create(&admin(), &clusters, &of_all).await;
    let read = async |path: &str| world.ask(&nobody, http::Method::GET, path, "", None).await.code;
    assert_eq!(read(&format!("{clusters}/small")).await, 200);
    assert_eq!(read(INSTANCETYPES).await, 403);
    assert_eq!(world.post(&nobody, &clusters, &of_all).await.code, 403);
    assert_eq!(world.post(&user("viewer"), INSTANCETYPES, &instancetype()).await.code, 403);
    assert_eq!(world.post(&user("editor"), INSTANCETYPES, &instancetype()).await.code, 201);
}
