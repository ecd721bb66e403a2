//! The block graph: nodes over real files, the guest's disks, who may write.
//!
//! ```text
//! guest's disk -> throttle -> raw, size=N -> file or host_device
//!                             bitmaps        flock
//! ```
//!
//! QEMU's image locks are byte ranges of the file. A writer takes all of them;
//! besides, a `flock` stands for them: exclusive for a writer, shared for readers
//! and for disks with `share-rw`.

mod dirty;
mod image;
mod info;
mod options;

pub use image::{Image, read_at, reason};

use super::bitmap::Bitmap;
use super::error::Error;
use super::throttle::Group;
use serde_json::{Map, Value};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// The graph and the guest's disks.
#[derive(Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    groups: Vec<Group>,
    disks: Vec<Disk>,
    /// Whether the images are ours: locked, and the guest may write.
    active: bool,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// What it does.
    driver: Driver,
    /// Bytes that its users see: a multiple of 512.
    pub size: u64,
    read_only: bool,
    /// Its dirty bitmaps, newest first as in QEMU.
    pub bitmaps: Vec<Bitmap>,
}

#[derive(Debug)]
enum Driver {
    File(Image),
    Raw { file: String, size: Option<u64> },
    Throttle { file: String, group: String },
}

/// One of the guest's disks.
#[derive(Debug)]
struct Disk {
    id: String,
    node: String,
    counters: Counters,
}

/// What the guest did to a disk since the stub began.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counters {
    write_bytes: u64,
    writes: u64,
    flushes: u64,
    highest: u64,
}

