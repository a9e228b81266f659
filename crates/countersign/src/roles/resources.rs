//! Arguments for requests and limits of the containers that the injection adds.

use std::collections::BTreeSet;

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
    /// What an injector sets, changed by the arguments that were named, each by the name of its field.
    pub fn over(self, named: &BTreeSet<String>, mut injected: Resources) -> Resources {
        let own = self.resources();
        let (sidecar, redirect) = (&mut injected.sidecar, &mut injected.redirect);
        let all = [
            ("sidecar_cpu_request", &mut sidecar.cpu.request, own.sidecar.cpu.request),
            ("sidecar_cpu_limit", &mut sidecar.cpu.limit, own.sidecar.cpu.limit),
            ("sidecar_memory_request", &mut sidecar.memory.request, own.sidecar.memory.request),
            ("sidecar_memory_limit", &mut sidecar.memory.limit, own.sidecar.memory.limit),
            ("redirect_cpu_request", &mut redirect.cpu.request, own.redirect.cpu.request),
            ("redirect_cpu_limit", &mut redirect.cpu.limit, own.redirect.cpu.limit),
            ("redirect_memory_request", &mut redirect.memory.request, own.redirect.memory.request),
            ("redirect_memory_limit", &mut redirect.memory.limit, own.redirect.memory.limit),
        ];
        for (name, place, own) in all {
            if named.contains(name) {
                *place = own;
            }
        }
        injected
    }

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
