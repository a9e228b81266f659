//! Work that blocks in a pod's namespaces, a bounded number at a time and each in bounded time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Most at once.
const AT_ONCE: usize = 4;
/// Longest work, including the wait for its turn. It takes milliseconds.
const WORK: Duration = Duration::from_secs(3);

/// Turns at such work. Clones share them.
#[derive(Clone)]
pub struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Turns {
    /// Does work once it is its turn.
    ///
    /// # Errors
    /// It failed, or was not done in time, in words.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let done = async {
            let turn = self.0.clone().acquire_owned().await.map_err(|e| e.to_string())?;
            let worked = tokio::task::spawn_blocking(move || {
                // Given back by the work itself, so that work which hangs keeps its turn.
                let _turn = turn;
                work()
            });
            worked.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
        };
        let late = || format!("it took longer than {} s", WORK.as_secs());
        tokio::time::timeout(WORK, done).await.unwrap_or_else(|_| Err(late()))
    }
}
