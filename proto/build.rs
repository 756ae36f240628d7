//! Generates the messages with a compiler of protobuf that is Rust itself: no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "istio/workload.proto",
        "istio/security.proto",
        "istio/zds.proto",
        "istio/ca.proto",
        "envoy/discovery.proto",
    ];
    println!("cargo::rerun-if-changed=istio");
    println!("cargo::rerun-if-changed=envoy");
    println!("cargo::rerun-if-changed=google");
    let descriptors = protox::compile(files, ["."])?;
    // The server stubs are for the tests, which play the control plane.
    tonic_prost_build::configure().bytes(".istio.workload").compile_fds(descriptors)?;
    Ok(())
}
