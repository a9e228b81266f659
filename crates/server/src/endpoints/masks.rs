//! Output masks: fields that a caller did not request are left out.

use countersign_api::spire::types;

macro_rules! mask {
    ($name:ident, $message:ident, $mask:ident, $($field:ident),*) => {
        /// Keeps the ID and the fields of the mask; without a mask, all fields.
        pub fn $name(mut message: types::$message, mask: Option<types::$mask>) -> types::$message {
            if let Some(mask) = mask {
                $(if !mask.$field {
                    message.$field = Default::default();
                })*
            }
            message
        }
    };
}

mask!(
    entry,
    Entry,
    EntryMask,
    spiffe_id,
    parent_id,
    selectors,
    x509_svid_ttl,
    federates_with,
    admin,
    downstream,
    expires_at,
    dns_names,
    revision_number,
    store_svid,
    jwt_svid_ttl,
    hint,
    created_at,
    additional_attributes
);
mask!(bundle, Bundle, BundleMask, x509_authorities, jwt_authorities, refresh_hint, sequence_number);
mask!(
    relationship,
    FederationRelationship,
    FederationRelationshipMask,
    bundle_endpoint_url,
    bundle_endpoint_profile,
    trust_domain_bundle
);
mask!(
    agent,
    Agent,
    AgentMask,
    attestation_type,
    x509svid_serial_number,
    x509svid_expires_at,
    selectors,
    banned,
    can_reattest
);

/// Takes the fields of the mask from `change` and keeps the others; without a mask, takes all fields.
pub fn update_entry(before: types::Entry, change: types::Entry, mask: Option<types::EntryMask>) -> types::Entry {
    let Some(m) = mask else { return types::Entry { id: before.id, created_at: before.created_at, ..change } };
    macro_rules! pick {
        ($($field:ident),*) => {
            types::Entry { id: before.id, created_at: before.created_at, revision_number: before.revision_number,
                $($field: if m.$field { change.$field } else { before.$field }),* }
        };
    }
    pick!(
        spiffe_id,
        parent_id,
        selectors,
        x509_svid_ttl,
        federates_with,
        admin,
        downstream,
        expires_at,
        dns_names,
        store_svid,
        jwt_svid_ttl,
        hint,
        additional_attributes
    )
}
