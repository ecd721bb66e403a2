//! Webhooks, asked as API servers ask them.

use crate::site::Site;
use crate::world::{Reply, VMIS, user, vm, vmi};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use serde_json::{Value, json};

const UID: &str = "705ab4f5-6393-11e8-b7cc-42010a800002";

/// A review with all that Kubernetes' documentation has in one.
fn review(operation: &str, resource: &str, object: Value, old: Value, user: &str) -> Value {
    let some = if object.is_null() { &old } else { &object };
    let (group, version) = some["apiVersion"].as_str().unwrap().split_once('/').unwrap();
    let kind = json!({"group": group, "version": version, "kind": some["kind"]});
    let place = json!({"group": group, "version": version, "resource": resource});
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": UID,
            "kind": kind, "resource": place,
            "requestKind": kind, "requestResource": place,
            "name": some["metadata"]["name"], "namespace": "default",
            "operation": operation,
            "userInfo": {
                "username": user, "uid": "014fbff9a07c",
                "groups": ["system:authenticated", "my-admin-group"],
                "extra": {"some-key": ["some-value1", "some-value2"]},
            },
            "object": object, "oldObject": old,
            "options": {"apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions"},
            "dryRun": false,
        },
    })
}

fn create(resource: &str, object: Value) -> Value {
    review("CREATE", resource, object, Value::Null, "jane")
}

