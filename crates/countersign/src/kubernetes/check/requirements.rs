//! Whether a cluster has what an installation needs, apart from storage.

use countersign_watch::in_words;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};

use super::finding::{Fault, Outcome};

/// The oldest supported version of Kubernetes.
const OLDEST: (u32, u32) = (1, 24);
/// The first version with native sidecars.
const NATIVE_SIDECARS: (u32, u32) = (1, 29);
/// The first version in which the API server evaluates admission policies.
pub(super) const ADMISSION_POLICY: (u32, u32) = (1, 30);
/// The first version whose kubelets support `nodes/pods`.
pub(super) const NARROW_KUBELET: (u32, u32) = (1, 33);
/// Largest tolerated difference between clocks, in seconds: SVIDs are backdated by as much.
const MAX_SKEW: i64 = 10;

/// `native`: whether an installed injector uses native sidecars; `None` if none is installed.
pub(super) fn api_version(version: (u32, u32), native: Option<bool>) -> Outcome {
    let found = format!("Kubernetes {}.{}", version.0, version.1);
    match native {
        _ if version < OLDEST => Err(Fault::new(found, "Countersign needs Kubernetes 1.24 or newer")),
        Some(true) if version < NATIVE_SIDECARS => {
            Err(Fault::new(format!("{found} has no native sidecars"), "install with injector.nativeSidecars=false"))
        }
        None if version < NATIVE_SIDECARS => Ok(format!(
            "{found}; install with injector.nativeSidecars=false, agent.nodesProxyPermission=true, admissionPolicy=false"
        )),
        None if version < ADMISSION_POLICY => {
            Ok(format!("{found}; install with agent.nodesProxyPermission=true, admissionPolicy=false"))
        }
        None if version < NARROW_KUBELET => Ok(format!("{found}; install with agent.nodesProxyPermission=true")),
        _ => Ok(found),
    }
}

/// Checks whether we may create what an installation needs.
pub(super) async fn permissions(client: &Client, namespace: &str) -> Outcome {
    let needed = [
        ("", "namespaces", ""),
        ("", "persistentvolumes", ""),
        ("", "persistentvolumeclaims", namespace),
        ("apiextensions.k8s.io", "customresourcedefinitions", ""),
        ("rbac.authorization.k8s.io", "clusterroles", ""),
        ("rbac.authorization.k8s.io", "clusterrolebindings", ""),
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", ""),
        ("admissionregistration.k8s.io", "validatingadmissionpolicies", ""),
        ("storage.k8s.io", "csidrivers", ""),
        ("apps", "daemonsets", namespace),
        ("apps", "statefulsets", namespace),
        ("apps", "deployments", namespace),
    ];
    let asked = needed.map(|(group, resource, namespace)| may_create(client, group, resource, namespace));
    let answers = futures::future::join_all(asked).await;
    let mut lacking = vec![];
    for ((_, resource, _), answer) in needed.into_iter().zip(answers) {
        match answer {
            Ok(true) => {}
            Ok(false) => lacking.push(resource),
            Err(why) => return Err(Fault::unchecked(why, "see whether you may create selfsubjectaccessreviews")),
        }
    }
    match lacking.as_slice() {
        [] => Ok("you may install".into()),
        some => Err(Fault::new(
            format!("you may not create {}", some.join(", ")),
            "install as an administrator of the cluster",
        )),
    }
}

/// Whether this user may create such objects, in a namespace or with an empty name in all. Error: why nobody knows, in words.
pub(super) async fn may_create(client: &Client, group: &str, resource: &str, namespace: &str) -> Result<bool, String> {
    let attributes = ResourceAttributes {
        group: Some(group.into()),
        resource: Some(resource.into()),
        verb: Some("create".into()),
        namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await.map_err(|e| in_words(&e))?;
    Ok(answer.status.is_some_and(|s| s.allowed))
}

/// Compares the time in each kubelet's lease with the API server's time of the same write.
pub(super) async fn clocks(client: &Client) -> Outcome {
    let api: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    let leases = api.list(&ListParams::default()).await;
    let leases = leases.map_err(|e| Fault::unread(&e, "see whether you may list leases in kube-node-lease"))?;
    let (mut worst, mut whose) = (0, String::new());
    for lease in &leases.items {
        let written = lease
            .metadata
            .managed_fields
            .iter()
            .flatten()
            .filter_map(|f| f.time.as_ref())
            .map(|t| t.0.as_second())
            .max();
        let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.as_ref()).map(|t| t.0.as_second());
        if let (Some(written), Some(renewed)) = (written, renewed)
            && (renewed - written).abs() > worst
        {
            (worst, whose) = ((renewed - written).abs(), lease.name_any());
        }
    }
    if worst > MAX_SKEW {
        return Err(Fault::new(
            format!("node {whose} is {worst} s off the API server's clock"),
            "set the clocks by NTP: certificates are dated",
        ));
    }
    Ok(format!("{} nodes, at most {worst} s off", leases.items.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_cluster_is_found() {
        assert_eq!(api_version((1, 34), None), Ok("Kubernetes 1.34".into()));
        assert!(api_version((1, 30), None).unwrap().contains("nodesProxyPermission"));
        assert!(!api_version((1, 30), None).unwrap().contains("admissionPolicy"));
        assert!(api_version((1, 29), None).unwrap().contains("admissionPolicy=false"));
        assert!(api_version((1, 28), None).unwrap().contains("nativeSidecars=false"));
        assert!(api_version((1, 28), Some(true)).unwrap_err().mend.contains("nativeSidecars=false"));
        assert!(api_version((1, 28), Some(false)).is_ok());
        assert!(api_version((1, 23), Some(false)).unwrap_err().mend.contains("1.24"));
    }
}
