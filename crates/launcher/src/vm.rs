//! The launcher's one VM: what it does now, and how it is started and ended.

use crate::console::Console;
use crate::migration::failpoint::Failpoints;
use crate::migration::marks::Marks;
use crate::migration::ticket::Here;
use crate::migration::{self, Moving};
use crate::owner::Owner;
use crate::peers;
use crate::qemu::{self, Facts, Mode, Qemu};
use crate::spec::VmSpec;
use crate::status::{Phase, Status, Verdict, Wish, judge};
use channel::client::GatewayClient;
use channel::identity::SpiffeId;
use handover::record::{HostId, InstanceId};
use handover::start::Starter;
use mover::disk::{Disk, Medium};
use qmp::commands::{Cont, Stop, SystemPowerdown, SystemReset};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, watch};

/// A launcher that died takes its QEMU along, but not at once: it may have much memory to free.
const PREDECESSOR: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// QEMU answers these at once unless it hangs.
pub(crate) const QMP_DEADLINE: Duration = Duration::from_secs(10);

/// How a launcher is run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The host's folder; the launcher's own is `vms/<vm>` in it.
    pub host: PathBuf,
    /// The VM's name.
    pub vm: String,
    /// What paths of specs begin at: see [`VmSpec::below`].
    pub root: Option<PathBuf>,
    /// How long the guest may take to shut down when its launcher ends.
    pub grace: Duration,
    /// A command that ends in [`qemu::shim`].
    pub shim: Vec<OsString>,
    /// Whether tests may stop moves at failpoints.
    pub failpoints: bool,
    /// Faults that tests and the demo's negative controls put in.
    pub fault: migration::Fault,
}

