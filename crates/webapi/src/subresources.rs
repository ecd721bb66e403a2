//! What is done to VMs: `subresources.kubevirt.io`.

mod console;
mod guest;
mod lifecycle;
mod migration;
mod preflight;

use crate::{Act, WebApi, failure, is_name};
use api::SUBRESOURCES;
use api::instancetype::{self, What};
use api::vm::VirtualMachine;
use api::vmi::VirtualMachineInstance;
use apiserver::body::{self, Answer};
use apiserver::extension::Request;
use apiserver::status::{Failure, Subject};
use bytes::Bytes;
use http::{Method, StatusCode};
use kube::Api;
use kube::api::PatchParams;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub use console::Consoles;

/// All versions are the same.
pub const VERSIONS: [&str; 2] = ["v1", "v1alpha3"];
/// Options are a few words.
const MOST: usize = 64 << 10;
/// Tries of a write that others always outrun.
pub const TRIES: u64 = 16;

const VM: &str = "virtualmachines";
const VMI: &str = "virtualmachineinstances";

const UPDATE: &str = "update";
const GET: &str = "get";

/// What is served: resource, subresource, verb, and an example of its body.
const SERVED: [(&str, &str, &str, &str); 15] = [
    (VM, "start", UPDATE, r#"{"paused": true, "dryRun": ["All"]}"#),
    (VM, "stop", UPDATE, r#"{"gracePeriod": 30, "dryRun": ["All"]}"#),
    (VM, "restart", UPDATE, r#"{"gracePeriodSeconds": 0, "dryRun": ["All"]}"#),
    (VM, "migrate", UPDATE, r#"{"addedNodeSelector": {"LABEL": "VALUE"}, "dryRun": ["All"]}"#),
    (
        VM,
        "preflight",
        UPDATE,
        r#"{"addedNodeSelector": {"LABEL": "VALUE"}, "storageClass": "CLASS"}"#,
    ),
    (VM, "evacuate/cancel", UPDATE, r#"{"evacuationNodeName": "NODE", "dryRun": ["All"]}"#),
    (VM, "expand-spec", GET, ""),
    (VMI, "pause", UPDATE, r#"{"dryRun": ["All"]}"#),
    (VMI, "unpause", UPDATE, r#"{"dryRun": ["All"]}"#),
    (VMI, "reset", UPDATE, r#"{"dryRun": ["All"]}"#),
    (VMI, "softreboot", UPDATE, r#"{"dryRun": ["All"]}"#),
    (VMI, "evacuate/cancel", UPDATE, r#"{"evacuationNodeName": "NODE", "dryRun": ["All"]}"#),
    (VMI, "console", GET, ""),
    ("version", "", GET, ""),
    ("healthz", "", GET, ""),
];

/// What is served of a group and version, as discovery has it.
pub fn resources(group: &str, version: &str) -> Option<Vec<Value>> {
    let served = group == SUBRESOURCES && VERSIONS.contains(&version);
    let entry = |(resource, sub, verb, _): &(&str, &str, &str, &str)| {
        let name = [*resource, *sub].into_iter().filter(|part| !part.is_empty());
        json!({
            "name": name.collect::<Vec<_>>().join("/"), "singularName": "", "kind": "",
            "namespaced": !sub.is_empty(), "verbs": [verb],
        })
    };
    served.then(|| SERVED.iter().map(entry).collect())
}

/// Bodies of all requests.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Options {
    paused: bool,
    grace_period: Option<i64>,
    grace_period_seconds: Option<i64>,
    added_node_selector: BTreeMap<String, String>,
    evacuation_node_name: Option<String>,
    storage_class: Option<String>,
    dry_run: Option<Vec<String>>,
}

impl Options {
    fn parse(sent: &Bytes, example: &str) -> Result<Self, Failure> {
        if sent.len() > MOST {
            return Err(Failure::too_large(MOST));
        }
        if sent.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let wrong = |why: &dyn std::fmt::Display| {
            Failure::bad_request(format!(
                "the body is none that is expected, like {example}: {why}"
            ))
        };
        let options = match serde_json::from_slice(sent).map_err(|error| wrong(&error))? {
            Value::Null => Self::default(),
            // A list would be taken for the fields in their order.
            Value::Object(fields) => {
                serde_json::from_value(Value::Object(fields)).map_err(|error| wrong(&error))?
            }
            _ => return Err(wrong(&"it is no object")),
        };
        if options.dry_run.iter().flatten().any(|word| word != "All") {
            return Err(wrong(&"dryRun is [\"All\"], or is left out"));
        }
        for grace in [options.grace_period, options.grace_period_seconds].into_iter().flatten() {
            if grace < 0 {
                return Err(wrong(&"a grace period is not negative"));
            }
        }
        Ok(options)
    }

    fn is_dry(&self) -> bool {
        self.dry_run.iter().flatten().next().is_some()
    }

    fn patch(&self) -> PatchParams {
        PatchParams { dry_run: self.is_dry(), ..PatchParams::default() }
    }
}

/// The VM or VMI that a request is for.
struct Target<'a> {
    web: &'a WebApi,
    namespace: &'a str,
    name: &'a str,
    resource: &'a str,
}

impl Target<'_> {
    fn vms(&self) -> Api<VirtualMachine> {
        Api::namespaced(self.web.client.clone(), self.namespace)
    }

    fn vmis(&self) -> Api<VirtualMachineInstance> {
        Api::namespaced(self.web.client.clone(), self.namespace)
    }

    async fn vm(&self) -> Result<VirtualMachine, Failure> {
        self.vms().get(self.name).await.map_err(failure)
    }

    async fn vmi(&self) -> Result<VirtualMachineInstance, Failure> {
        self.vmis().get(self.name).await.map_err(failure)
    }

    /// 409: it is not such that this can be done.
    fn conflict(&self, why: &str) -> Failure {
        let what = Subject { group: api::KUBEVIRT, kind: self.resource, name: self.name };
        Failure::conflict(what, why)
    }
}

/// Answers a request. Its sender may make it.
pub async fn serve(web: &WebApi, request: Request) -> Result<Answer, Failure> {
    let Request { path, head, body: sent, .. } = request;
    let served = SERVED.iter().find(|(r, s, ..)| *r == path.resource && *s == path.subresource);
    let (resource, subresource, verb, example) = *served.ok_or_else(Failure::no_such_path)?;
    if (verb == UPDATE) != (head.method == Method::PUT)
        || (verb == GET && head.method != Method::GET)
    {
        return Err(Failure::no_such_verb());
    }
    match resource {
        "version" => return Ok(body::json(StatusCode::OK, &version())),
        "healthz" => {
            let page = json!({"apiserver": {"connectivity": "ok", "version": version()}});
            return Ok(body::json(StatusCode::OK, &page));
        }
        // What is no name would lead our own requests elsewhere.
        _ if !is_name(&path.namespace) || !is_name(&path.name) => {
            return Err(Failure::no_such_path());
        }
        _ => {}
    }
    let target = Target { web, namespace: &path.namespace, name: &path.name, resource };
    let options = Options::parse(&sent, example)?;
    match subresource {
        "start" => lifecycle::start(&target, &options).await,
        "stop" => lifecycle::stop(&target, &options).await,
        "restart" => lifecycle::restart(&target, &options).await,
        "migrate" => migration::migrate(&target, &options).await,
        "preflight" => preflight::look(&target, &options).await,
        "evacuate/cancel" => migration::stay(&target, &options).await,
        "expand-spec" => expanded(&target).await,
        "pause" => guest::act(&target, &options, Act::Pause).await,
        "unpause" => guest::act(&target, &options, Act::Unpause).await,
        "reset" => guest::act(&target, &options, Act::Reset).await,
        "softreboot" => guest::act(&target, &options, Act::SoftReboot).await,
        "console" => console::open(&target, head).await,
        _ => Err(Failure::no_such_path()),
    }
}

/// It will be done. As KubeVirt says it: without a word.
fn accepted() -> Answer {
    body::answer(StatusCode::ACCEPTED, "application/json", Bytes::new())
}

/// A VM with all that it takes in its template, as it is made its VMI of.
async fn expanded(target: &Target<'_>) -> Result<Answer, Failure> {
    let (namespace, name) = (target.namespace, target.name);
    let path = format!("/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{name}");
    let request = http::Request::get(path).body(Vec::new());
    let request = request.map_err(|error| Failure::internal(error.to_string()))?;
    let mut vm: Value = target.web.client.request(request).await.map_err(failure)?;
    let taken = target.web.taken(namespace, &vm).await?;
    let (spec, _) =
        api::support::parse(&vm["spec"]).map_err(|misfit| target.conflict(&misfit.to_string()))?;
    let expanded = instancetype::template(&spec, &taken);
    let expanded = expanded.map_err(|trouble| target.conflict(&trouble.message))?;
    vm["spec"]["template"]["spec"] = expanded.spec;
    if !expanded.annotations.is_empty() {
        vm["spec"]["template"]["metadata"]["annotations"] = json!(expanded.annotations);
    }
    if let Some(spec) = vm["spec"].as_object_mut() {
        spec.retain(|field, _| What::ALL.iter().all(|what| what.field() != field));
    }
    Ok(body::json(StatusCode::OK, &vm))
}

fn version() -> Value {
    json!({
        "gitVersion": format!("v{}", apiserver::VERSION), "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "", "goVersion": "", "compiler": "rustc",
        "platform": format!("linux/{}", apiserver::ARCHITECTURE),
    })
}
