//! What a kubelet and who offers it a device say to each other:
//! <https://github.com/kubernetes/kubelet/blob/master/pkg/apis/deviceplugin/v1beta1/api.proto>,
//! of its messages the fields that are used here. Those that are not are passed over, as protobuf has it.

use prost::Message;

/// The version of it all, as [`RegisterRequest`] names it.
pub const VERSION: &str = "v1beta1";
/// The state of a device that may be given away.
pub const HEALTHY: &str = "Healthy";
/// The state of one that may not.
pub const UNHEALTHY: &str = "Unhealthy";

/// Nothing.
#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// Who offers what.
#[derive(Clone, PartialEq, Message)]
pub struct RegisterRequest {
    /// [`VERSION`].
    #[prost(string, tag = "1")]
    pub version: String,
    /// The name of the offerer's socket, in the kubelet's folder.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// What pods ask for.
    #[prost(string, tag = "3")]
    pub resource_name: String,
}

/// What the kubelet is to call besides: nothing.
#[derive(Clone, PartialEq, Message)]
pub struct Options {}

/// All that is offered.
#[derive(Clone, PartialEq, Message)]
pub struct List {
    /// Each can be given to one container.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Share>,
}

/// One of those that may have the device at once.
#[derive(Clone, PartialEq, Message)]
pub struct Share {
    /// Its name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// [`HEALTHY`] or [`UNHEALTHY`].
    #[prost(string, tag = "2")]
    pub health: String,
}

/// Which are given away.
#[derive(Clone, PartialEq, Message)]
pub struct AllocateRequest {
    /// To each container of a pod.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<ContainerRequest>,
}

/// Which are given to one container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerRequest {
    /// The names of [`Share`]s.
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

/// What that means.
#[derive(Clone, PartialEq, Message)]
pub struct AllocateResponse {
    /// For each container that was asked for, in that order.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<ContainerResponse>,
}

/// What one container gets.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerResponse {
    /// Files of `/dev`.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
}

/// A file of `/dev` in a container.
#[derive(Clone, PartialEq, Message)]
pub struct DeviceSpec {
    /// Where it is in the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Where it is on the node.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// `r` to read, `w` to write, `m` to make it.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

#[allow(missing_docs, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/v1beta1.Registration.rs"));
    include!(concat!(env!("OUT_DIR"), "/v1beta1.DevicePlugin.rs"));
}

pub use generated::device_plugin_client::DevicePluginClient;
pub use generated::device_plugin_server::{DevicePlugin, DevicePluginServer};
pub use generated::registration_client::RegistrationClient;
pub use generated::registration_server::{Registration, RegistrationServer};
