//! Compiles `proto/` with a compiler written in Rust, so that a build needs no `protoc`.

/// Messages that may hold a private key. Their `Debug` is written by hand and shows no content.
const HOLD_KEYS: [&str; 4] = [
    ".X509SVID",
    ".envoy.service.secret.v3.DataSource",
    ".envoy.service.secret.v3.DiscoveryResponse",
    ".envoy.service.secret.v3.Resource",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "workload.proto",
        "spire/agent.proto",
        "spire/entry.proto",
        "spire/svid.proto",
        "spire/bundle.proto",
        "spire/localauthority.proto",
        "spire/logger.proto",
        "spire/debug.proto",
        "spire/trustdomain.proto",
        "countersign/v1.proto",
        "csi/v1.proto",
        "csi/registration.proto",
        "envoy/secret.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().skip_debug(HOLD_KEYS).compile_fds(descriptors)?;
    Ok(())
}
