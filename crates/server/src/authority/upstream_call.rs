//! Calls the upstream authority with a deadline: an upstream that hangs must not block this server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use countersign_identity::TrustDomain;
use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::AuthorityError;
use crate::key_manager::Signer;
use crate::signing_ca::request_intermediate;
use crate::upstream_authority::{UpstreamAuthority, UpstreamError, UpstreamSigned};

/// Longest call to the upstream for one signature.
pub const DEADLINE: Duration = Duration::from_secs(20);

struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Calls the upstream, one call at a time.
pub struct UpstreamCall {
    upstream: Arc<dyn UpstreamAuthority>,
    busy: Arc<AtomicBool>,
    deadline: Duration,
}

impl UpstreamCall {
    /// Calls `upstream`, each time for at most `deadline`.
    pub fn new(upstream: Arc<dyn UpstreamAuthority>, deadline: Duration) -> Self {
        Self { upstream, busy: Arc::default(), deadline }
    }

    /// Has a CA certificate signed for `key`, of which the upstream gets a request only, and checks the answer. Errors:
    /// the upstream's, with [`UpstreamError::Timeout`] after the deadline.
    ///
    /// Runs on its own thread: reading from a file system that hangs blocks the thread, which the runtime would miss,
    /// even at shutdown. While a call has not returned, no other one is started.
    pub async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &Arc<dyn Signer>,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, AuthorityError> {
        if self.busy.swap(true, Ordering::SeqCst) {
            return Err(UpstreamError::Timeout(self.deadline).into());
        }
        // A request that cannot be made must not leave it busy.
        let busy = Busy(self.busy.clone());
        let csr = request_intermediate(trust_domain, &**key).await?;
        let (answer, answered) = oneshot::channel();
        let (upstream, asked_for) = (self.upstream.clone(), trust_domain.clone());
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || {
            // Cleared even if the call panics.
            let signed = runtime.block_on(upstream.sign_intermediate(&asked_for, &csr, ttl, now));
            drop(busy);
            // The caller may have given up already.
            let _ = answer.send(signed);
        });
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(Ok(signed)) => Ok(signed?.checked(&self.upstream.name(), trust_domain, key, now).await?),
            // The thread ended without an answer, or is still running.
            Ok(Err(_)) | Err(_) => Err(UpstreamError::Timeout(self.deadline).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_manager::ephemeral;
    use countersign_identity::KeyType;
    use std::sync::atomic::AtomicUsize;

    struct Hangs(AtomicUsize);

    #[async_trait::async_trait]
    impl UpstreamAuthority for Hangs {
        fn name(&self) -> String {
            "hangs".into()
        }

        async fn sign_intermediate(
            &self,
            _: &TrustDomain,
            _: &[u8],
            _: Duration,
            _: OffsetDateTime,
        ) -> Result<UpstreamSigned, UpstreamError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn an_upstream_that_hangs_is_given_up_and_asked_once() {
        let hangs = Arc::new(Hangs(AtomicUsize::new(0)));
        let call = UpstreamCall::new(hangs.clone(), Duration::from_millis(50));
        let (td, key) = (TrustDomain::new("td").unwrap(), ephemeral(KeyType::EcP256).unwrap());
        for _ in 0..3 {
            let signed = call.sign_intermediate(&td, &key, Duration::from_secs(60), OffsetDateTime::UNIX_EPOCH).await;
            assert!(matches!(signed, Err(AuthorityError::Unsigned(UpstreamError::Timeout(_)))));
        }
        assert!(hangs.0.load(Ordering::SeqCst) <= 1);
    }
}