async fn wait_until_free(disk: &Disk) -> Result<(), mover::disk::Error> {
    let until = Instant::now() + PREDECESSOR;
    while !disk.is_free()? {
        if Instant::now() > until {
            return Err(mover::disk::Error::InUse { path: disk.path().into() });
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM is in no state for it.
    #[error("VM {vm}: {why}")]
    Denied {
        /// The VM.
        vm: String,
        /// Why, and what to do.
        why: String,
    },
    /// The spec is wrong.
    #[error(transparent)]
    Spec(#[from] crate::spec::Invalid),
    /// The owner record does not allow it.
    #[error(transparent)]
    Owner(#[from] crate::owner::Error),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] mover::disk::Error),
    /// A disk's mark cannot be read.
    #[error(transparent)]
    Mark(#[from] migration::marks::Error),
    /// A disk must not be started.
    #[error("disk {disk} must not be started: {mark}; insist with --force if you know better")]
    Marked {
        /// The disk.
        disk: PathBuf,
        /// Its mark.
        mark: migration::marks::Mark,
    },
    /// A serial port's socket cannot be made.
    #[error("cannot open serial port {name}")]
    Console {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: channel::socket::Error,
    },
    /// QEMU cannot be started.
    #[error(transparent)]
    Qemu(#[from] qemu::Error),
    /// QEMU refused a command.
    #[error("QEMU refused")]
    Qmp(#[from] qmp::Error),
    /// The move cannot be begun.
    #[error(transparent)]
    Migration(#[from] migration::Error),
}

/// How a VM begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Begin {
    /// Though its disks are marked, or it has left.
    pub forced: bool,
    /// Standing still at its first instruction.
    pub paused: bool,
}

/// A guest that is here.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its QEMU.
    pub qemu: Qemu,
    /// The instance that owns it.
    pub instance: InstanceId,
    /// The instance's epoch.
    pub epoch: u64,
    /// What has changed since older epochs, for a way back.
    pub history: migration::history::History,
}

/// What a launcher holds.
#[derive(Debug, Default)]
pub struct Vm {
    /// The guest, if it is here.
    pub guest: Option<Guest>,
    /// The move that is under way.
    pub moving: Option<Moving>,
    /// What a failed move left for the next attempt.
    pub carried: Option<migration::Carried>,
    /// The guest that left from here, as it was.
    pub left: Option<VmSpec>,
    /// Serial ports, open from the first guest on.
    consoles: Vec<(String, Console)>,
}

/// A launcher.
#[derive(Debug)]
pub struct Launcher {
    /// How it is run.
    pub config: Config,
    /// Its folder.
    pub folder: PathBuf,
    /// The way to other hosts.
    pub gateway: GatewayClient,
    /// The owner record.
    pub owner: Owner,
    /// The marks on this host's disks.
    pub marks: Marks,
    /// Where tests stop moves.
    pub failpoints: Failpoints,
    /// What it holds.
    pub vm: Mutex<Vm>,
    status: watch::Sender<Status>,
}

/// A launcher that can be shared.
pub type Handle = Arc<Launcher>;

impl Launcher {
    /// A launcher with nothing in it.
    pub fn new(config: Config) -> Handle {
        let gateway = GatewayClient::new(&config.host);
        let (status, _) = watch::channel(Status::empty(&config.vm));
        Arc::new(Self {
            folder: config.host.join("vms").join(&config.vm),
            owner: Owner::new(gateway.clone(), &config.vm),
            marks: Marks::of_host(&config.host),
            failpoints: Failpoints::new(config.failpoints),
            vm: Mutex::default(),
            status,
            gateway,
            config,
        })
    }

    /// How QEMU is run here.
    pub fn qemu_config(&self) -> qemu::Config {
        qemu::Config::from_environment(self.config.shim.clone(), &self.folder)
    }

    /// The status, as it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Changes what is shown.
    pub fn show(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            change(status);
            status.generation += 1;
        });
    }

    /// Shows a phase.
    pub fn show_phase(&self, phase: Phase, reason: Option<String>) {
        self.show(|status| {
            status.phase = phase;
            status.reason = reason;
        });
    }

    /// Shows a guest, or that there is none.
    pub fn show_guest(&self, phase: Phase, guest: Option<&Guest>) {
        self.show(|status| {
            status.phase = phase;
            status.reason = None;
            status.instance = guest.map(|g| g.instance.0.clone());
            status.epoch = guest.map(|g| g.epoch);
            status.qemu_pid = guest.map(|g| g.qemu.process.pid());
        });
    }

    /// Stops a move at a failpoint, if a test armed it.
    pub async fn pass(&self, point: &str) {
        if !self.failpoints.stops_at(point) {
            return;
        }
        let show = |at: Option<String>| {
            self.show(|status| {
                if let Some(migration) = &mut status.migration {
                    migration.failpoint = at;
                }
            });
        };
        show(Some(point.to_owned()));
        self.failpoints.stand(point).await;
        show(None);
    }

    /// Judges a wish.
    ///
    /// # Errors
    /// [`Error::Denied`].
    pub fn judge(&self, vm: &Vm, wish: Wish) -> Result<bool, Error> {
        let moves = vm.moving.as_ref().is_some_and(Moving::is_move);
        match judge(self.status.borrow().phase, moves, wish) {
            Verdict::Accept => Ok(true),
            Verdict::Already => Ok(false),
            Verdict::Deny(why) => {
                Err(Error::Denied { vm: self.config.vm.clone(), why: why.to_owned() })
            }
        }
    }

    /// Starts the VM. Idempotent.
    ///
    /// # Errors
    /// [`Error`]; then nothing runs.
    pub async fn start(self: &Arc<Self>, spec: VmSpec, begin: Begin) -> Result<(), Error> {
        spec.validate()?;
        let mut vm = self.vm.lock().await;
        if !self.judge(&vm, Wish::Start)? {
            return Ok(());
        }
        let before = self.status.borrow().phase;
        self.show_phase(Phase::Starting, None);
        let started = self.boot(&mut vm, &spec, begin).await;
        match &started {
            Ok(guest) => {
                let phase = if begin.paused { Phase::Paused } else { Phase::Running };
                self.show_guest(phase, Some(guest));
            }
            Err(error) => self.show_phase(before, Some(crate::chain(error))),
        }
        let guest = started?;
        vm.guest = Some(guest.clone());
        vm.carried = None;
        self.keep_watch(guest);
        Ok(())
    }

    async fn boot(&self, vm: &mut Vm, spec: &VmSpec, begin: Begin) -> Result<Guest, Error> {
        let forced = begin.forced;
        let (mut facts, mut marked) = (Vec::new(), Vec::new());
        for disk in &spec.disks {
            if let Some(size) = disk.blank {
                Disk::blank(&disk.path, size)?;
            }
            let mut opened = Disk::source(&disk.path)?;
            if let Some(size) = disk.grow_to.filter(|size| opened.size() < *size)
                && opened.medium() == Medium::File
                && opened.is_free()?
            {
                Disk::grow(&disk.path, size)?;
                opened = Disk::source(&disk.path)?;
            }
            facts.push(Facts { medium: opened.medium(), direct: opened.is_direct() });
            if !disk.shared && !disk.read_only {
                wait_until_free(&opened).await?;
            }
            if let Some(mark) = self.marks.get(&opened)? {
                let record = self.owner.read().await?;
                if !forced && !record.is_some_and(|record| mark.is_void(&record)) {
                    return Err(Error::Marked { disk: disk.path.clone(), mark });
                }
                marked.push(opened);
            }
        }
        self.open_consoles(vm, spec)?;
        let instance = InstanceId(uuid::Uuid::new_v4().to_string());
        // N.B. QEMU first, which stands still, then the epoch: a QEMU that cannot be started must
        // not leave an owner behind of whom nobody knows whether it lives.
        let qemu = Qemu::start(&self.qemu_config(), spec, &facts, Mode::Boot).await?;
        self.owner.watch(&instance, qemu.process.pid()).await;
        let epoch = match self.take_epoch(&instance, forced).await {
            Ok(epoch) => epoch,
            Err(error) => {
                qemu.process.kill().await;
                return Err(error);
            }
        };
        for disk in &marked {
            self.marks.clear(disk)?;
        }
        if !begin.paused {
            qemu.qmp.execute(Cont, QMP_DEADLINE).await?;
        }
        Ok(Guest { qemu, instance, epoch, history: Default::default() })
    }

    async fn take_epoch(&self, instance: &InstanceId, forced: bool) -> Result<u64, Error> {
        let here = Here::of(&self.config.host)?.peer;
        let host = here.id.to_string();
        let starter = Starter { instance: instance.clone(), host: host.as_str().into(), forced };
        let place = |id: &HostId| match peers::find(&self.config.host, id) {
            // A cluster's records are not a host's: the own handler asks them, whatever they are called.
            _ if id.0.parse::<SpiffeId>().is_err() => Ok(here.clone()),
            Ok(Some(peer)) => Ok(peer),
            Ok(None) => Err(format!("it went to {id}, and nobody here knows where that is")),
            Err(error) => {
                Err(format!("it went to {id}, and where that is cannot be read: {error}"))
            }
        };
        Ok(self.owner.start(starter, place).await?)
    }

    /// Opens the serial ports of a guest that is about to be here.
    ///
    /// # Errors
    /// [`Error::Console`].
    pub fn open_consoles(&self, vm: &mut Vm, spec: &VmSpec) -> Result<(), Error> {
        vm.consoles.retain(|(name, _)| spec.serials.contains(name));
        for name in &spec.serials {
            if vm.consoles.iter().any(|(open, _)| open == name) {
                continue;
            }
            let console = Console::open(&self.folder, name)
                .map_err(|source| Error::Console { name: name.clone(), source })?;
            vm.consoles.push((name.clone(), console));
        }
        Ok(())
    }

    /// Notices when a guest's QEMU ends.
    pub fn keep_watch(self: &Arc<Self>, guest: Guest) {
        let launcher = self.clone();
        tokio::spawn(async move {
            let exit = guest.qemu.process.ended().await;
            let mut vm = launcher.vm.lock().await;
            // The VM may have left, or been started again, meanwhile.
            if vm.guest.as_ref().is_some_and(|now| now.instance == guest.instance) {
                vm.guest = None;
                vm.carried = None;
                let words = guest.qemu.process.last_words();
                let reason = match () {
                    () if exit.is_asked() => "it was ended".to_owned(),
                    () if exit.is_clean() => "the guest shut down".to_owned(),
                    () => format!("QEMU ended by itself ({exit}): {words}"),
                };
                launcher.show(|status| {
                    status.phase = Phase::Stopped;
                    status.reason = Some(reason);
                    status.broke = !exit.is_asked() && !exit.is_clean();
                    (status.instance, status.epoch, status.qemu_pid) = (None, None, None);
                });
            }
        });
    }

    /// Begins the guest anew, as its reset button does.
    ///
    /// # Errors
    /// [`Error::Denied`]; QEMU's refusal.
    pub async fn reset(&self) -> Result<(), Error> {
        let vm = self.vm.lock().await;
        if self.judge(&vm, Wish::Reset)?
            && let Some(guest) = &vm.guest
        {
            guest.qemu.qmp.execute(SystemReset, QMP_DEADLINE).await?;
        }
        Ok(())
    }

    /// Lets the guest shut itself down, and ends it if it has not after `grace`.
    ///
    /// # Errors
    /// [`Error::Denied`]; QEMU's refusal.
    pub async fn shut_down(self: &Arc<Self>, grace: Duration) -> Result<(), Error> {
        let vm = self.vm.lock().await;
        if !self.judge(&vm, Wish::ShutDown)? {
            return Ok(());
        }
        let Some(guest) = vm.guest.clone() else { return Ok(()) };
        guest.qemu.qmp.execute(SystemPowerdown, QMP_DEADLINE).await?;
        self.show_phase(Phase::ShuttingDown, None);
        tokio::spawn(async move {
            let process = &guest.qemu.process;
            if tokio::time::timeout(grace, process.ended()).await.is_err() {
                tracing::warn!(?grace, "the guest did not shut down in time: ending it");
                process.kill().await;
            }
        });
        Ok(())
    }

    /// Ends the guest at once.
    ///
    /// # Errors
    /// [`Error::Denied`].
    pub async fn kill(&self) -> Result<(), Error> {
        let guest = {
            let vm = self.vm.lock().await;
            self.judge(&vm, Wish::Kill)?;
            vm.guest.clone()
        };
        if let Some(guest) = guest {
            guest.qemu.process.kill().await;
            // The watch shows it; whoever asked finds it shown.
            let gone = |status: &Status| status.instance.as_ref() != Some(&guest.instance.0);
            let _ = tokio::time::timeout(QMP_DEADLINE, self.status().wait_for(gone)).await;
        }
        Ok(())
    }

    /// Lets the guest stand still.
    ///
    /// # Errors
    /// [`Error::Denied`]; QEMU's refusal.
    pub async fn pause(&self) -> Result<(), Error> {
        let vm = self.vm.lock().await;
        if self.judge(&vm, Wish::Pause)?
            && let Some(guest) = &vm.guest
        {
            guest.qemu.qmp.execute(Stop, QMP_DEADLINE).await?;
            self.show_phase(Phase::Paused, None);
        }
        Ok(())
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// [`Error::Denied`]; QEMU's refusal.
    pub async fn resume(&self) -> Result<(), Error> {
        let vm = self.vm.lock().await;
        if self.judge(&vm, Wish::Resume)?
            && let Some(guest) = &vm.guest
        {
            guest.qemu.qmp.execute(Cont, QMP_DEADLINE).await?;
            self.show_phase(Phase::Running, None);
        }
        Ok(())
    }

    /// Ends whatever is here: the launcher itself is about to end.
    pub async fn close(self: &Arc<Self>, grace: Duration) {
        // A denial means that there is nothing to shut down.
        let _ = self.shut_down(grace).await;
        let guest = self.vm.lock().await.guest.clone();
        if let Some(guest) = guest {
            guest.qemu.process.ended().await;
        }
    }
}
