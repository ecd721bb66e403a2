//! `godwit deploy`: the manifests that put Godwit on a Kubernetes cluster.

use crate::{cli, host, rights};
use anyhow::Result;
use api::NAMESPACE;
use api::kubevirt::SYNCHRONIZATION_PORT;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use channel::identity::Ca;
use controllers::synchronizer::NAME as LINK;
use serde_json::{Value, json};
use std::io::Write;
use std::process::ExitCode;
use uuid::Uuid;
use webapi::registration::{PORT, SERVICE};

/// The Secret with Godwit's CA.
const SECRET: &str = "godwit-ca";
/// Where pods have it.
const CA: &str = "/etc/godwit/ca";
/// The handlers' folder, on the node and in their pods.
const FOLDER: &str = "/var/run/godwit";
/// The API role's port in its pods.
const LISTEN: u16 = 8443;
/// Where the synchronizer has its identity.
const IDENTITY: &str = "/run/godwit";
/// The handlers' gateway, on every node.
const GATEWAY: u16 = 8186;

/// Prints them.
///
/// # Errors
/// When the CA cannot be used, or nothing can be printed.
pub fn print(arguments: &cli::Deploy) -> Result<ExitCode> {
    let ca = match &arguments.ca {
        Some(folder) => host::authority(folder, &arguments.cluster)?,
        None => Ca::create(&arguments.cluster)?,
    };
    let mut out = std::io::stdout().lock();
    for object in manifests(arguments, &ca) {
        writeln!(out, "---\n{}", serde_saphyr::to_string(&object)?.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// All objects, in the order in which they are needed.
fn manifests(arguments: &cli::Deploy, ca: &Ca) -> Vec<Value> {
    let networks = &arguments.migration_network;
    let advertise = arguments.advertise.as_deref();
    let deployment = Deployment { image: &arguments.image, networks, advertise, ca };
    let mut all = vec![json!({
        "apiVersion": "v1", "kind": "Namespace",
        // Handlers see the node's processes and network.
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    })];
    all.extend(api::crds());
    all.extend(roles());
    all.push(deployment.secret());
    all.push(service());
    all.push(link());
    all.extend([deployment.api(), deployment.controller(), deployment.handler()]);
    all.push(deployment.synchronizer());
    all.push(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
        "metadata": {"name": "kubevirt", "namespace": NAMESPACE},
        "spec": {
            "configuration": {"vmRolloutStrategy": "LiveUpdate"},
            "workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]},
        },
    }));
    all
}

fn roles() -> Vec<Value> {
    let mut all = webapi::roles();
    all.extend(webapi::bindings());
    all.extend([rights::controller(), rights::handler(), rights::api(), rights::synchronizer()]);
    for part in [rights::CONTROLLER, rights::HANDLER, rights::API, rights::SYNCHRONIZER] {
        let account = rights::account(part);
        all.push(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": account["name"], "namespace": NAMESPACE},
        }));
        all.push(rights::bind(part, account));
    }
    all.push(rights::asks_who_aggregates());
    all.push(rights::leads());
    all.push(rights::bind_leads());
    all.push(rights::believes());
    all.push(rights::bind_believes(rights::account(rights::HANDLER)));
    all
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": NAMESPACE, "labels": labels(SERVICE)},
        "spec": {
            "selector": {"kubevirt.io": SERVICE},
            "ports": [{"name": "https", "port": PORT, "targetPort": LISTEN, "protocol": "TCP"}],
        },
    })
}

/// Where other clusters find the synchronizer. Controllers see to its port.
fn link() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": LINK, "namespace": NAMESPACE, "labels": labels(LINK)},
        "spec": {
            "type": "LoadBalancer",
            "selector": {"kubevirt.io": LINK},
            "ports": [{"name": "link", "port": SYNCHRONIZATION_PORT, "protocol": "TCP"}],
        },
    })
}

fn labels(name: &str) -> Value {
    json!({"kubevirt.io": name, "app.kubernetes.io/managed-by": "godwit"})
}

/// What is run, and who vouches for it.
struct Deployment<'a> {
    image: &'a str,
    networks: &'a [String],
    advertise: Option<&'a str>,
    ca: &'a Ca,
}

