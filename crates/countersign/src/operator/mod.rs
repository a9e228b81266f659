//! Commands that call a running server, agent or sidecar. Each prints a table, or JSON with `--output json`.

pub mod authority;
pub mod bundle;
pub mod entry;
pub mod federation;
pub mod jwt;
pub mod logger;
pub mod mint;
pub mod node;
pub mod output;
pub mod status;
pub mod token;
pub mod x509;

use anyhow::Result;
use countersign_api::spire::types;
use countersign_identity::trust_domain::{parse_id, parse_trust_domain, parse_workload_id};
use countersign_identity::{Selector, SpiffeId, TrustDomain};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::settings::Mistake;

/// Runs a command on a single-threaded runtime.
pub fn block<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // Otherwise the end of a program that was given up, such as one for credentials, would be waited for.
    runtime.shutdown_background();
    done
}

/// Seconds since 1970 as RFC 3339; 0 is never.
pub(crate) fn when(seconds: i64) -> String {
    if seconds == 0 {
        return "never".into();
    }
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| seconds.to_string())
}

/// A SPIFFE ID from the wire as text.
fn shown(id: Option<&types::Spiffeid>) -> String {
    id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default()
}

fn workload_id(flag: &str, text: &str) -> Result<types::Spiffeid, Mistake> {
    let id: SpiffeId = parse_workload_id(text).map_err(|e| Mistake::flag(flag, &e.to_string()))?;
    Ok(countersign_api::convert::id_to_wire(&id))
}

fn any_id(flag: &str, text: &str) -> Result<SpiffeId, Mistake> {
    parse_id(text).map_err(|e| Mistake::flag(flag, &e.to_string()))
}

/// A trust domain, by its name or as `spiffe://NAME`.
fn trust_domain(flag: &str, text: &str) -> Result<TrustDomain, Mistake> {
    let name = text.strip_prefix("spiffe://").unwrap_or(text);
    parse_trust_domain(name).map_err(|e| Mistake::flag(flag, &e.to_string()))
}

fn selectors(texts: &[String]) -> Result<Vec<types::Selector>, Mistake> {
    let parsed = texts.iter().map(|s| s.parse::<Selector>()).collect::<Result<Vec<_>, _>>();
    let parsed = parsed.map_err(|e| Mistake::flag("--selector", &e.to_string()))?;
    Ok(countersign_api::convert::selectors_to_wire(&parsed))
}

/// Fails with the message of a status that is not OK.
fn ok(status: Option<types::Status>) -> Result<()> {
    match status {
        Some(s) if s.code != 0 => Err(anyhow::anyhow!(s.message)),
        _ => Ok(()),
    }
}
