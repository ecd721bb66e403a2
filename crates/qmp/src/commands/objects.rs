//! QOM objects and devices.

use serde::Serialize;
use serde_json::Value;

use super::Empty;
use crate::Command;

/// Creates an object. The value is its `ObjectOptions`: `qom-type`, `id`, properties.
///
/// `object-add`
#[derive(Debug, Clone, Serialize)]
pub struct ObjectAdd(pub Value);

impl Command for ObjectAdd {
    const NAME: &'static str = "object-add";
    type Return = Empty;
}

command! {
    /// Removes an object.
    ObjectDel = "object-del" {
        /// Its id.
        id: String,
    } -> Empty
}

/// Plugs a device in. The value is its options: `driver`, `id`, properties.
///
/// `device_add`
#[derive(Debug, Clone, Serialize)]
pub struct DeviceAdd(pub Value);

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Return = Empty;
}

command! {
    /// Asks the guest to let a device go. Done at the event `DEVICE_DELETED`.
    DeviceDel = "device_del" {
        /// Its id or QOM path.
        id: String,
    } -> Empty
}

command! {
    /// A property of an object.
    QomGet = "qom-get" {
        /// The object's path.
        path: String,
        /// The property.
        property: String,
    } -> Value
}

command! {
    /// Sets a property of an object.
    QomSet = "qom-set" {
        /// The object's path.
        path: String,
        /// The property.
        property: String,
        /// Its new value.
        value: Value,
    } -> Empty
}
