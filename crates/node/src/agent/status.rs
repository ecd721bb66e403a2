//! A pod's status, as the kubelet tells it: a pure function of what is seen of it.

use super::command::Place;
use super::machine::{Contained, Seen, State, again, overdue};
use super::record::Exit;
use crate::scheduler::resources::is_sidecar;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// How containers are named: by pod and run.
const SCHEME: &str = "godwit://";

/// The status to tell.
pub fn status(pod: &Pod, seen: &Seen, place: &Place) -> PodStatus {
    let Some(spec) = &pod.spec else { return PodStatus::default() };
    let before = pod.status.clone().unwrap_or_default();
    let phase = phase(pod, spec, seen);
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    let initialized = initialized(spec, seen);
    let of = |all: &[Container]| -> Vec<ContainerStatus> {
        all.iter().map(|container| one(pod, container, seen, initialized, inits)).collect()
    };
    let (containers, inits_told) = (of(&spec.containers), of(inits));
    let late = overdue(pod, seen).is_some_and(|due| due <= seen.now) && phase == "Failed";
    PodStatus {
        conditions: Some(conditions(pod, seen, &phase, initialized, &containers)),
        container_statuses: Some(containers),
        init_container_statuses: (!inits.is_empty()).then_some(inits_told),
        host_ip: Some(place.host_ip.clone()),
        host_ips: Some(vec![HostIP { ip: place.host_ip.clone() }]),
        pod_ip: Some(place.pod_ip.clone()),
        pod_ips: Some(vec![PodIP { ip: place.pod_ip.clone() }]),
        reason: if late { Some("DeadlineExceeded".into()) } else { before.reason },
        message: if late {
            Some("Pod was active on the node longer than the specified deadline".into())
        } else {
            before.message
        },
        start_time: before.start_time.or(Some(Time(seen.since))),
        phase: Some(phase),
        ..PodStatus::default()
    }
}

/// Whether all init containers have done their work.
fn initialized(spec: &PodSpec, seen: &Seen) -> bool {
    spec.init_containers.iter().flatten().all(|container| {
        seen.containers.get(&container.name).is_some_and(|found| match is_sidecar(container) {
            true => found.started && found.runs(),
            false => found.exit().is_some_and(|exit| exit.code == 0),
        })
    }) || spec
        .containers
        .iter()
        .any(|c| seen.containers.get(&c.name).is_some_and(|found| found.state != State::New))
}

fn phase(pod: &Pod, spec: &PodSpec, seen: &Seen) -> String {
    let told = pod.status.as_ref().and_then(|status| status.phase.clone());
    if matches!(told.as_deref(), Some("Succeeded" | "Failed")) {
        return told.unwrap_or_default();
    }
    let found = |container: &Container| seen.containers.get(&container.name);
    let runs = seen.containers.values().any(Contained::runs);
    let ending = pod.metadata.deletion_timestamp.is_some()
        || overdue(pod, seen).is_some_and(|due| due <= seen.now);
    let failed_init = spec.init_containers.iter().flatten().any(|container| {
        let exit = found(container).and_then(Contained::exit);
        exit.is_some_and(|exit| exit.code != 0 && !again(spec, container, true, exit))
    });
    let over = spec.containers.iter().all(|container| {
        let exit = found(container).and_then(Contained::exit);
        exit.is_some_and(|exit| !again(spec, container, false, exit))
    });
    if !runs && (ending || failed_init || over) {
        let well = !failed_init
            && spec
                .containers
                .iter()
                .all(|c| found(c).and_then(Contained::exit).is_some_and(|exit| exit.code == 0));
        return if well { "Succeeded" } else { "Failed" }.into();
    }
    let begun = spec.containers.iter().any(|c| found(c).is_some_and(|f| f.state != State::New));
    if begun { "Running" } else { "Pending" }.into()
}

fn terminated(id: String, at: Timestamp, exit: &Exit) -> ContainerStateTerminated {
    ContainerStateTerminated {
        container_id: Some(id),
        exit_code: exit.code,
        signal: exit.signal,
        reason: Some(exit.reason.clone()),
        message: Some(exit.message.clone()).filter(|text| !text.is_empty()),
        started_at: Some(Time(at)),
        finished_at: Some(Time(exit.at)),
    }
}

fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: Some(reason.into()), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn one(
    pod: &Pod,
    container: &Container,
    seen: &Seen,
    initialized: bool,
    inits: &[Container],
) -> ContainerStatus {
    let new = Contained::default();
    let found = seen.containers.get(&container.name).unwrap_or(&new);
    let is_init = inits.iter().any(|init| init.name == container.name);
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let id = |attempt: u32| format!("{SCHEME}{uid}/{}/{attempt}", container.name);
    let state = match &found.state {
        State::Running(at) => ContainerState {
            running: Some(ContainerStateRunning { started_at: Some(Time(*at)) }),
            ..ContainerState::default()
        },
        State::Ended(at, exit) if !is_waiting(pod, container, found, is_init, exit) => {
            ContainerState {
                terminated: Some(terminated(id(found.attempt), *at, exit)),
                ..ContainerState::default()
            }
        }
        _ => why_waiting(pod, container, found, initialized, is_init),
    };
    // What waits to be run again has its last end told as such.
    let last = match &found.state {
        State::Ended(at, exit) if state.waiting.is_some() => Some((*at, exit, found.attempt)),
        _ => found.before.as_ref().map(|(at, exit)| (*at, exit, found.attempt.saturating_sub(1))),
    };
    let last = last.map(|(at, exit, attempt)| ContainerState {
        terminated: Some(terminated(id(attempt), at, exit)),
        ..ContainerState::default()
    });
    let done = is_init && !is_sidecar(container);
    let ready = match done {
        true => found.exit().is_some_and(|exit| exit.code == 0),
        false => found.runs() && found.started && found.ready,
    };
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: if found.state == State::New {
            String::new()
        } else {
            container.image.clone().unwrap_or_default()
        },
        container_id: (found.state != State::New).then(|| id(found.attempt)),
        ready,
        started: Some(found.runs() && found.started),
        restart_count: i32::try_from(found.attempt).unwrap_or(i32::MAX),
        state: Some(state),
        last_state: last,
        ..ContainerStatus::default()
    }
}

/// Whether a container that ended waits to be run again, and is not just between two runs.
fn is_waiting(
    pod: &Pod,
    container: &Container,
    found: &Contained,
    init: bool,
    exit: &Exit,
) -> bool {
    let goes =
        pod.metadata.deletion_timestamp.is_some() || crate::scheduler::snapshot::has_ended(pod);
    let spec = pod.spec.as_ref();
    !goes && spec.is_some_and(|spec| again(spec, container, init, exit)) && found.pause() > 0
}

fn why_waiting(
    pod: &Pod,
    container: &Container,
    found: &Contained,
    initialized: bool,
    is_init: bool,
) -> ContainerState {
    if let Some(((reason, text), _, times)) = &found.refused {
        let image = container.image.as_deref().unwrap_or_default();
        // Told as the kubelet does, which pulls only now and then.
        if *reason == "ErrImagePull" && *times > 1 {
            let text = format!("Back-off pulling image {image:?}: ErrImagePull: {text}");
            return waiting("ImagePullBackOff", Some(text));
        }
        return waiting(reason, Some(text.clone()));
    }
    if matches!(found.state, State::Ended(..)) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let text = format!(
            "back-off {}s restarting failed container={} pod={name}_{namespace}({uid})",
            found.pause(),
            container.name
        );
        return waiting("CrashLoopBackOff", Some(text));
    }
    waiting(if initialized || is_init { "ContainerCreating" } else { "PodInitializing" }, None)
}

fn conditions(
    pod: &Pod,
    seen: &Seen,
    phase: &str,
    initialized: bool,
    containers: &[ContainerStatus],
) -> Vec<PodCondition> {
    let told: Vec<PodCondition> =
        pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let closed: Vec<&str> = gates
        .map(|gate| &*gate.condition_type)
        .filter(|gate| !told.iter().any(|c| c.type_ == *gate && c.status == "True"))
        .collect();
    let unready: Vec<&str> =
        containers.iter().filter(|c| !c.ready).map(|c| c.name.as_str()).collect();
    let ended = matches!(phase, "Succeeded" | "Failed");
    let (why, text) = match phase {
        "Succeeded" => ("PodCompleted", None),
        "Failed" => ("PodFailed", None),
        _ => {
            let list = unready.join(" ");
            ("ContainersNotReady", Some(format!("containers with unready status: [{list}]")))
        }
    };
    let all_ready = unready.is_empty() && !ended;
    let gate = (
        "ReadinessGatesNotReady",
        closed.first().map(|gate| {
            format!("corresponding condition of pod readiness gate {gate:?} does not exist or is not True.")
        }),
    );
    let condition = |name: &str, holds: bool, (reason, message): (&str, Option<String>)| {
        let status = if holds { "True" } else { "False" };
        let same = told.iter().find(|c| c.type_ == name && c.status == status);
        let since = same.and_then(|c| c.last_transition_time.clone());
        PodCondition {
            type_: name.into(),
            status: status.into(),
            reason: (!holds).then(|| reason.into()),
            message: message.filter(|_| !holds),
            last_transition_time: since.or(Some(Time(seen.now))),
            ..PodCondition::default()
        }
    };
    let incomplete = || ("ContainersNotInitialized", None);
    let ready = match all_ready {
        true => condition("Ready", closed.is_empty(), gate),
        false => condition("Ready", false, (why, text.clone())),
    };
    vec![
        condition("PodReadyToStartContainers", !ended, ("", None)),
        condition("Initialized", initialized || phase == "Succeeded", incomplete()),
        condition("ContainersReady", all_ready, (why, text)),
        ready,
    ]
}
