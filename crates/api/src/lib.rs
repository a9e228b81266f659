//! Wire formats and transports: generated code for the SPIFFE Workload API, the SPIRE server API, `countersign.v1` and CSI,
//! parsing conversions ([`convert`]), and gRPC over TLS and Unix sockets ([`transport`], [`tls`]).

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
