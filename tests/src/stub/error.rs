//! What QMP answers instead of a result.

use serde_json::{Value, json};

/// A refusal, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    class: &'static str,
    text: String,
}

impl Error {
    /// QEMU's class for nearly everything.
    pub fn generic(text: impl Into<String>) -> Self {
        Self { class: "GenericError", text: text.into() }
    }

    /// No such command, or not now.
    pub fn command(text: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", text: text.into() }
    }

    /// No such object.
    pub fn device(text: impl Into<String>) -> Self {
        Self { class: "DeviceNotFound", text: text.into() }
    }

    /// The value of `error` in an answer.
    pub fn to_json(&self) -> Value {
        json!({ "class": self.class, "desc": self.text })
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}
