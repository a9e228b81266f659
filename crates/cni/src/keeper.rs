//! Keeps the plugin installed: its file first, then the entry in the node's configuration, which the runtime follows at
//! once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::binary::Binary;
use crate::conf::ConfDir;
use crate::metrics::Metrics;

/// How often both are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// Longest look, after which the plugin does not count as installed.
const LATE: Duration = Duration::from_secs(15);

/// What the last look found.
struct Last {
    at: Instant,
    missing: Option<String>,
}

/// Keeps the plugin installed.
pub struct Keeper {
    parts: Arc<Mutex<Parts>>,
    last: Mutex<Last>,
    metrics: Arc<Metrics>,
}

/// The two parts of an installation.
struct Parts {
    binary: Binary,
    conf: ConfDir,
}

/// What a look wrote.
#[derive(Default)]
struct Written {
    binary: bool,
    /// Name of the configuration, escaped.
    conf: Option<String>,
}

impl Parts {
    fn ensure(&mut self) -> Result<Written, String> {
        let binary = self.binary.ensure().map_err(|e| format!("cannot write the plugin's file: {e}"));
        if binary.is_err() && !self.binary.exists() {
            // The runtime could start no pod.
            self.conf.remove().map_err(|e| e.to_string())?;
        }
        Ok(Written { binary: binary?, conf: self.conf.ensure().map_err(|e| e.to_string())? })
    }
}

impl Keeper {
    /// Nothing is installed yet.
    pub fn new(binary: Binary, conf: ConfDir, metrics: Arc<Metrics>) -> Self {
        let last = Last { at: Instant::now(), missing: Some("the plugin is not installed yet".into()) };
        Self { parts: Arc::new(Mutex::new(Parts { binary, conf })), last: Mutex::new(last), metrics }
    }

    /// Why the plugin is not installed; `None` if it is.
    pub fn missing(&self) -> Option<String> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.at.elapsed() > LATE {
            return Some(format!("the node's folders have not answered for {} s", last.at.elapsed().as_secs()));
        }
        last.missing.clone()
    }

    /// Installs the plugin and keeps it so, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut first = true;
        loop {
            let looked = self.blocking(Parts::ensure).await;
            self.note(&looked, first);
            first &= looked.is_err();
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }

    /// Removes the entry. The file stays, because more may name it than this configuration: what a runtime remembers of
    /// each pod for its end (CRI-O), and copies of other tools. Without it such pods could neither start nor end; by
    /// itself it lets every pod pass.
    pub async fn remove(&self) {
        match self.blocking(|parts| parts.conf.remove().map_err(|e| e.to_string())).await {
            Ok(()) => tracing::info!("the entry of the plugin is removed, its file stays"),
            Err(error) => tracing::error!(error, "the entry of the plugin cannot be removed"),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Parts) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let parts = self.parts.clone();
        let work = move || work(&mut parts.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string()).flatten()
    }

    /// Notes what a look found, and logs what has changed.
    fn note(&self, looked: &Result<Written, String>, first: bool) {
        let missing = looked.as_ref().err().cloned();
        match looked {
            Ok(Written { binary, conf }) if first => {
                let conf = conf.as_deref().unwrap_or("as before");
                tracing::info!(conf, binary, "the plugin is installed");
            }
            Ok(Written { binary, conf }) => {
                if *binary {
                    self.metrics.restored("binary");
                    tracing::warn!("the plugin's file was missing or another one, and is written again");
                }
                if let Some(conf) = conf {
                    self.metrics.restored("configuration");
                    tracing::warn!(conf, "the node's network configuration lacked the plugin, and has it again");
                }
            }
            Err(_) => {}
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &missing
            && last.missing != missing
        {
            tracing::error!(why, "the plugin is not installed");
        }
        self.metrics.installed.set(i64::from(missing.is_none()));
        *last = Last { at: Instant::now(), missing };
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::plugin::NAME;

    const LIST: &str = "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"a\"}]}\n";

    async fn until(what: &str, look: impl Fn() -> bool) {
        let waited = async {
            while !look() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), waited).await.unwrap_or_else(|_| panic!("{what}"));
    }

    #[tokio::test]
    async fn what_another_tool_rewrites_comes_back_and_the_end_leaves_only_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (bin, conf) = (dir.path().join("bin"), dir.path().join("conf"));
        [&bin, &conf].into_iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let (list, source) = (conf.join("10-a.conflist"), dir.path().join("program"));
        std::fs::write(&source, "program").unwrap();
        let metrics = Arc::new(Metrics::default());
        std::fs::write(bin.join("a"), "a").unwrap();
        let entry = ConfDir::new(conf.clone(), bin.clone(), json!({ "type": NAME }));
        let keeper = Arc::new(Keeper::new(Binary::new(source, &bin), entry, metrics.clone()));
        assert!(keeper.missing().is_some());
        let stop = CancellationToken::new();
        let running = tokio::spawn({
            let (keeper, stop) = (keeper.clone(), stop.clone());
            async move { keeper.run(stop).await }
        });
        until("the reason", || keeper.missing().is_some_and(|why| why.contains("no network configuration yet"))).await;
        assert_eq!(metrics.installed.get(), 0);
        std::fs::write(&list, LIST).unwrap();
        until("the plugin", || keeper.missing().is_none()).await;
        let has = |path: &Path| std::fs::read_to_string(path).is_ok_and(|text| text.contains(NAME));
        assert!(has(&list) && bin.join(NAME).exists());
        let restored = |what| metrics.times_restored(what);
        assert_eq!(restored("configuration"), 0);
        std::fs::write(&list, LIST).unwrap();
        std::fs::remove_file(bin.join(NAME)).unwrap();
        let changed = Instant::now();
        until("both again", || has(&list) && bin.join(NAME).exists()).await;
        assert!(changed.elapsed() < Duration::from_secs(2));
        until("the count", || (restored("configuration"), restored("binary")) == (1, 1)).await;
        stop.cancel();
        running.await.unwrap();
        keeper.remove().await;
        assert_eq!(std::fs::read_to_string(&list).unwrap(), LIST);
        assert!(bin.join(NAME).exists(), "what names it still has to find it");
    }
}
