//! Compiles `proto/` with a compiler written in Rust, so that a build needs no `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "workload.proto",
        "spire/agent.proto",
        "spire/entry.proto",
        "spire/svid.proto",
        "spire/bundle.proto",
        "spire/localauthority.proto",
        "spire/trustdomain.proto",
        "countersign/v1.proto",
        "csi/v1.proto",
        "csi/registration.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().skip_debug([".X509SVID"]).compile_fds(descriptors)?;
    Ok(())
}
