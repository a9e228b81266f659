//! A workload of a mesh that is up: its namespace, sidecar and program.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use countersign_api::push::GetStatusResponse;
use countersign_identity::SpiffeId;
use countersign_redirect::netns::NetNs;

use super::account::Account;
use super::children::{Process, State};
use super::mesh_file::WorkloadSpec;
use crate::operator;

/// A workload that is up.
pub struct Running {
    /// Settings of the workload.
    pub spec: WorkloadSpec,
    /// Number of the workload in the mesh.
    pub number: usize,
    /// Network namespace of the workload.
    pub netns: NetNs,
    /// IPv4 and IPv6 address of the workload.
    pub addresses: [IpAddr; 2],
    /// SPIFFE ID of the workload.
    pub spiffe_id: SpiffeId,
    /// User and groups that its program runs as.
    pub account: Account,
    /// Environment variables about its user.
    pub environment: BTreeMap<String, String>,
    /// Folder with tables that contain its user; `None` if the machine's suffice.
    pub accounts: Option<PathBuf>,
    /// What goes again with it.
    pub parts: Parts,
    /// Unix socket of its sidecar, for operators.
    pub admin_socket: PathBuf,
    /// Its sidecar.
    pub sidecar: Rc<Process>,
    /// Its program; `None` before it is started, when `run` started it, and after it was stopped.
    pub program: Mutex<Option<Process>>,
}

/// What has to go again when a workload goes, as far as it is there.
#[derive(Clone, Default)]
pub struct Parts {
    /// Number of the workload, which the next one gets when everything is gone.
    pub number: usize,
    /// Its network namespace.
    pub netns: Option<NetNs>,
    /// Users that are nobody's but the workload's and its sidecar's.
    pub uids: Vec<u32>,
    /// IDs of its registration entries, those included whose creation was not answered.
    pub entry_ids: Vec<String>,
    /// Its sidecar.
    pub sidecar: Option<Rc<Process>>,
}

/// Whether a sidecar has its identity and policy, by its status.
pub fn is_ready(status: &GetStatusResponse) -> bool {
    status.facts.get("ready").is_some_and(|ready| ready == "yes")
}

impl Running {
    /// Fetches the status of its sidecar.
    pub async fn status(&self) -> Result<GetStatusResponse> {
        operator::status::get(&self.admin_socket).await
    }

    /// State of its program; `None` if `run` started it.
    pub fn program(&self) -> Option<State> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Process::state)
    }

    /// Stops its program, if it has one.
    pub async fn stop_program(&self) {
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(program) = program {
            program.stop().await;
        }
    }

    /// Number of restarts of its sidecar and its program.
    pub fn restarts(&self) -> u32 {
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Process::restarts);
        self.sidecar.restarts() + program
    }

    /// State of its sidecar.
    pub fn sidecar(&self) -> State {
        self.sidecar.state()
    }

    /// Path of the sidecar's access log.
    pub fn access_log(&self) -> PathBuf {
        self.admin_socket.with_file_name("access.log")
    }
}