impl Deployment<'_> {
    fn secret(&self) -> Value {
        let (certificate, key) = (self.ca.certificate_pem(), self.ca.key_pem());
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {"name": SECRET, "namespace": NAMESPACE},
            "data": {"ca.crt": STANDARD.encode(certificate), "ca.key": STANDARD.encode(key)},
        })
    }

    /// A workload; its pods are replaced when the CA is.
    fn workload(&self, kind: &str, name: &str, mut pod: Value) -> Value {
        let ca = Uuid::new_v5(&Uuid::NAMESPACE_OID, self.ca.certificate_pem().as_bytes());
        pod["priorityClassName"] = "system-cluster-critical".into();
        json!({
            "apiVersion": "apps/v1", "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels(name)},
            "spec": {
                "selector": {"matchLabels": {"kubevirt.io": name}},
                "template": {
                    "metadata": {"labels": labels(name), "annotations": {"godwit.dev/ca": ca}},
                    "spec": pod,
                },
            },
        })
    }

    fn container(&self, name: &str, command: Value) -> Value {
        json!({
            "name": name, "image": self.image, "command": command,
            // A user of its own could not read the CA's key: that is closed to all but its owner.
            "securityContext": {
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        })
    }

    fn api(&self) -> Value {
        let listen = format!("0.0.0.0:{LISTEN}");
        let command = json!(["godwit", "api", "--listen", listen, "--identity", CA]);
        let mut container = self.container(SERVICE, command);
        container["ports"] = json!([{"name": "https", "containerPort": LISTEN}]);
        container["volumeMounts"] = mounts();
        container["readinessProbe"] =
            json!({"httpGet": {"scheme": "HTTPS", "port": LISTEN, "path": "/healthz"}});
        let pod = json!({
            "serviceAccountName": "godwit-api", "containers": [container], "volumes": [volume()],
        });
        let mut workload = self.workload("Deployment", SERVICE, pod);
        workload["spec"]["replicas"] = 2.into();
        workload
    }

    fn controller(&self) -> Value {
        let name = "virt-controller";
        let ca = format!("{CA}/ca.crt");
        let command = json!(["godwit", "controller", "--image", self.image, "--ca", ca]);
        let mut container = self.container(name, command);
        // Its key is none of theirs.
        container["volumeMounts"] = json!([mount("ca.crt")]);
        let pod = json!({
            "serviceAccountName": "godwit-controller", "containers": [container],
            "volumes": [volume()],
        });
        let mut workload = self.workload("Deployment", name, pod);
        workload["spec"]["replicas"] = 2.into();
        workload
    }

    /// One, or none: controllers see to that. Its identity is made before it, as handlers' are.
    fn synchronizer(&self) -> Value {
        let folder = json!({"name": "identity", "mountPath": IDENTITY});
        let instance = synchronizer::INSTANCE;
        let issue =
            json!(["godwit", "host", IDENTITY, "--ca", CA, "--name", instance, "--synchronizer"]);
        let mut init = self.container("identity", issue);
        init["volumeMounts"] = json!([mount("ca.crt"), mount("ca.key"), folder]);
        let (option, place) = self.advertise.map_or(("--service", LINK), |at| ("--advertise", at));
        let identity = format!("{IDENTITY}/identity");
        let command = json!(["godwit", "synchronizer", "--identity", identity, option, place]);
        let mut container = self.container(LINK, command);
        container["volumeMounts"] = json!([folder]);
        let pod = json!({
            "serviceAccountName": "godwit-synchronizer",
            "initContainers": [init], "containers": [container],
            "volumes": [volume(), {"name": "identity", "emptyDir": {"medium": "Memory"}}],
        });
        let mut workload = self.workload("Deployment", LINK, pod);
        // N.B. there are never two: both would write the same objects.
        workload["spec"]["strategy"] = json!({"type": "Recreate"});
        workload
    }

    /// Its identity is made before it, so that the CA's key is not where guests' files are read.
    fn handler(&self) -> Value {
        let name = "virt-handler";
        let node = json!([
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
        ]);
        let folder = json!({"name": "godwit", "mountPath": FOLDER});
        let issue = json!(["godwit", "host", FOLDER, "--ca", CA, "--name", "$(NODE)"]);
        let mut init = self.container("identity", issue);
        init["env"] = node.clone();
        init["volumeMounts"] = mounts();
        if let Some(mounts) = init["volumeMounts"].as_array_mut() {
            mounts.push(folder.clone());
        }
        let mut command = json!([
            "godwit",
            "handler",
            "--node",
            "$(NODE)",
            "--folder",
            FOLDER,
            "--listen",
            format!("$(ADDRESS):{GATEWAY}"),
            "--identity",
            format!("{FOLDER}/identity"),
            "--device-plugins",
            kubelet::FOLDER,
        ]);
        if let Some(words) = command.as_array_mut() {
            let options = self.networks.iter().flat_map(|network| ["--migration-network", network]);
            words.extend(options.map(Value::from));
        }
        let mut container = self.container(name, command);
        container["env"] = node;
        container["securityContext"] = json!({"privileged": true});
        let mut shared = folder;
        shared["mountPropagation"] = "Bidirectional".into();
        let devices = json!({"name": "devices", "mountPath": kubelet::FOLDER});
        container["volumeMounts"] = json!([shared, devices]);
        let pod = json!({
            "serviceAccountName": "godwit-handler", "hostPID": true, "hostNetwork": true,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "tolerations": [{"operator": "Exists"}],
            "initContainers": [init], "containers": [container],
            "volumes": [
                volume(),
                {"name": "godwit", "hostPath": {"path": FOLDER, "type": "DirectoryOrCreate"}},
                // Where the kubelet has another, guests can be emulated: the handler has to begin.
                {"name": "devices", "hostPath": {"path": kubelet::FOLDER, "type": "DirectoryOrCreate"}},
            ],
        });
        let mut workload = self.workload("DaemonSet", name, pod);
        workload["spec"]["template"]["spec"]["priorityClassName"] = "system-node-critical".into();
        workload
    }
}

