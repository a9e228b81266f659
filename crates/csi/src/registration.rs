//! The service by which the kubelet registers the driver. It makes the usual sidecar, node-driver-registrar, unnecessary.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use countersign_api::plugin_registration::registration_server::Registration;
use countersign_api::plugin_registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use countersign_identity::shown::sentence;
use tonic::{Request, Response, Status};

use crate::config::DriverName;
use crate::metrics::Metrics;

/// Version of CSI that the kubelet is told, as every driver of 1.x does.
const VERSION: &str = "1.0.0";
/// Most characters of the kubelet's reason that are shown.
const MAX_REASON: usize = 500;

/// What the kubelet said last.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    Unknown,
    Registered,
    /// Its reason, escaped.
    Refused(String),
}

/// The service.
#[derive(Clone)]
pub struct Registrar {
    driver: DriverName,
    socket: PathBuf,
    metrics: Arc<Metrics>,
    standing: Arc<Mutex<Standing>>,
}

impl Registrar {
    /// Registers the driver with this name behind this socket.
    pub fn new(driver: DriverName, socket: PathBuf, metrics: Arc<Metrics>) -> Self {
        Self { driver, socket, metrics, standing: Arc::new(Mutex::new(Standing::Unknown)) }
    }

    /// What is missing for the kubelet to use the driver; `None` if nothing is.
    pub fn missing(&self) -> Option<String> {
        match &*self.standing.lock().unwrap_or_else(PoisonError::into_inner) {
            Standing::Registered => None,
            Standing::Unknown => {
                Some("the kubelet has not registered the driver: is --kubelet-dir its --root-dir?".into())
            }
            Standing::Refused(why) => Some(format!("the kubelet refuses the driver: {why}")),
        }
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.driver.as_str().to_owned(),
            endpoint: self.socket.display().to_string(),
            supported_versions: vec![VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        let standing = if plugin_registered {
            tracing::info!(driver = self.driver.as_str(), "registered with the kubelet");
            Standing::Registered
        } else {
            let why = sentence(&error, MAX_REASON).to_string();
            tracing::error!(driver = self.driver.as_str(), why, "the kubelet refuses the driver");
            Standing::Refused(why)
        };
        self.metrics.registered.set(i64::from(plugin_registered));
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
