//! VMs of an embedded cluster, as their users have them.

use crate::cluster::{Cluster, SOON};
use crate::terminal::Terminal;
use anyhow::{Context, Result, bail, ensure};
use launcher::client::Client as Launcher;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// VMs of the namespace `default`.
pub const VMS: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
/// VMIs of the namespace `default`.
pub const VMIS: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
/// Migrations of the namespace `default`.
pub const MOVES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations";
/// Pods of the namespace `default`.
pub const PODS: &str = "/api/v1/namespaces/default/pods";
/// Owner records of the namespace `default`.
pub const OWNERS: &str = "/apis/godwit.dev/v1alpha1/namespaces/default/ownerrecords";
/// Claims of the namespace `default`.
pub const CLAIMS: &str = "/api/v1/namespaces/default/persistentvolumeclaims";
/// DataVolumes of the namespace `default`.
pub const DISKS: &str = "/apis/cdi.kubevirt.io/v1beta1/namespaces/default/datavolumes";
/// The cluster's settings.
pub const SETTINGS: &str = "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts/kubevirt";

/// A VM with these volumes, each on a virtio disk, the first its root.
pub fn vm(name: &str, strategy: &str, volumes: Vec<Value>, templates: Vec<Value>) -> Value {
    let disk = |volume: &Value| json!({"name": volume["name"], "disk": {"bus": "virtio"}});
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {
            "runStrategy": strategy,
            "dataVolumeTemplates": templates,
            "template": {"spec": {
                "terminationGracePeriodSeconds": 20,
                "domain": {
                    "memory": {"guest": "128Mi"},
                    "devices": {"disks": volumes.iter().map(disk).collect::<Vec<_>>()},
                },
                "volumes": volumes,
            }},
        },
    })
}

/// A DataVolume's template, or the DataVolume, that imports an image.
pub fn import(name: &str, image: &str, storage: Value) -> Value {
    json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume", "metadata": {"name": name},
        "spec": {"source": {"registry": {"url": format!("docker://{image}")}}, "storage": storage},
    })
}

/// A VM of that name on storage that all nodes share, which runs.
///
/// # Errors
/// When it does not.
pub async fn on_shared_storage(cluster: &Cluster, name: &str, image: &str) -> Result<()> {
    let storage = json!({
        "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": "shared",
    });
    let disk = format!("{name}-root");
    let root = json!({"name": "root", "dataVolume": {"name": disk}});
    let template = import(&disk, image, storage);
    cluster.create(VMS, vm(name, "Always", vec![root], vec![template])).await?;
    cluster.until(&format!("{VMS}/{name}"), is_running).await?;
    Ok(())
}

/// The node of a VMI.
pub fn node(vmi: &Value) -> &str {
    vmi["status"]["nodeName"].as_str().unwrap_or_default()
}

/// A migration of a VMI.
pub fn migration(name: &str, vmi: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": name}, "spec": {"vmiName": vmi},
    })
}

/// Whether a VM is said to be in a state.
pub fn shows(status: &'static str) -> impl Fn(&Value) -> bool {
    move |vm| vm["status"]["printableStatus"] == status
}

/// Whether a VM is said to run.
pub fn is_running(vm: &Value) -> bool {
    shows("Running")(vm)
}

/// Whether an object has a condition that holds.
pub fn holds(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["type"] == kind && c["status"] == "True"))
}

/// Whether an object has a condition for a reason, whether it holds or not.
pub fn says(object: &Value, kind: &str, reason: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["type"] == kind && c["reason"] == reason))
}

/// Sends a signal to a process.
///
/// # Errors
/// When there is none.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("a process")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Ends a process at once.
///
/// # Errors
/// When there is none.
pub fn kill(pid: i32) -> Result<()> {
    signal(pid, Signal::KILL)
}

/// Processes that stand still, as if their machine were off, and go on when this goes.
#[derive(Debug, Default)]
pub struct Standstill(Vec<i32>);

impl Standstill {
    /// Stops them.
    ///
    /// # Errors
    /// When there is one that is not.
    pub fn of(pids: Vec<i32>) -> Result<Self> {
        let all = Self(pids);
        all.0.iter().try_for_each(|pid| signal(*pid, Signal::STOP))?;
        Ok(all)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        for pid in &self.0 {
            // One that has ended does not stand still.
            let _ = signal(*pid, Signal::CONT);
        }
    }
}

/// Whatever was killed in a move, it is settled by then.
pub const SETTLED: Duration = Duration::from_secs(120);

/// Kills the launcher of a QEMU, which goes with it.
///
/// # Errors
/// When there is none.
pub fn kill_launcher(qemu: i32) -> Result<()> {
    kill(launcher_of(qemu)?)
}

/// The launcher of a QEMU.
///
/// # Errors
/// When there is none.
pub fn launcher_of(qemu: i32) -> Result<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{qemu}/stat"))?;
    let rest = stat.rsplit_once(") ").context("no stat")?.1;
    Ok(rest.split(' ').nth(1).context("no parent")?.parse()?)
}

