//! Wire formats and transports: generated code for the SPIFFE Workload API, the SPIRE server API, `countersign.v1`, CSI and
//! Envoy's secret discovery service, parsing conversions ([`convert`]), and gRPC over TLS and Unix sockets ([`transport`], [`tls`]).

pub mod accept;
pub mod admission;
pub mod backoff;
pub mod calls;
pub mod clock;
pub mod convert;
pub mod denied;
pub mod directory;
pub mod files;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod graceful;
pub mod grpc;
pub mod http;
pub mod http_client;
pub mod log_levels;
pub mod log_writer;
pub mod memory;
pub mod names;
mod near;
pub mod peer;
pub mod peer_credentials;
pub mod portions;
pub mod process;
pub mod rate_limit;
pub mod reopen;
pub mod sampled;
pub mod status;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod test_support;
pub mod tls;
mod tls_accept;
pub mod tls_connect;
pub mod transport;
mod unix_accept;
mod unix_authority;
pub mod verified;
pub mod workload_api;

/// Generated code of the SPIFFE Workload API, whose file names no package.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod workload {
    tonic::include_proto!("_");

    impl std::fmt::Debug for X509svid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "X509SVID({})", self.spiffe_id)
        }
    }
}

/// Generated code of the SPIRE server API.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod spire {
    /// Generated code of the package `spire.api`.
    pub mod api {
        /// Generated code of the package `spire.api.types`.
        pub mod types {
            tonic::include_proto!("spire.api.types");
        }
        /// Generated code of the package `spire.api.server`.
        pub mod server {
            /// Generated code of the package `spire.api.server.agent`.
            pub mod agent {
                /// Generated code of the package `spire.api.server.agent.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.agent.v1");
                }
            }
            /// Generated code of the package `spire.api.server.entry`.
            pub mod entry {
                /// Generated code of the package `spire.api.server.entry.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.entry.v1");
                }
            }
            /// Generated code of the package `spire.api.server.svid`.
            pub mod svid {
                /// Generated code of the package `spire.api.server.svid.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.svid.v1");
                }
            }
            /// Generated code of the package `spire.api.server.bundle`.
            pub mod bundle {
                /// Generated code of the package `spire.api.server.bundle.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.bundle.v1");
                }
            }
            /// Generated code of the package `spire.api.server.localauthority`.
            pub mod localauthority {
                /// Generated code of the package `spire.api.server.localauthority.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.localauthority.v1");
                }
            }
            /// Generated code of the package `spire.api.server.logger`.
            pub mod logger {
                /// Generated code of the package `spire.api.server.logger.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.logger.v1");
                }
            }
            /// Generated code of the package `spire.api.server.debug`.
            pub mod debug {
                /// Generated code of the package `spire.api.server.debug.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.debug.v1");
                }
            }
            /// Generated code of the package `spire.api.server.trustdomain`.
            pub mod trustdomain {
                /// Generated code of the package `spire.api.server.trustdomain.v1`.
                pub mod v1 {
                    tonic::include_proto!("spire.api.server.trustdomain.v1");
                }
            }
        }
    }
    pub use api::server::{agent::v1 as agent, bundle::v1 as bundle, entry::v1 as entry};
    pub use api::server::{debug::v1 as debug, logger::v1 as logger};
    pub use api::server::{localauthority::v1 as localauthority, svid::v1 as svid, trustdomain::v1 as trustdomain};
    pub use api::types;
}

/// Generated code of Countersign's own API: push, directory, status.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod countersign {
    /// Generated code of the package `countersign.v1`.
    pub mod v1 {
        tonic::include_proto!("countersign.v1");
    }
}

pub use countersign::v1 as push;

/// Generated code of the Container Storage Interface, as far as a driver of inline volumes needs it.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Generated code of the service by which the kubelet learns of a plugin.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod plugin_registration {
    tonic::include_proto!("pluginregistration");
}

/// Generated code of Envoy's secret discovery service (SDS v3).
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod sds {
    tonic::include_proto!("envoy.service.secret.v3");

    /// Type URL of [`Secret`], the type of every resource.
    pub const SECRET_TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    /// Type URL of [`SpiffeCertValidatorConfig`].
    pub const SPIFFE_VALIDATOR_TYPE: &str =
        "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
    /// Name of Envoy's SPIFFE certificate validator (Envoy 1.18 and later).
    pub const SPIFFE_VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";

    impl std::fmt::Debug for DataSource {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "DataSource({} bytes)", self.inline_bytes.len())
        }
    }

    impl std::fmt::Debug for DiscoveryResponse {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "DiscoveryResponse(version {}, {} resources)", self.version_info, self.resources.len())
        }
    }

    impl std::fmt::Debug for Resource {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "Resource({}, version {})", self.name, self.version)
        }
    }
}