impl Graph {
    /// Adds the disk that a `-device` with `drive=` stands for.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn attach(&mut self, id: &str, node: &str, share: bool) -> Result<(), Error> {
        if self.find(node).is_err() {
            let text = format!("Property 'virtio-blk-device.drive' can't find value '{node}'");
            return Err(Error::generic(text));
        }
        let read_only = self.chain(node).iter().any(|n| self.nodes[*n].read_only);
        let bottom = self.bottom(node);
        if let Driver::File(image) = &mut self.nodes[bottom].driver {
            image.use_by_device(read_only, share);
        }
        let (id, node) = (id.to_owned(), node.to_owned());
        self.disks.push(Disk { id, node, counters: Counters::default() });
        Ok(())
    }

    /// Adds a throttle group.
    ///
    /// # Errors
    /// As [`Group::new`].
    pub fn add_group(&mut self, id: &str, limits: Option<&Value>) -> Result<(), Error> {
        self.groups.push(Group::new(id, limits)?);
        Ok(())
    }

    /// The throttle group of this id.
    pub fn group(&mut self, id: &str) -> Option<&mut Group> {
        self.groups.iter_mut().find(|group| group.id == id)
    }

    /// How many disks the guest has.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// A node, where QEMU takes a device's name too.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn find(&self, name: &str) -> Result<&Node, Error> {
        let unknown =
            || Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'"));
        self.index(name).map(|n| &self.nodes[n]).ok_or_else(unknown)
    }

    /// As [`Graph::find`], to change it.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn find_mut(&mut self, name: &str) -> Result<&mut Node, Error> {
        self.find(name)?;
        let index = self.index(name).unwrap_or_default();
        Ok(&mut self.nodes[index])
    }

    /// A node, where QEMU takes only a node's name.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn find_node(&self, name: &str) -> Result<&Node, Error> {
        let unknown = || Error::generic(format!("Cannot find device='' nor node-name='{name}'"));
        self.find(name).map_err(|_| unknown())
    }

    /// A node and all below it, down to the file. The node must exist.
    fn chain(&self, name: &str) -> Vec<usize> {
        let mut chain = Vec::new();
        let mut next = self.index(name);
        while let Some(index) = next {
            chain.push(index);
            next = match &self.nodes[index].driver {
                Driver::File(_) => None,
                Driver::Raw { file, .. } | Driver::Throttle { file, .. } => self.index(file),
            };
        }
        chain
    }

    fn bottom(&self, name: &str) -> usize {
        self.chain(name).last().copied().unwrap_or_default()
    }

    /// The image below a node that exists.
    pub fn image(&self, node: &str) -> Option<&Image> {
        match &self.nodes.get(self.bottom(node))?.driver {
            Driver::File(image) => Some(image),
            _ => None,
        }
    }

    /// Finds a bitmap as an export does: through the filters below a node.
    pub fn find_through_filters(&self, node: &str, name: &str) -> Option<(String, &Bitmap)> {
        for index in self.chain(node) {
            let node = &self.nodes[index];
            if let Some(bitmap) = node.bitmaps.iter().find(|bitmap| bitmap.name == name) {
                return Some((node.name.clone(), bitmap));
            }
            if !matches!(node.driver, Driver::Throttle { .. }) {
                return None;
            }
        }
        None
    }

    /// Takes the locks of all images.
    ///
    /// # Errors
    /// As QEMU's `cont`, when another process holds one; then none is held.
    pub fn activate(&mut self) -> Result<(), Error> {
        if self.active {
            return Ok(());
        }
        let refused = self.images().find(|image| !image.lock()).map(Image::refusal);
        match refused {
            None => {
                self.active = true;
                Ok(())
            }
            Some(error) => {
                self.images().for_each(Image::unlock);
                Err(error)
            }
        }
    }

    /// Gives the images to whoever comes next.
    pub fn inactivate(&mut self) {
        self.images().for_each(Image::unlock);
        self.active = false;
    }

    fn images(&self) -> impl Iterator<Item = &Image> {
        self.nodes.iter().filter_map(|node| match &node.driver {
            Driver::File(image) => Some(image),
            _ => None,
        })
    }

    /// Changes a disk's size.
    ///
    /// # Errors
    /// As QEMU. N.B. QEMU dies of it while its images are not active, and so does the stub.
    pub fn resize(&mut self, node: &str, size: u64) -> Result<(), Error> {
        self.find_node(node)?;
        if !self.active {
            eprintln!(
                "stub-qemu: bdrv_co_write_req_prepare: \
                 Assertion `!(bs->open_flags & BDRV_O_INACTIVE)' failed."
            );
            std::process::abort();
        }
        let chain = self.chain(node);
        for index in &chain {
            match &self.nodes[*index].driver {
                Driver::Raw { size: Some(_), .. } => {
                    return Err(Error::generic("Cannot resize fixed-size raw disks"));
                }
                Driver::File(image) => image.resize(size)?,
                _ => {}
            }
        }
        let size = size.next_multiple_of(512);
        for index in chain {
            let node = &mut self.nodes[index];
            node.size = size;
            node.bitmaps.iter_mut().for_each(|bitmap| bitmap.resize(size));
        }
        Ok(())
    }

    /// `blockdev-reopen`: gives nodes new options, all or none.
    ///
    /// # Errors
    /// As QEMU.
    pub fn reopen(&mut self, all: &[Map<String, Value>]) -> Result<(), Error> {
        let mut changes = Vec::new();
        for options in all {
            changes.push(options::reopened(self, options)?);
        }
        for (index, driver, size) in changes {
            self.nodes[index].driver = driver;
            self.nodes[index].size = size;
        }
        Ok(())
    }

    /// When the guest may write so many bytes to its disk.
    pub fn earliest(&mut self, disk: usize, now: Instant) -> Instant {
        match self.group_of(disk) {
            Some(group) => group.earliest(now),
            None => now,
        }
    }

    fn group_of(&mut self, disk: usize) -> Option<&mut Group> {
        let top = self.index(&self.disks.get(disk)?.node)?;
        match &self.nodes[top].driver {
            Driver::Throttle { group, .. } => {
                let group = group.clone();
                self.group(&group)
            }
            _ => None,
        }
    }

    /// The guest's write; recorded by all bitmaps on its way that record. Nothing
    /// else happens in the graph meanwhile: that is QEMU's drain.
    ///
    /// # Errors
    /// Beyond the disk's end, on a read-only disk, or when the host's file refuses.
    pub fn write(&mut self, disk: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let gone = || io::Error::other("no such disk");
        let top = self.disks.get(disk).ok_or_else(gone)?.node.clone();
        let chain = self.chain(&top);
        let (size, len) = (self.nodes[chain[0]].size, bytes.len() as u64);
        if offset + len > size {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "write beyond the disk's end"));
        }
        if chain.iter().any(|n| self.nodes[*n].read_only) {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if !self.active {
            return Err(io::Error::other("a guest writes to images that are not active"));
        }
        if let Some(image) = self.image(&top) {
            image.write(offset, bytes)?;
        }
        for index in chain {
            let bitmaps = self.nodes[index].bitmaps.iter_mut().filter(|bitmap| bitmap.recording);
            bitmaps.for_each(|bitmap| bitmap.mark(offset, len));
        }
        if let Some(group) = self.group_of(disk) {
            group.spend(len, 1);
        }
        let counters = &mut self.disks[disk].counters;
        counters.write_bytes += len;
        counters.writes += 1;
        counters.highest = counters.highest.max(offset + len);
        Ok(())
    }

    /// The guest's flush begins: the file to be synced.
    pub fn flush(&mut self, disk: usize) -> Option<Arc<File>> {
        let disk = self.disks.get_mut(disk)?;
        disk.counters.flushes += 1;
        let node = disk.node.clone();
        self.image(&node).map(|image| image.file.clone())
    }

    /// The file behind one of the guest's disks, to read it.
    pub fn file(&self, disk: usize) -> Option<Arc<File>> {
        Some(self.image(&self.disks.get(disk)?.node)?.file.clone())
    }

    /// The number of a disk by its device's id or QOM path.
    pub fn disk_of_device(&self, name: &str) -> Option<usize> {
        let id = name.strip_prefix("/machine/peripheral/").unwrap_or(name);
        let id = id.strip_suffix("/virtio-backend").unwrap_or(id);
        self.disks.iter().position(|disk| disk.id == id)
    }
}