/// Waits until a move stands at a failpoint of a launcher.
///
/// # Errors
/// When it never does.
pub async fn until_at(launcher: &Launcher, point: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let status = launcher.status().await?;
        let of = status.migration.as_ref();
        if of.is_some_and(|of| of.failpoint.as_deref() == Some(point)) {
            return Ok(());
        }
        ensure!(began.elapsed() < SETTLED, "{point} is never come to: {of:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether a process lives.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

impl Cluster {
    /// Runs `godwit` as a person does.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn tries(&self, arguments: &[&str]) -> Result<Output> {
        let mut run = Command::new(self.program());
        run.args(arguments).arg("--kubeconfig").arg(self.path("kubeconfig"));
        Ok(run.output()?)
    }

    /// What a person does with `godwit`, and what it prints.
    ///
    /// # Errors
    /// What it says.
    pub fn does(&self, arguments: &[&str]) -> Result<String> {
        let run = self.tries(arguments)?;
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        ensure!(run.status.success(), "{arguments:?}: {said}");
        Ok(String::from_utf8_lossy(&run.stdout).into_owned())
    }

    /// Runs a command of Godwit's that is to say no, and returns what it says on stdout.
    ///
    /// # Errors
    /// When it says yes.
    pub fn refuses(&self, arguments: &[&str]) -> Result<String> {
        let run = self.tries(arguments)?;
        ensure!(!run.status.success(), "{arguments:?}: it is done");
        Ok(String::from_utf8_lossy(&run.stdout).into_owned())
    }

    /// The same, until it works.
    ///
    /// # Errors
    /// What it says last.
    pub fn does_soon(&self, arguments: &[&str]) -> Result<()> {
        let began = Instant::now();
        while let Err(error) = self.does(arguments) {
            if began.elapsed() > SOON {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// A VM's console, at its shell.
    ///
    /// # Errors
    /// When it does not come.
    pub fn terminal(&self, vm: &str) -> Result<Terminal> {
        let mut terminal = self.console(vm)?;
        terminal.wait_for_shell()?;
        Ok(terminal)
    }

    /// A VM's console, whatever it shows.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn console(&self, vm: &str) -> Result<Terminal> {
        let program = self.program().to_str().context("no text")?;
        Terminal::open(program, &self.path("kubeconfig"), vm)
    }

    /// QEMUs that run.
    ///
    /// # Errors
    /// When nobody can tell.
    pub fn qemus(&self) -> Result<Vec<i32>> {
        let is_qemu = |pid: &i32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.starts_with("qemu-system")
        };
        Ok(self.processes()?.into_iter().filter(is_qemu).collect())
    }

    /// Waits until as many QEMUs run.
    ///
    /// # Errors
    /// When they never do.
    pub fn until_qemus(&self, count: usize) -> Result<Vec<i32>> {
        let began = Instant::now();
        loop {
            let found = self.qemus()?;
            match found.len() == count {
                true => return Ok(found),
                false if began.elapsed() > SOON => bail!("{found:?} run, not {count}"),
                false => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Waits until a migration is over.
    ///
    /// # Errors
    /// When it ends otherwise than awaited.
    pub async fn until_moved(&self, migration: &str, phase: &str) -> Result<Value> {
        let over = |m: &Value| {
            let phase = m["status"]["phase"].as_str().unwrap_or_default();
            ["Succeeded", "Failed"].contains(&phase)
        };
        let path = format!("{MOVES}/{migration}");
        let found = self.until(&path, over).await?;
        if found["status"]["phase"] != phase {
            let (status, logs) = (&found["status"], self.keep_logs());
            bail!("migration {migration} is not {phase}: {status}; logs are in {}", logs.display());
        }
        Ok(found)
    }
}

/// The oracle in a guest, run from its shell: it writes to the root disk and keeps pages of memory,
/// and finds by itself what was lost of them.
pub struct Oracle<'a>(&'a mut Terminal);

impl<'a> Oracle<'a> {
    /// Begins to write and to count.
    ///
    /// # Errors
    /// When the guest does not.
    pub fn begin(terminal: &'a mut Terminal) -> Result<Self> {
        Self::begin_with(terminal, 7)
    }

    /// Begins with a seed of its own: what an earlier one has written is not taken for its.
    ///
    /// # Errors
    /// When the guest does not.
    pub fn begin_with(terminal: &'a mut Terminal, seed: u64) -> Result<Self> {
        terminal.run(&format!(
            "mkfifo /tmp/ask; oracle serve </tmp/ask >/tmp/told 2>&1 & exec 3>/tmp/ask; \
             echo 'write start dev=/dev/vda2 len=4M seed={seed} rate=100' >&3; \
             echo 'memory start mib=4' >&3; echo tick start >&3"
        ))?;
        Ok(Self(terminal))
    }

    /// The same oracle, at a console that was opened anew.
    pub fn again(terminal: &'a mut Terminal) -> Self {
        Self(terminal)
    }

    /// Has everything compared; returns how many writes were acknowledged.
    ///
    /// # Errors
    /// What was lost.
    pub fn check(&mut self) -> Result<u64> {
        const TOLD: &str = "grep -E '^(LOST|CHECK|ERR|DIED)' /tmp/told";
        let before = self.0.run(TOLD)?.lines().count();
        self.0.run("echo check >&3")?;
        let began = Instant::now();
        loop {
            let told = self.0.run(TOLD)?;
            if let Some(line) = told.lines().nth(before) {
                let fine = line.contains(" lost=0 ") && line.ends_with(" stale=0");
                ensure!(fine && line.starts_with("CHECK"), "{told}");
                let writes = line.split_once("writes=").context("no writes")?.1;
                return Ok(writes.split(' ').next().unwrap_or_default().parse()?);
            }
            ensure!(began.elapsed() < SOON, "no answer");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
