//! Manifests of VMs.

use crate::cli::{CreateVm, Format};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// What a guest of that size needs, if nothing is said.
const DISK: &str = "10Gi";

/// The manifest of a VM.
///
/// # Errors
/// When what was asked for makes no sense.
pub fn manifest(arguments: &CreateVm, namespace: Option<&str>) -> Result<Value> {
    let CreateVm { name, image, memory, cpus, size, class, .. } = arguments;
    let mut disks = Vec::new();
    let mut volumes = Vec::new();
    let mut templates = Vec::new();
    let mut add = |name: &str, volume: Value| {
        disks.push(json!({"name": name, "disk": {"bus": "virtio"}}));
        volumes.push(volume);
    };
    match image.as_deref() {
        Some(image) if arguments.ephemeral => {
            let image = image.strip_prefix("docker://").unwrap_or(image);
            add("root", json!({"name": "root", "containerDisk": {"image": image}}));
        }
        image => {
            let disk = format!("{name}-root");
            let source = source(image)?;
            let mut storage =
                json!({"resources": {"requests": {"storage": size.as_deref().unwrap_or(DISK)}}});
            if let Some(class) = class {
                storage["storageClassName"] = class.as_str().into();
            }
            templates.push(json!({
                "metadata": {"name": disk}, "spec": {"source": source, "storage": storage},
            }));
            add("root", json!({"name": "root", "dataVolume": {"name": disk}}));
        }
    }
    if let Some(path) = &arguments.cloud_init {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        add("seed", json!({"name": "seed", "cloudInitNoCloud": {"userData": text}}));
    }
    let strategy = if arguments.halted { "Halted" } else { &*arguments.run_strategy };
    let mut vm = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": name},
        "spec": {
            "runStrategy": strategy,
            "template": {"spec": {
                "domain": {
                    "cpu": {"cores": cpus},
                    "memory": {"guest": memory},
                    "devices": {
                        "disks": disks,
                        "interfaces": [{"name": "default", "masquerade": {}}],
                        "rng": {},
                    },
                },
                "networks": [{"name": "default", "pod": {}}],
                "volumes": volumes,
            }},
        },
    });
    if let Some(namespace) = namespace {
        vm["metadata"]["namespace"] = namespace.into();
    }
    if !templates.is_empty() {
        vm["spec"]["dataVolumeTemplates"] = templates.into();
    }
    Ok(vm)
}

/// Where a disk's content comes from.
fn source(image: Option<&str>) -> Result<Value> {
    let Some(image) = image else { return Ok(json!({"blank": {}})) };
    if image.starts_with("http://") || image.starts_with("https://") {
        return Ok(json!({"http": {"url": image}}));
    }
    if let Some(claim) = image.strip_prefix("pvc:") {
        let Some((namespace, name)) = claim.split_once('/') else {
            bail!("--image {image}: say pvc:NAMESPACE/NAME");
        };
        return Ok(json!({"pvc": {"namespace": namespace, "name": name}}));
    }
    let name = image.strip_prefix("docker://").unwrap_or(image);
    Ok(json!({"registry": {"url": format!("docker://{name}")}}))
}

/// A manifest as text.
///
/// # Errors
/// Never, for what was made here.
pub fn text(manifest: &Value, format: Format) -> Result<String> {
    Ok(match format {
        Format::Json => format!("{}\n", serde_json::to_string_pretty(manifest)?),
        Format::Yaml => serde_saphyr::to_string(manifest)?,
    })
}
