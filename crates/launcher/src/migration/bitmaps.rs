//! The dirty bitmaps of a VM's disks, over QMP and NBD.
//!
//! Two kinds live on a disk's node:
//! - the *round* bitmap of the move that runs, or of one that failed and can be resumed;
//! - the *since* bitmap, which records from a VM's first instruction here what
//!   has changed since the epoch before, so that a move back sends only that.
//!
//! A bitmap is read like this: QEMU exports only one that does not record, and
//! keeps busy one that is exported. So a round adds the next bitmap and stops
//! the old one in a single transaction, exports the old one, reads it, ends the
//! export and removes it: the last two while what was read is being sent. If reading fails, the old one is merged into the new:
//! no write is ever forgotten.

use mover::extent::{Extent, ExtentSet};
use qmp::commands::{
    BitmapRef, BlockDirtyBitmapAdd, BlockDirtyBitmapDisable, BlockDirtyBitmapMerge,
    BlockDirtyBitmapRemove, BlockExportAdd, ExportType, NbdAddress, NbdServerStart, NbdServerStop,
    QueryNamedBlockNodes, Transaction, TransactionAction,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// QEMU answers these commands at once unless it hangs.
const QMP_DEADLINE: Duration = Duration::from_secs(10);
/// Reading the bitmap of a large disk takes a few megabytes.
const NBD_DEADLINE: Duration = Duration::from_secs(30);
/// Bits of a bitmap that is finer than this are worth their memory only on disks up to 1 TiB.
const FINE: u32 = 4096;
const COARSE: u32 = 65536;
const COARSE_FROM: u64 = 1 << 40;
/// Most extents that a bitmap may have before the move gives up on it: 64 MiB of memory.
const MAX_EXTENTS: usize = 4 << 20;

/// What went wrong with a bitmap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU refused.
    #[error("QEMU cannot {what} dirty bitmap {bitmap}")]
    Qmp {
        /// add, read, …
        what: &'static str,
        /// The bitmap.
        bitmap: String,
        /// Why.
        #[source]
        source: qmp::Error,
    },
    /// It could not be read.
    #[error("cannot read dirty bitmap {bitmap} of {node}: {why}")]
    Read {
        /// The bitmap.
        bitmap: String,
        /// The disk's node.
        node: String,
        /// Why.
        why: String,
    },
}

/// A disk as QEMU has it.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name of the node that carries the bitmaps.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
}

impl Node {
    fn granularity(&self) -> u32 {
        if self.size >= COARSE_FROM { COARSE } else { FINE }
    }
}

/// The bitmaps of one VM's disks.
#[derive(Debug)]
pub struct Bitmaps {
    qmp: qmp::Client,
    socket: PathBuf,
    nodes: Vec<Node>,
    /// Number of the round bitmap that records now.
    round: u32,
}

impl Bitmaps {
    /// The bitmaps of `nodes`. `folder` is the launcher's, where QEMU's NBD socket will be.
    pub fn new(qmp: qmp::Client, folder: &Path, nodes: Vec<Node>) -> Self {
        Self { qmp, socket: folder.join("nbd.sock"), nodes, round: 0 }
    }

    /// The disks, in the move's order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether they are those of these disks.
    pub fn are_of(&self, nodes: &[Node]) -> bool {
        self.nodes.iter().map(|node| &node.name).eq(nodes.iter().map(|node| &node.name))
    }

    /// Begins to record. To be called before the first byte of any disk is read.
    ///
    /// # Errors
    /// [`Error::Qmp`].
    pub async fn begin(&mut self) -> Result<(), Error> {
        self.round += 1;
        let name = round_name(self.round);
        let actions = self.nodes.iter().map(|node| add(node, &name, false).into()).collect();
        self.transact("add", &name, actions).await
    }

    /// What was written since the last call or [`Bitmaps::begin`], per disk; a
    /// new record begins at the same instant for all disks. To be followed by [`Bitmaps::tidy`].
    ///
    /// # Errors
    /// [`Error`]; then nothing is forgotten and the call can be repeated.
    pub async fn swap(&mut self) -> Result<Vec<ExtentSet>, Error> {
        let (old, new) = (round_name(self.round), round_name(self.round + 1));
        let actions = self
            .nodes
            .iter()
            .flat_map(|node| [add(node, &new, false).into(), disable(node, &old).into()])
            .collect();
        self.transact("swap", &new, actions).await?;
        self.round += 1;
        let read = self.read(&old).await;
        if read.is_err() {
            self.unserve(&old).await?;
            self.merge_back(&old, &new).await?;
            self.remove(&old).await?;
        }
        read
    }

