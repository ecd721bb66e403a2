//! OwnerRecord: who may run a VM. One for each, made at its first start, and outliving its VMIs.
//!
//! Its status is `handover`'s record and what is known of the owner's end. It is changed by
//! handlers only, each change a compare-and-swap on what was read.

use handover::record::{AttemptId, HostId, InstanceId, Move, Record, State, VmId};
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Of what.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "godwit.dev",
    version = "v1alpha1",
    kind = "OwnerRecord",
    plural = "ownerrecords",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(default)]
pub struct Spec {
    /// The VM, as launchers know it.
    pub vm: String,
}

/// Who may run it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The number of the owner's time; it only grows.
    pub epoch: u64,
    /// A launcher's life.
    pub owner: String,
    /// `idle`, `armed`, `committed`, `expected`, `returned`.
    pub state: String,
    /// Of any state but `idle`.
    #[serde(rename = "move", skip_serializing_if = "Option::is_none")]
    pub of: Option<MoveStatus>,
    /// The owner's node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The owner's pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The claims that are the owner's disks, by the VM's volumes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, String>,
    /// Of a guest that has left for another VMI: the attempt whose heir is known to have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrived: Option<String>,
    /// The owner of which the other end of its move was told that it has the guest: it does not give
    /// it back any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub told: Option<String>,
    /// The last owner whose QEMU was seen to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// The last heir whose QEMU was seen to end before it owned the VM.
    #[serde(rename = "heirEnded", skip_serializing_if = "Option::is_none")]
    pub heir_ended: Option<Ended>,
}

/// A move, as the record knows it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveStatus {
    /// Which attempt.
    pub attempt: String,
    /// Who is to own the VM.
    pub heir: String,
    /// The host at the other end.
    pub peer: String,
}

/// An owner whose QEMU was seen to end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ended {
    /// Which.
    pub instance: String,
    /// Where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// When it was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

impl Status {
    /// As `handover` knows it: None when nobody has owned it yet.
    ///
    /// # Errors
    /// When it is of no state that is known: then nothing may be concluded from it.
    pub fn record(&self, vm: &VmId) -> Result<Option<Record>, String> {
        if self.owner.is_empty() {
            return Ok(None);
        }
        let of = || {
            let of = self.of.clone().ok_or(format!("it is {} by no move", self.state))?;
            Ok::<Move, String>(Move {
                attempt: AttemptId(of.attempt),
                heir: InstanceId(of.heir),
                peer: HostId(of.peer),
            })
        };
        let state = match &*self.state {
            "idle" => State::Idle,
            "armed" => State::Armed(of()?),
            "committed" => State::Committed(of()?),
            "expected" => State::Expected(of()?),
            "returned" => State::Returned(of()?),
            other => return Err(format!("its state {other:?} is none that this version knows")),
        };
        let owner = InstanceId(self.owner.clone());
        Ok(Some(Record { vm: vm.clone(), epoch: self.epoch, owner, state }))
    }

    /// The same status with another record.
    pub fn with(&self, record: &Record) -> Self {
        let (state, of) = match &record.state {
            State::Idle => ("idle", None),
            State::Armed(of) => ("armed", Some(of)),
            State::Committed(of) => ("committed", Some(of)),
            State::Expected(of) => ("expected", Some(of)),
            State::Returned(of) => ("returned", Some(of)),
        };
        let of = of.map(|of| MoveStatus {
            attempt: of.attempt.to_string(),
            heir: of.heir.to_string(),
            peer: of.peer.to_string(),
        });
        Self {
            epoch: record.epoch,
            owner: record.owner.to_string(),
            state: state.into(),
            of,
            ..self.clone()
        }
    }

    /// Whether nobody runs it here for certain, nor can begin to by a move: it has never been owned, or
    /// its owner was seen to end, and so was the heir of a move that is armed or committed.
    pub fn is_over(&self) -> bool {
        match &*self.state {
            // Its owner is another VMI's.
            "expected" => self.heir_is_over(),
            "returned" if self.other_ledger().is_some() => true,
            _ => self.owner.is_empty() || self.has_ended(&self.owner) && self.heir_is_over(),
        }
    }

    /// The other record of a move between two VMIs.
    pub fn other_ledger(&self) -> Option<Ledger> {
        Ledger::parse(&HostId(self.of.as_ref()?.peer.clone()))
    }

