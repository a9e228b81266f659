//! The directory of a mesh on one machine: which workload is at each address, under which policy.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use countersign_api::convert::workload_to_wire;
use countersign_api::push::PublishRequest;
use countersign_api::push::directory_client::DirectoryClient;
use countersign_api::transport::unix_channel;
use countersign_identity::directory::{Place, Workload};
use countersign_identity::policy::Mode;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::control_plane::PATIENCE;
use super::running::Running;
use crate::clients::client;

/// TCP port of mTLS between sidecars.
const MESH_PORT: u16 = 15008;
/// Interval at which the directory is published again, for a server that was restarted.
const PUBLISH_EVERY: Duration = Duration::from_secs(2);

/// What the server is told about a mesh's workloads.
pub struct Published {
    /// Random ID of this run, part of UIDs in the directory.
    run_id: String,
    /// Mode that overrides the file's; `None` for none.
    mode: Mutex<Option<Mode>>,
    workloads: Arc<Mutex<Vec<Workload>>>,
    changed: Arc<Notify>,
    publisher: JoinHandle<()>,
}

impl Published {
    /// Starts publishing to the server behind this Unix socket.
    pub fn start(server: PathBuf) -> Self {
        let mut random = [0u8; 4];
        rand::fill(&mut random);
        let (workloads, changed) = (Arc::<Mutex<Vec<Workload>>>::default(), Arc::new(Notify::new()));
        let publisher = tokio::spawn(keep_published(unix_channel(server), workloads.clone(), changed.clone()));
        let run_id = format!("{:08x}", u32::from_be_bytes(random));
        Self { run_id, mode: Mutex::default(), workloads, changed, publisher }
    }

    /// Overrides the mode of every workload from the next update on; `None` restores the file's.
    pub fn set_mode(&self, mode: Option<Mode>) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }

    /// Replaces the directory by these workloads.
    pub fn update<'a>(&self, workloads: impl Iterator<Item = &'a Rc<Running>>) {
        let mode = *self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |w: &Rc<Running>| {
            let mut policy = w.spec.policy.clone();
            policy.mode = mode.unwrap_or(policy.mode);
            Workload {
                uid: format!("{}-{}-{}", w.spec.name, self.run_id, w.parts.entry_ids.join("+")),
                name: w.spec.name.clone(),
                addresses: w.addresses.to_vec(),
                spiffe_ids: [w.spiffe_id.to_string()].into(),
                mesh_port: MESH_PORT,
                policy,
                place: Place::default(),
            }
        };
        *self.workloads.lock().unwrap_or_else(PoisonError::into_inner) = workloads.map(one).collect();
        self.changed.notify_one();
    }

    /// Stops publishing.
    pub fn stop(&self) {
        self.publisher.abort();
    }
}

/// Publishes the directory after each change, and periodically.
async fn keep_published(channel: Channel, directory: Arc<Mutex<Vec<Workload>>>, changed: Arc<Notify>) {
    loop {
        let all =
            directory.lock().unwrap_or_else(PoisonError::into_inner).iter().map(workload_to_wire).collect::<Vec<_>>();
        if !all.is_empty() {
            let request = PublishRequest { replace: true, upserted: all, ..Default::default() };
            let mut request = tonic::Request::new(request);
            request.set_timeout(PATIENCE);
            let mut client = client!(DirectoryClient, channel.clone());
            if let Err(status) = client.publish(request).await {
                tracing::debug!(status = status.message(), "cannot publish the directory; trying again");
            }
        }
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(PUBLISH_EVERY) => {}
        }
    }
}
