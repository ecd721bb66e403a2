//! Dirty bitmaps, and transactions over them.

use serde::Serialize;

use super::Empty;

command! {
    /// Begins to record what is written to a node.
    BlockDirtyBitmapAdd = "block-dirty-bitmap-add" {
        /// The node.
        node: String,
        /// The bitmap's name, up to 1023 bytes.
        name: String,
    } optional {
        /// Bytes per bit, a power of two of at least 512. Default: the cluster size, at least 64 KiB.
        granularity: u32,
        /// Kept in the image (qcow2 only) when QEMU ends.
        persistent: bool,
        /// Does not record yet.
        disabled: bool,
    } -> Empty
}

command! {
    /// Removes a bitmap. One that is exported is busy: delete the export first.
    BlockDirtyBitmapRemove = "block-dirty-bitmap-remove" {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    } -> Empty
}

command! {
    /// Forgets what a bitmap recorded.
    BlockDirtyBitmapClear = "block-dirty-bitmap-clear" {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    } -> Empty
}

command! {
    /// Lets a bitmap record.
    BlockDirtyBitmapEnable = "block-dirty-bitmap-enable" {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    } -> Empty
}

command! {
    /// Lets a bitmap record no more. Only a disabled bitmap can be exported.
    BlockDirtyBitmapDisable = "block-dirty-bitmap-disable" {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    } -> Empty
}

command! {
    /// Adds what other bitmaps recorded to one of them.
    BlockDirtyBitmapMerge = "block-dirty-bitmap-merge" {
        /// The node of `target`.
        node: String,
        /// The bitmap that receives.
        target: String,
        /// The bitmaps that are added; they stay as they are.
        bitmaps: Vec<BitmapRef>,
    } -> Empty
}

/// A bitmap, of the same node or of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum BitmapRef {
    /// A bitmap of the node that the command names.
    Here(String),
    /// A bitmap of any node.
    Of {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    },
}

impl From<&str> for BitmapRef {
    fn from(name: &str) -> Self {
        Self::Here(name.into())
    }
}

impl From<String> for BitmapRef {
    fn from(name: String) -> Self {
        Self::Here(name)
    }
}

command! {
    /// Does all of it or nothing, at one instant between two guest writes.
    Transaction = "transaction" {
        /// In this order.
        actions: Vec<TransactionAction>,
    } -> Empty
}

/// One step of a [`Transaction`].
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    /// Adds a bitmap.
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    /// Removes one.
    BlockDirtyBitmapRemove(BlockDirtyBitmapRemove),
    /// Clears one.
    BlockDirtyBitmapClear(BlockDirtyBitmapClear),
    /// Enables one.
    BlockDirtyBitmapEnable(BlockDirtyBitmapEnable),
    /// Disables one.
    BlockDirtyBitmapDisable(BlockDirtyBitmapDisable),
    /// Merges bitmaps.
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
}

macro_rules! actions {
    ($($command:ident),*) => {
        $(
            impl From<$command> for TransactionAction {
                fn from(command: $command) -> Self {
                    Self::$command(command)
                }
            }
        )*
    };
}

actions!(
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapRemove,
    BlockDirtyBitmapClear,
    BlockDirtyBitmapEnable,
    BlockDirtyBitmapDisable,
    BlockDirtyBitmapMerge
);
