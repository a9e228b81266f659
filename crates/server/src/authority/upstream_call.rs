//! Asks the upstream authority, with a deadline: what stands still there must not stand still here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use countersign_identity::{PrivateKey, TrustDomain};
use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::AuthorityError;
use crate::upstream_authority::{UpstreamAuthority, UpstreamSigned};

/// One signature of the upstream takes no longer.
pub const DEADLINE: Duration = Duration::from_secs(20);

struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The upstream, asked one thing at a time.
pub struct UpstreamCall {
    upstream: Arc<dyn UpstreamAuthority>,
    busy: Arc<AtomicBool>,
    deadline: Duration,
}

impl UpstreamCall {
    /// Asks this one; a signature takes no longer than `deadline`.
    pub fn new(upstream: Arc<dyn UpstreamAuthority>, deadline: Duration) -> Self {
        Self { upstream, busy: Arc::default(), deadline }
    }

    /// Signs a CA certificate for `key`.
    ///
    /// It runs on a thread of its own: reading a file on a file system that hangs blocks its thread, and a thread of the
    /// runtime would be missed, at shutdown too. A call that has not come back is not joined by another one.
    pub async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &PrivateKey,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, AuthorityError> {
        if self.busy.swap(true, Ordering::SeqCst) {
            return Err(AuthorityError::UpstreamTimeout(self.deadline));
        }
        let (answer, answered) = oneshot::channel();
        let (upstream, busy) = (self.upstream.clone(), self.busy.clone());
        let (trust_domain, key) = (trust_domain.clone(), key.clone());
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || {
            // Given back even if the call panics.
            let busy = Busy(busy);
            let signed = runtime.block_on(upstream.sign_intermediate(&trust_domain, &key, ttl, now));
            drop(busy);
            // Whoever asked may have given up.
            let _ = answer.send(signed);
        });
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(Ok(signed)) => Ok(signed?),
            // The thread ended without an answer, or has not ended.
            Ok(Err(_)) | Err(_) => Err(AuthorityError::UpstreamTimeout(self.deadline)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream_authority::UpstreamError;
    use countersign_identity::KeyType;
    use std::sync::atomic::AtomicUsize;

    struct Hangs(AtomicUsize);

    #[async_trait::async_trait]
    impl UpstreamAuthority for Hangs {
        async fn sign_intermediate(
            &self,
            _: &TrustDomain,
            _: &PrivateKey,
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
        let (td, key) = (TrustDomain::new("td").unwrap(), PrivateKey::generate(KeyType::EcP256).unwrap());
        for _ in 0..3 {
            let signed = call.sign_intermediate(&td, &key, Duration::from_secs(60), OffsetDateTime::UNIX_EPOCH).await;
            assert!(matches!(signed, Err(AuthorityError::UpstreamTimeout(_))));
        }
        assert!(hangs.0.load(Ordering::SeqCst) <= 1);
    }
}