fn response(reply: &Reply) -> &Value {
    assert_eq!(reply.code, 200, "{}", reply.body);
    assert_eq!(reply.body["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(reply.body["kind"], "AdmissionReview");
    assert_eq!(reply.body["response"]["uid"], UID);
    &reply.body["response"]
}

/// An object with the patch of a response.
fn patched(mut object: Value, response: &Value) -> Value {
    assert_eq!((&response["allowed"], &response["patchType"]), (&json!(true), &json!("JSONPatch")));
    let patch = STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    json_patch::patch(&mut object, &patch).unwrap();
    object
}

#[tokio::test]
async fn what_is_filled_in_is_what_an_embedded_api_would_store() {
    let site = Site::new().await;
    let mut sent = vmi();
    let devices = &mut sent["spec"]["domain"]["devices"];
    devices["disks"] = json!([{"name": "root"}, {"name": "seed", "cdrom": {}}]);
    devices["interfaces"] = json!([]);
    sent["spec"]["networks"] = json!([]);
    let reply = site.webhook("/mutate", &create("virtualmachineinstances", sent.clone())).await;
    // Both with a namespace and, as older API servers have it here, without.
    let by_webhook = patched(sent.clone(), response(&reply));
    let stored = site.world.create(&user("editor"), VMIS, &sent).await;
    assert_eq!(by_webhook["spec"], stored["spec"]);
    assert_eq!(by_webhook["metadata"]["finalizers"], stored["metadata"]["finalizers"]);
    assert_ne!(by_webhook["spec"], sent["spec"]);
    sent["metadata"]["namespace"] = "default".into();
    let reply = site.webhook("/mutate", &create("virtualmachineinstances", sent.clone())).await;
    assert_eq!(patched(sent, response(&reply))["spec"], stored["spec"]);

    // What lacks nothing is not patched, and is right.
    let whole = create("virtualmachines", vm());
    for path in ["/mutate", "/validate"] {
        let reply = site.webhook(path, &whole).await;
        assert_eq!(response(&reply), &json!({"uid": UID, "allowed": true}), "{path}");
    }
}

#[tokio::test]
async fn instances_without_a_name_get_addresses_of_their_own() {
    let site = Site::new().await;
    let mut nameless = vmi();
    nameless["metadata"] = json!({"generateName": "vm-"});
    let mut first = create("virtualmachineinstances", nameless.clone());
    first["request"]["uid"] = "another".into();
    let second = create("virtualmachineinstances", nameless.clone());
    let mac = |reply: &Reply| {
        let patched = patched(nameless.clone(), &reply.body["response"]);
        assert_eq!(patched["metadata"]["name"], Value::Null);
        patched["spec"]["domain"]["devices"]["interfaces"][0]["macAddress"].clone()
    };
    let (first, second) =
        (site.webhook("/mutate", &first).await, site.webhook("/mutate", &second).await);
    assert_ne!(mac(&first), mac(&second));
}

#[tokio::test]
async fn what_is_wrong_is_denied_with_every_cause_as_in_an_embedded_api() {
    let site = Site::new().await;
    let mut bad = vm();
    let spec = &mut bad["spec"]["template"]["spec"];
    spec["domain"]["cpu"]["cores"] = 1000.into();
    spec["domain"]["devices"]["disks"][1]["bootOrder"] = 1.into();
    spec["volumes"][0]["name"] = "boot".into();
    let reply = site.webhook("/validate", &create("virtualmachines", bad.clone())).await;
    let denied = response(&reply);
    assert_eq!(denied["allowed"], false);
    let status = &denied["status"];
    assert_eq!((&status["code"], &status["reason"]), (&json!(422), &json!("Invalid")));
    let embedded = site.world.post(&user("editor"), crate::world::VMS, &bad).await;
    assert_eq!(status["message"], embedded.body["message"]);
    assert_eq!(status["details"], embedded.body["details"]);
    assert!(status["details"]["causes"].as_array().unwrap().len() >= 3, "{status}");

    // By who writes: an owner record is nobody's but Godwit's.
    site.world.instance("a", "Running").await;
    let old = site.world.get(&format!("{VMIS}/a")).await;
    let mut new = old.clone();
    new["spec"]["terminationGracePeriodSeconds"] = 7.into();
    let ask = |by: &str| review("UPDATE", "virtualmachineinstances", new.clone(), old.clone(), by);
    let reply = site.webhook("/validate", &ask("jane")).await;
    assert_eq!(response(&reply)["status"]["code"], 403);
    let own = "system:serviceaccount:kubevirt:godwit-controller";
    assert_eq!(response(&site.webhook("/validate", &ask(own)).await)["allowed"], true);
    let record = json!({
        "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord", "metadata": {"name": "a"},
    });
    for (by, allowed) in
        [("jane", false), ("system:serviceaccount:kube-system:namespace-controller", true)]
    {
        let delete = review("DELETE", "ownerrecords", Value::Null, record.clone(), by);
        assert_eq!(response(&site.webhook("/validate", &delete).await)["allowed"], allowed, "{by}");
    }
    let mut status = review(
        "UPDATE",
        "virtualmachineinstances",
        new.clone(),
        old.clone(),
        "system:godwit:handler:n2",
    );
    status["request"]["subResource"] = "status".into();
    assert_eq!(response(&site.webhook("/validate", &status).await)["allowed"], false);
    status["request"]["userInfo"]["username"] = "system:godwit:handler:n1".into();
    assert_eq!(response(&site.webhook("/validate", &status).await)["allowed"], true);
    // An administrator is warned.
    let mut master = ask("root");
    master["request"]["userInfo"]["groups"] = json!(["system:masters"]);
    let reply = site.webhook("/validate", &master).await;
    assert!(response(&reply)["warnings"][0].as_str().unwrap().contains("spec"), "{}", reply.body);
}

#[tokio::test]
async fn what_is_no_review_is_a_bad_request_and_nothing_is_too_large_to_be_refused() {
    let site = Site::new().await;
    let good = create("virtualmachines", vm());
    let with = |path: &str, value: Value| {
        let mut review = good.clone();
        *review.pointer_mut(path).unwrap() = value;
        review.to_string()
    };
    let wrong = [
        String::new(),
        "{".into(),
        "[]".into(),
        "null".into(),
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}).to_string(),
        with("/apiVersion", json!("admission.k8s.io/v1beta1")),
        with("/kind", json!("Review")),
        with("/request", json!(["uid", {"group": "", "resource": ""}])),
        with("/request/uid", json!(7)),
        with("/request/resource", json!("virtualmachines")),
        with("/request/namespace", json!("../../../api/v1/namespaces/x")),
    ];
    for body in wrong {
        for path in ["/mutate", "/validate"] {
            let reply = site.send(None, Method::POST, path, &[], body.clone()).await.unwrap();
            assert_eq!(reply.code, 400, "{path} {body}: {}", reply.body);
            assert_eq!(reply.body["kind"], "Status");
        }
    }
    let huge = format!("\"{}\"", "x".repeat(9 << 20));
    // The connection may end before all of it was sent.
    let reply = site.send(None, Method::POST, "/mutate", &[], huge).await;
    assert!(reply.is_none_or(|reply| reply.code == 413));
    // Objects of any shape are answered.
    for object in [json!(7), json!([]), json!({"metadata": 7, "spec": []})] {
        let body = with("/request/object", object);
        for path in ["/mutate", "/validate"] {
            let reply = site.send(None, Method::POST, path, &[], body.clone()).await.unwrap();
            assert_eq!(reply.code, 200, "{path} {body}");
        }
    }
}
