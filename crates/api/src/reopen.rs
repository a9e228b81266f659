//! The signal to reopen log files: logrotate sends SIGHUP after it has renamed them.

use tokio::sync::watch;

/// Receives requests to reopen the logs. The default never receives one.
#[derive(Debug, Clone, Default)]
pub struct Reopen(Option<watch::Receiver<u64>>);

/// Sends requests to all clones of its [`Reopen`].
#[derive(Debug)]
pub struct Reopener(watch::Sender<u64>);

/// A connected pair of sender and receiver.
pub fn channel() -> (Reopener, Reopen) {
    let (asks, heard) = watch::channel(0);
    (Reopener(asks), Reopen(Some(heard)))
}

impl Reopener {
    /// Sends one request. Requests that were not received yet are merged.
    pub fn ask(&self) {
        self.0.send_modify(|n| *n += 1);
    }
}

impl Reopen {
    /// Resolves at the next request that this clone has not received. Cancel safe.
    pub async fn asked(&mut self) {
        if let Some(heard) = &mut self.0
            && heard.changed().await.is_ok()
        {
            return;
        }
        // The sender is gone: no further request can come.
        self.0 = None;
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn each_clone_hears_each_request_and_a_default_hears_none() {
        let heard =
            async |reopen: &mut Reopen| tokio::time::timeout(Duration::from_millis(50), reopen.asked()).await.is_ok();
        let (reopener, mut first) = channel();
        let mut second = first.clone();
        assert!(!heard(&mut first).await);
        reopener.ask();
        assert!(heard(&mut first).await && heard(&mut second).await && !heard(&mut first).await);
        drop(reopener);
        assert!(!heard(&mut first).await && !heard(&mut Reopen::default()).await);
    }
}
