pub async fn verify(_: super::mesh_file::MeshSpec, _: Option<std::path::PathBuf>, _: bool, _: tokio_util::sync::CancellationToken) -> anyhow::Result<std::process::ExitCode> { unimplemented!() }
