//! The two services of `k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto`: the kubelet's own, and
//! what is offered to it. Their messages are in `src/wire.rs`.

use tonic_build::manual::{Builder, Method, MethodBuilder, Service};

const PACKAGE: &str = "v1beta1";

fn main() {
    let registration = Service::builder()
        .name("Registration")
        .package(PACKAGE)
        .method(method("register", "Register", "RegisterRequest", "Empty").build())
        .build();
    let plugin = Service::builder()
        .name("DevicePlugin")
        .package(PACKAGE)
        .method(method("options", "GetDevicePluginOptions", "Empty", "Options").build())
        .method(method("list", "ListAndWatch", "Empty", "List").server_streaming().build())
        .method(method("prefer", "GetPreferredAllocation", "Empty", "Empty").build())
        .method(method("allocate", "Allocate", "AllocateRequest", "AllocateResponse").build())
        .method(method("pre_start", "PreStartContainer", "Empty", "Empty").build())
        .build();
    Builder::new().compile(&[registration, plugin]);
    println!("cargo::rerun-if-changed=build.rs");
}

fn method(name: &str, route: &str, input: &str, output: &str) -> MethodBuilder {
    Method::builder()
        .name(name)
        .route_name(route)
        .input_type(format!("crate::wire::{input}"))
        .output_type(format!("crate::wire::{output}"))
        .codec_path("tonic_prost::ProstCodec")
}
