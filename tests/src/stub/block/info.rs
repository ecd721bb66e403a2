//! What the queries show of the graph.

use super::{Counters, Driver, Graph, Node};
use crate::stub::bitmap::Bitmap;
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;

impl Graph {
    /// `query-named-block-nodes`: newest first, as QEMU. Unless `flat`, each image
    /// tells of the one below it too.
    pub fn query_nodes(&self, flat: bool) -> Value {
        self.nodes.iter().rev().map(|node| self.describe(node, flat)).collect()
    }

    /// `query-block`.
    pub fn query_block(&self) -> Value {
        let one = |disk: &super::Disk| {
            let node = self.find(&disk.node).ok()?;
            Some(json!({
                "io-status": "ok", "device": "", "locked": false, "removable": false,
                "inserted": self.describe(node, false), "type": "unknown",
                "qdev": format!("/machine/peripheral/{}/virtio-backend", disk.id),
            }))
        };
        self.disks.iter().filter_map(one).collect()
    }

    /// `query-blockstats`: by disk, or by node.
    pub fn query_stats(&self, nodes: bool) -> Value {
        if nodes {
            let one = |node: &Node| stats(&node.name, Counters::default());
            return self.nodes.iter().rev().map(one).collect();
        }
        let one = |disk: &super::Disk| {
            let mut all = stats(&disk.node, disk.counters);
            all["device"] = "".into();
            all["qdev"] = format!("/machine/peripheral/{}/virtio-backend", disk.id).into();
            all
        };
        self.disks.iter().map(one).collect()
    }

    fn describe(&self, node: &Node, flat: bool) -> Value {
        let mut image = self.image_of(node);
        if let Driver::Throttle { file, .. } = &node.driver
            && let Ok(below) = self.find(file)
            && !flat
        {
            image["backing-image"] = self.image_of(below);
        }
        let direct = matches!(&node.driver, Driver::File(image) if image.direct);
        let depth = usize::from(matches!(node.driver, Driver::Throttle { .. }) && !flat);
        let mut all = json!({
            "node-name": node.name, "drv": self.format(node), "file": image["filename"],
            "ro": node.read_only, "image": image, "encrypted": false, "detect_zeroes": "off",
            "backing_file_depth": depth, "write_threshold": 0,
            "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "cache": {"writeback": true, "direct": direct, "no-flush": false},
        });
        if !node.bitmaps.is_empty() {
            all["dirty-bitmaps"] = node.bitmaps.iter().map(bitmap).collect();
        }
        all
    }

    fn image_of(&self, node: &Node) -> Value {
        let image = self.image(&node.name);
        let metadata = image.and_then(|image| image.file.metadata().ok());
        json!({
            "filename": self.filename(node), "format": self.format(node), "dirty-flag": false,
            "virtual-size": node.size, "actual-size": metadata.map_or(0, |m| m.blocks() * 512),
        })
    }

    fn format(&self, node: &Node) -> &'static str {
        match &node.driver {
            Driver::File(image) if image.device => "host_device",
            Driver::File(_) => "file",
            Driver::Raw { .. } => "raw",
            Driver::Throttle { .. } => "throttle",
        }
    }

    /// The file's name where that says it all, else QEMU's `json:` of the node's options.
    fn filename(&self, node: &Node) -> String {
        match &node.driver {
            Driver::File(image) => image.path.clone(),
            Driver::Raw { file, size: None } => {
                self.find(file).map(|below| self.filename(below)).unwrap_or_default()
            }
            _ => format!("json:{}", Value::Object(self.options(node))),
        }
    }

    fn options(&self, node: &Node) -> Map<String, Value> {
        let mut all = Map::new();
        all.insert("driver".into(), self.format(node).into());
        match &node.driver {
            Driver::File(image) => {
                all.insert("filename".into(), image.path.clone().into());
            }
            Driver::Raw { file, size } => {
                if let Some(size) = size {
                    all.insert("size".into(), (*size).into());
                }
                all.extend(self.below(file));
            }
            Driver::Throttle { file, group } => {
                all.insert("throttle-group".into(), group.clone().into());
                all.extend(self.below(file));
            }
        }
        all
    }

    fn below(&self, name: &str) -> Option<(String, Value)> {
        let node = self.find(name).ok()?;
        Some(("file".into(), self.options(node).into()))
    }
}

fn bitmap(bitmap: &Bitmap) -> Value {
    json!({
        "name": bitmap.name, "recording": bitmap.recording, "busy": bitmap.is_busy(),
        "persistent": false, "granularity": bitmap.granularity, "count": bitmap.count(),
    })
}

fn stats(node: &str, counters: Counters) -> Value {
    let names = [
        "rd_bytes",
        "unmap_bytes",
        "rd_operations",
        "unmap_operations",
        "rd_total_time_ns",
        "wr_total_time_ns",
        "flush_total_time_ns",
        "unmap_total_time_ns",
        "rd_merged",
        "wr_merged",
        "unmap_merged",
        "failed_rd_operations",
        "failed_wr_operations",
        "failed_flush_operations",
        "failed_unmap_operations",
        "invalid_rd_operations",
        "invalid_wr_operations",
        "invalid_flush_operations",
        "invalid_unmap_operations",
    ];
    let mut all: Map<String, Value> =
        names.map(|name| (name.to_owned(), 0.into())).into_iter().collect();
    all.insert("wr_bytes".into(), counters.write_bytes.into());
    all.insert("wr_operations".into(), counters.writes.into());
    all.insert("flush_operations".into(), counters.flushes.into());
    all.insert("wr_highest_offset".into(), counters.highest.into());
    all.insert("account_invalid".into(), true.into());
    all.insert("account_failed".into(), true.into());
    all.insert("timed_stats".into(), json!([]));
    json!({"node-name": node, "stats": all})
}
