//! Arguments for requests and limits of the containers that the injection adds.

use countersign_controller::injector::{Amount, Amounts, ContainerResources, Resources};

/// Requests and limits of sidecar and redirect where their pod sets none. A limit below the request is raised to it.
#[derive(Debug, Clone, clap::Args)]
pub struct ResourceArgs {
    /// CPU that a sidecar requests; empty for none. Pods override it by annotation, like the other resources.
    #[arg(long, value_name = "QUANTITY", default_value = "10m")]
    sidecar_cpu_request: Amount,
    /// Memory that a sidecar requests.
    #[arg(long, value_name = "QUANTITY", default_value = "16Mi")]
    sidecar_memory_request: Amount,
    /// CPU limit of a sidecar [default: none].
    #[arg(long, value_name = "QUANTITY")]
    sidecar_cpu_limit: Option<Amount>,
    /// Memory limit of a sidecar, which bounds its connections; empty for none. A limit below the request is raised to it.
    #[arg(long, value_name = "QUANTITY", default_value = "256Mi")]
    sidecar_memory_limit: Amount,
    /// CPU that a redirect requests.
    #[arg(long, value_name = "QUANTITY", default_value = "10m")]
    redirect_cpu_request: Amount,
    /// Memory that a redirect requests.
    #[arg(long, value_name = "QUANTITY", default_value = "16Mi")]
    redirect_memory_request: Amount,
    /// CPU limit of a redirect [default: none].
    #[arg(long, value_name = "QUANTITY")]
    redirect_cpu_limit: Option<Amount>,
    /// Memory limit of a redirect.
    #[arg(long, value_name = "QUANTITY", default_value = "64Mi")]
    redirect_memory_limit: Amount,
}

impl ResourceArgs {
    /// Converts the arguments to the injector's settings.
    pub fn resources(self) -> Resources {
        Resources {
            sidecar: ContainerResources {
                cpu: Amounts { request: self.sidecar_cpu_request, limit: self.sidecar_cpu_limit.unwrap_or_default() },
                memory: Amounts { request: self.sidecar_memory_request, limit: self.sidecar_memory_limit },
            },
            redirect: ContainerResources {
                cpu: Amounts { request: self.redirect_cpu_request, limit: self.redirect_cpu_limit.unwrap_or_default() },
                memory: Amounts { request: self.redirect_memory_request, limit: self.redirect_memory_limit },
            },
        }
    }
}