    /// Forgets what the last [`Bitmaps::swap`] returned.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn tidy(&self) -> Result<(), Error> {
        let old = round_name(self.round - 1);
        self.unserve(&old).await?;
        self.remove(&old).await
    }

    async fn merge_back(&self, old: &str, new: &str) -> Result<(), Error> {
        let merge = |node: &Node| BlockDirtyBitmapMerge {
            node: node.name.clone(),
            target: new.to_owned(),
            bitmaps: vec![BitmapRef::from(old)],
        };
        let actions = self.nodes.iter().map(|node| merge(node).into()).collect();
        self.transact("merge", new, actions).await
    }

    /// What a recording bitmap holds, without stopping it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn look(&self, name: &str) -> Result<Vec<ExtentSet>, Error> {
        let copy = format!("{name}-copy");
        let actions = self
            .nodes
            .iter()
            .flat_map(|node| {
                let merge = BlockDirtyBitmapMerge {
                    node: node.name.clone(),
                    target: copy.clone(),
                    bitmaps: vec![BitmapRef::from(name)],
                };
                [add(node, &copy, true).into(), merge.into()]
            })
            .collect();
        self.transact("copy", name, actions).await?;
        let read = self.read(&copy).await;
        self.unserve(&copy).await?;
        self.remove(&copy).await?;
        read
    }

    async fn counts(&self, name: &str) -> Result<Vec<u64>, Error> {
        let query = QueryNamedBlockNodes { flat: Some(true) };
        let all = self.qmp.execute(query, QMP_DEADLINE).await;
        let all = all.map_err(|source| self.fail("count", name, source))?;
        let count = |node: &Node| {
            all.iter()
                .filter(|n| n.node_name.as_deref() == Some(&node.name))
                .flat_map(|n| &n.dirty_bitmaps)
                .find(|b| b.name.as_deref() == Some(name))
                .map_or(0, |b| b.count)
        };
        Ok(self.nodes.iter().map(count).collect())
    }

    /// Begins a bitmap of its own on all disks.
    ///
    /// # Errors
    /// [`Error::Qmp`].
    pub async fn start(&self, name: &str) -> Result<(), Error> {
        let actions = self.nodes.iter().map(|node| add(node, name, false).into()).collect();
        self.transact("add", name, actions).await
    }

    /// Ends a bitmap on all disks.
    ///
    /// # Errors
    /// [`Error::Qmp`].
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        for node in &self.nodes {
            let remove = BlockDirtyBitmapRemove { node: node.name.clone(), name: name.to_owned() };
            let removed = self.qmp.execute(remove, QMP_DEADLINE).await;
            removed.map_err(|source| self.fail("remove", name, source))?;
        }
        Ok(())
    }

    /// Ends the round bitmap: the move is over and nothing can be resumed.
    ///
    /// # Errors
    /// [`Error::Qmp`].
    pub async fn end(&self) -> Result<(), Error> {
        match self.round {
            0 => Ok(()),
            round => self.remove(&round_name(round)).await,
        }
    }

    async fn transact(
        &self,
        what: &'static str,
        bitmap: &str,
        actions: Vec<TransactionAction>,
    ) -> Result<(), Error> {
        let done = self.qmp.execute(Transaction { actions }, QMP_DEADLINE).await;
        done.map(|_| ()).map_err(|source| self.fail(what, bitmap, source))
    }

    fn fail(&self, what: &'static str, bitmap: &str, source: qmp::Error) -> Error {
        Error::Qmp { what, bitmap: bitmap.to_owned(), source }
    }

    /// The extents of a bitmap that does not record. To be followed by [`Self::unserve`].
    async fn read(&self, name: &str) -> Result<Vec<ExtentSet>, Error> {
        let counts = self.counts(name).await?;
        if counts.iter().all(|count| *count == 0) {
            return Ok(vec![ExtentSet::new(); self.nodes.len()]);
        }
        // N.B. in its folder QEMU knows the socket by its name alone.
        let addr = NbdAddress::Unix { path: "nbd.sock".to_owned() };
        let server = NbdServerStart { addr, max_connections: Some(4) };
        let started = self.qmp.execute(server, QMP_DEADLINE).await;
        started.map_err(|source| self.fail("serve", name, source))?;
        let mut all = Vec::new();
        for (node, count) in self.nodes.iter().zip(counts) {
            all.push(match count {
                0 => ExtentSet::new(),
                _ => self.read_one(node, name).await?,
            });
        }
        Ok(all)
    }

    async fn read_one(&self, node: &Node, name: &str) -> Result<ExtentSet, Error> {
        let export = BlockExportAdd {
            r#type: ExportType::Nbd,
            id: format!("{}-bitmap", node.name),
            node_name: node.name.clone(),
            name: Some(node.name.clone()),
            writable: Some(false),
            bitmaps: Some(vec![BitmapRef::from(name)]),
            ..BlockExportAdd::default()
        };
        let added = self.qmp.execute(export, QMP_DEADLINE).await;
        added.map_err(|source| self.fail("export", name, source))?;
        let extents = self.fetch(node, name).await;
        extents.map_err(|why| Error::Read { bitmap: name.to_owned(), node: node.name.clone(), why })
    }

    /// Ends the server and with it its exports, whether [`Self::read`] has started it or not.
    async fn unserve(&self, name: &str) -> Result<(), Error> {
        match self.qmp.execute(NbdServerStop, QMP_DEADLINE).await {
            // Nothing was written, so that it was not needed.
            Err(qmp::Error::Refused { .. }) => Ok(()),
            Err(source) => Err(self.fail("stop serving", name, source)),
            Ok(_) => self.wait_until_idle(name).await,
        }
    }

    async fn fetch(&self, node: &Node, name: &str) -> Result<ExtentSet, String> {
        let context = nbd::dirty_bitmap(name);
        let options = nbd::Options::new(&node.name).context(&context);
        let client = nbd::Client::connect(&self.socket, options, NBD_DEADLINE)
            .await
            .map_err(|e| e.to_string())?;
        let size = client.export().size.min(node.size);
        let extents = client.extents(&context, 0..size, MAX_EXTENTS, NBD_DEADLINE).await;
        // The export is about to end anyway.
        let _ = client.disconnect(NBD_DEADLINE).await;
        let dirty = |e: &nbd::Extent| e.flags & nbd::DIRTY != 0;
        let extents = extents.map_err(|e| e.to_string())?;
        Ok(extents.iter().filter(|e| dirty(e)).map(|e| Extent::new(e.offset, e.len)).collect())
    }

    /// QEMU lets go of an exported bitmap a moment after the export's end.
    async fn wait_until_idle(&self, name: &str) -> Result<(), Error> {
        let until = tokio::time::Instant::now() + QMP_DEADLINE;
        loop {
            let query = QueryNamedBlockNodes { flat: Some(true) };
            let all = self.qmp.execute(query, QMP_DEADLINE).await;
            let all = all.map_err(|source| self.fail("examine", name, source))?;
            let mut bitmaps = all.iter().flat_map(|n| &n.dirty_bitmaps);
            let busy = bitmaps.any(|b| b.name.as_deref() == Some(name) && b.busy);
            if !busy || tokio::time::Instant::now() > until {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Bytes that the round bitmaps of a VM have recorded so far.
///
/// # Errors
/// QEMU's refusal.
pub async fn recorded(qmp: &qmp::Client) -> Result<u64, qmp::Error> {
    let all = qmp.execute(QueryNamedBlockNodes { flat: Some(true) }, QMP_DEADLINE).await?;
    let bitmaps = all.iter().flat_map(|node| &node.dirty_bitmaps);
    let rounds = bitmaps.filter(|b| b.recording && b.name.as_deref().is_some_and(is_round));
    Ok(rounds.map(|b| b.count).sum())
}

fn is_round(name: &str) -> bool {
    name.starts_with("godwit-round-")
}

fn round_name(round: u32) -> String {
    format!("godwit-round-{round}")
}

/// Name of the bitmap that records what changed since `epoch` began, in this QEMU.
pub fn since_name(epoch: u64) -> String {
    format!("godwit-since-{epoch}")
}

fn add(node: &Node, name: &str, disabled: bool) -> BlockDirtyBitmapAdd {
    BlockDirtyBitmapAdd {
        node: node.name.clone(),
        name: name.to_owned(),
        granularity: Some(node.granularity()),
        disabled: Some(disabled),
        ..BlockDirtyBitmapAdd::default()
    }
}

fn disable(node: &Node, name: &str) -> BlockDirtyBitmapDisable {
    BlockDirtyBitmapDisable { node: node.name.clone(), name: name.to_owned() }
}