    /// Whether the guest has left for another VMI, which runs it or is about to.
    pub fn has_left(&self) -> Option<Ledger> {
        if self.state == "committed" { self.other_ledger() } else { None }
    }

    /// Whether the guest is known to have come to the VMI for which it has left. Until then it may yet be
    /// called back: both launchers may have died between the commit and the adoption.
    pub fn has_arrived(&self) -> Option<Ledger> {
        let of = self.of.as_ref().map(|of| &of.attempt);
        self.has_left().filter(|_| self.arrived.as_ref() == of)
    }

    /// Whether the guest is this VMI's, though it has never run here: it came by a move, its QEMU ended before
    /// its first instruction, and the other end was told that it has come.
    pub fn came_and_ended(&self) -> bool {
        self.state == "idle" && self.told.as_ref() == Some(&self.owner) && self.is_over()
    }

    /// Where a guest was to go that has left, that is not known to have come there, and that does not
    /// run here any more.
    pub fn is_astray(&self) -> Option<Ledger> {
        let gone = self.has_arrived().is_none() && self.has_ended(&self.owner);
        self.has_left().filter(|_| gone)
    }

    /// Whether the guest may still come to the heir of an attempt, which nobody has decided yet.
    pub fn may_come_by(&self, attempt: &str) -> bool {
        let here = match &*self.state {
            "expected" => true,
            "armed" | "committed" => self.other_ledger().is_none(),
            _ => false,
        };
        here && self.of.as_ref().is_some_and(|of| of.attempt == attempt) && !self.is_over()
    }

    /// Whether a pod runs the guest, or may come to by the attempt for which it was made: then
    /// neither it nor its disks may be taken away.
    pub fn may_be_in(&self, pod: &str, attempt: Option<&str>) -> bool {
        attempt.is_some_and(|attempt| self.may_come_by(attempt))
            || self.pod.as_deref() == Some(pod) && !self.is_over()
    }

    /// Whether that instance was seen to end.
    pub fn has_ended(&self, instance: &str) -> bool {
        [&self.ended, &self.heir_ended].into_iter().flatten().any(|e| e.instance == instance)
    }

    /// Whether a move can be decided in an heir's favour no more.
    fn heir_is_over(&self) -> bool {
        match (&*self.state, &self.of) {
            ("expected", Some(of)) => self.has_ended(&of.heir),
            // Another VMI's heir is that one's.
            ("armed" | "committed", Some(of)) if self.other_ledger().is_none() => {
                self.has_ended(&of.heir)
            }
            _ => true,
        }
    }
}

/// A record's name in other records. A VM that stays its VMI's keeps its record wherever it moves: that
/// is at both ends of a move, and named by its cluster alone, `spiffe://east`. A guest that goes to
/// another VMI comes to another record, which is named by its VMI too: `spiffe://west/default/web`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    /// The cluster's id.
    pub cluster: String,
    /// The VMI's namespace.
    pub namespace: String,
    /// The VMI's name.
    pub name: String,
}

impl Ledger {
    /// The name of a record that is at both ends.
    pub fn shared(cluster: &str) -> HostId {
        HostId(format!("spiffe://{cluster}"))
    }

    /// This one's name.
    pub fn id(&self) -> HostId {
        HostId(format!("spiffe://{}/{}/{}", self.cluster, self.namespace, self.name))
    }

    /// Which one a name means. None: one that is at both ends.
    pub fn parse(id: &HostId) -> Option<Self> {
        let mut parts = id.0.strip_prefix("spiffe://")?.split('/').map(str::to_owned);
        let found = Self { cluster: parts.next()?, namespace: parts.next()?, name: parts.next()? };
        parts.next().is_none().then_some(found)
    }
}

/// What launchers call a VM: its namespace and name, or what begins like them where that is too
/// long for a launcher's folder.
pub fn vm_id(namespace: &str, name: &str) -> String {
    const MOST: usize = 63;
    let whole = format!("{namespace}.{name}");
    if whole.len() <= MOST {
        return whole;
    }
    let hash = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, whole.as_bytes());
    let begin: String = whole.chars().take(MOST - 33).collect();
    format!("{begin}-{}", hash.simple())
}
