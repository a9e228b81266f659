//! Calls the upstream authority with a deadline: an upstream that hangs must not block this server.
//!
//! Each call has its own thread: reading from a file system that hangs blocks the thread, which the runtime would miss, even at
//! shutdown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use countersign_identity::{JwtAuthority, TrustDomain};
use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::AuthorityError;
use crate::key_manager::Signer;
use crate::signing_ca::request_intermediate;
use crate::upstream_authority::{UpstreamAuthority, UpstreamBundle, UpstreamError, UpstreamSigned};

/// Longest call to the upstream for one signature.
pub const DEADLINE: Duration = Duration::from_secs(20);

struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Calls the upstream, one call of a kind at a time.
pub struct UpstreamCall {
    upstream: Arc<dyn UpstreamAuthority>,
    signing: Arc<AtomicBool>,
    naming: Arc<AtomicBool>,
    publishing: Arc<AtomicBool>,
    turn: tokio::sync::Mutex<()>,
    deadline: Duration,
}

impl UpstreamCall {
    /// Calls `upstream`, each time for at most `deadline`.
    pub fn new(upstream: Arc<dyn UpstreamAuthority>, deadline: Duration) -> Self {
        Self {
            upstream,
            signing: Arc::default(),
            naming: Arc::default(),
            publishing: Arc::default(),
            turn: tokio::sync::Mutex::default(),
            deadline,
        }
    }

    /// Has a CA certificate signed for `key`, of which the upstream gets a request only, and checks the answer. Errors:
    /// the upstream's, with [`UpstreamError::Timeout`] after the deadline.
    /// While a call has not returned, no other one is started.
    pub async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &Arc<dyn Signer>,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, AuthorityError> {
        // A request that cannot be made must not leave it busy.
        let busy = self.begin(&self.signing)?;
        let csr = request_intermediate(trust_domain, &**key).await?;
        let (upstream, asked_for) = (self.upstream.clone(), trust_domain.clone());
        let call = async move { upstream.sign_intermediate(&asked_for, &csr, ttl, now).await };
        let signed = self.apart(busy, call).await?;
        Ok(signed.checked(&self.upstream.name(), trust_domain, key, now).await?)
    }

    /// What the upstream names now. Errors as [`Self::sign_intermediate`].
    pub async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        let (busy, upstream) = (self.begin(&self.naming)?, self.upstream.clone());
        self.apart(busy, async move { upstream.bundle().await }).await
    }

    /// Publishes a key for tokens. Errors as [`Self::sign_intermediate`].
    pub async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        // Servers below wait for each other, and ours for them.
        let turn = tokio::time::timeout(self.deadline, self.turn.lock()).await;
        let _turn = turn.map_err(|_| UpstreamError::Timeout(self.deadline))?;
        let (busy, upstream, key) = (self.begin(&self.publishing)?, self.upstream.clone(), key.clone());
        self.apart(busy, async move { upstream.publish_jwt_key(&key).await }).await
    }

    fn begin(&self, kind: &Arc<AtomicBool>) -> Result<Busy, UpstreamError> {
        let is_busy = kind.swap(true, Ordering::SeqCst);
        if is_busy { Err(UpstreamError::Timeout(self.deadline)) } else { Ok(Busy(kind.clone())) }
    }

    /// Runs a call on a thread of its own, and waits for it until the deadline.
    async fn apart<T: Send + 'static>(
        &self,
        busy: Busy,
        call: impl Future<Output = Result<T, UpstreamError>> + Send + 'static,
    ) -> Result<T, UpstreamError> {
        let (answer, answered) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        let run = move || {
            // Cleared even if the call panics.
            let answered = runtime.block_on(call);
            drop(busy);
            // The caller may have given up already.
            let _ = answer.send(answered);
        };
        std::thread::Builder::new().name("upstream".into()).spawn(run).map_err(|e| UpstreamError::Unreachable {
            upstream: self.upstream.name(),
            why: format!("no thread for the call: {e}"),
        })?;
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(Ok(answered)) => answered,
            // The thread ended without an answer, or is still running.
            Ok(Err(_)) | Err(_) => Err(UpstreamError::Timeout(self.deadline)),
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

        async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            std::future::pending().await
        }

        async fn publish_jwt_key(&self, _: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
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
        // Nor do its roots, which it is asked for beside.
        for _ in 0..3 {
            assert!(matches!(call.bundle().await, Err(UpstreamError::Timeout(_))));
        }
        assert!(hangs.0.load(Ordering::SeqCst) <= 2);
    }
}
