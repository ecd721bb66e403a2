//! The commands that Godwit uses, and what they return. Names and units are QEMU's.
//!
//! Enums are open: a value that this crate does not know becomes `Unknown`. A reply may have more
//! members than these structs; members that some supported QEMU lacks are `Option`s. Arguments
//! that are `None` are not sent. [`schema::check_all`](crate::schema::check_all) compares all of
//! it with what the QEMU at hand says of itself.
//!
//! A command that is missing here needs only a struct and an implementation of
//! [`Command`](crate::Command), and its line in `schema/table.rs`.

use serde::{Deserialize, Serialize};

/// Defines a command: its struct, its name on the wire, its reply.
macro_rules! command {
    ($(#[$meta:meta])* $name:ident = $wire:literal -> $reply:ty) => {
        $(#[$meta])*
        #[doc = concat!("\n\n`", $wire, "`")]
        #[derive(Debug, Clone, Default, Serialize)]
        pub struct $name;

        impl $crate::Command for $name {
            const NAME: &'static str = $wire;
            type Return = $reply;
        }
    };
    (
        $(#[$meta:meta])* $name:ident = $wire:literal
        { $( $(#[$required_meta:meta])* $required:ident: $required_type:ty, )* }
        $( optional { $( $(#[$optional_meta:meta])* $optional:ident: $optional_type:ty, )* } )?
        -> $reply:ty
    ) => {
        $(#[$meta])*
        #[doc = concat!("\n\n`", $wire, "`")]
        #[derive(Debug, Clone, Default, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $( $(#[$required_meta])* pub $required: $required_type, )*
            $($(
                $(#[$optional_meta])*
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $optional: Option<$optional_type>,
            )*)?
        }

        impl $crate::Command for $name {
            const NAME: &'static str = $wire;
            type Return = $reply;
        }
    };
}

mod bitmaps;
mod block;
mod exports;
mod machine;
mod migration;
mod objects;

pub use bitmaps::*;
pub use block::*;
pub use exports::*;
pub use machine::*;
pub use migration::*;
pub use objects::*;

/// The reply of commands that return nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}