fn volume() -> Value {
    json!({"name": "ca", "secret": {"secretName": SECRET, "defaultMode": 0o400}})
}

/// One file by itself: in a folder it would be a link, which is not followed.
fn mount(file: &str) -> Value {
    json!({"name": "ca", "mountPath": format!("{CA}/{file}"), "subPath": file, "readOnly": true})
}

fn mounts() -> Value {
    json!([mount("ca.crt"), mount("ca.key")])
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::Parser;
    use controllers::FOLDERS;

    fn containers(objects: &[Value]) -> Vec<Value> {
        let specs = objects.iter().map(|object| &object["spec"]["template"]["spec"]);
        let lists = specs.flat_map(|spec| [&spec["initContainers"], &spec["containers"]]);
        lists.filter_map(Value::as_array).flatten().cloned().collect()
    }

    fn asked() -> cli::Deploy {
        let words = [
            "godwit",
            "deploy",
            "--image",
            "example.org/godwit:1",
            "--migration-network",
            "moves=eth1",
        ];
        match cli::Arguments::try_parse_from(words).unwrap().command {
            cli::Command::Deploy(asked) => asked,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_object_survives_yaml_and_is_named_once() {
        let ca = Ca::create("test").unwrap();
        let all = manifests(&asked(), &ca);
        let mut seen = std::collections::BTreeSet::new();
        for object in &all {
            let text = serde_saphyr::to_string(object).unwrap();
            let read: Value = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(&read, object);
            let name = &object["metadata"]["name"];
            assert!(seen.insert(format!("{} {name}", object["kind"])), "{name} is there twice");
        }
        for container in containers(&all) {
            assert_eq!(container["image"], "example.org/godwit:1");
        }
    }

    #[test]
    fn what_pods_run_is_what_the_command_line_takes() {
        let ca = Ca::create("test").unwrap();
        let (mut image, mut networks, mut services) = (None, Vec::new(), Vec::new());
        for container in containers(&manifests(&asked(), &ca)) {
            let words = container["command"].as_array().unwrap().iter();
            // As the kubelet fills them in.
            let words = words.map(|word| {
                let word = word.as_str().unwrap();
                word.replace("$(NODE)", "node").replace("$(ADDRESS)", "192.0.2.1")
            });
            let arguments = cli::Arguments::try_parse_from(words).unwrap();
            match arguments.command {
                cli::Command::Controller(controller) => image = Some(controller.image),
                cli::Command::Handler(handler) => networks = handler.migration_network,
                cli::Command::Synchronizer(one) => services.push(one.service),
                _ => {}
            }
        }
        // The pods that it makes are of the same.
        assert_eq!(image.as_deref(), Some("example.org/godwit:1"));
        assert_eq!(networks, ["moves=eth1"]);
        assert_eq!(services, [Some(LINK.to_owned())]);
    }

    /// Both have it from the node: in another place neither would find the other.
    #[test]
    fn launchers_have_their_folders_where_the_handler_looks_for_them() {
        assert_eq!(std::path::Path::new(FOLDER).join("pods"), std::path::Path::new(FOLDERS));
    }

    #[test]
    fn the_ca_of_the_secret_is_one() {
        let ca = Ca::create("test").unwrap();
        let secret = Deployment { image: "", networks: &[], advertise: None, ca: &ca }.secret();
        let text = |file: &str| {
            let bytes = STANDARD.decode(secret["data"][file].as_str().unwrap()).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        let read = Ca::from_pem(&text("ca.crt"), &text("ca.key")).unwrap();
        assert_eq!(read.cluster(), "test");
    }
}
