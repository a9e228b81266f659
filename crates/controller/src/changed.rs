//! What has changed in the view of the cluster since a reader looked last, by key where single objects matter.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;

use crate::store::Key;

/// Most keys that are kept for a reader. One that is further behind looks at everything.
const MAX_KEYS: usize = 20_000;

/// What has changed.
#[derive(Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each is a kind
pub struct Changed {
    /// Pods that came, went or changed.
    pub pods: HashSet<Key>,
    /// Endpoint slices likewise.
    pub slices: HashSet<Key>,
    /// `SpiffeID` objects likewise.
    pub spiffe_ids: HashSet<Key>,
    /// Some Services. Many pods depend on one.
    pub services: bool,
    /// Some nodes.
    pub nodes: bool,
    /// Some namespaces.
    pub namespaces: bool,
    /// The mesh's settings.
    pub mesh: bool,
    /// Whatever there is: a kind was listed anew, or there were too many changes to keep.
    pub everything: bool,
}

impl Changed {
    /// For a reader that has seen nothing yet.
    fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Forgets keys that are too many.
    fn bound(&mut self) {
        if self.everything || self.pods.len() + self.slices.len() + self.spiffe_ids.len() > MAX_KEYS {
            *self = Self::everything();
        }
    }
}

/// The readers of a view. The view's lock is held while a change is made and told to them, and while a reader takes it,
/// so that what a reader sees and what it takes are of the same moment.
#[derive(Default)]
pub struct Readers(Mutex<Vec<Weak<Mutex<Changed>>>>);

impl Readers {
    /// A new reader, for which everything has changed.
    pub fn subscribe(&self, versions: watch::Receiver<u64>) -> Reader {
        let changed = Arc::new(Mutex::new(Changed::everything()));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&changed));
        Reader { changed, versions }
    }

    /// Tells all readers.
    pub fn tell(&self, mark: impl Fn(&mut Changed)) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|reader| {
            let Some(changed) = reader.upgrade() else { return false };
            let mut changed = changed.lock().unwrap_or_else(PoisonError::into_inner);
            mark(&mut changed);
            changed.bound();
            true
        });
    }
}

/// One who follows a view.
pub struct Reader {
    changed: Arc<Mutex<Changed>>,
    versions: watch::Receiver<u64>,
}

impl Reader {
    /// Takes what has changed since the last time.
    pub fn take(&mut self) -> Changed {
        self.versions.mark_unchanged();
        std::mem::take(&mut self.changed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for a change. Error: the view is gone.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.versions.changed().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        ("n".to_owned(), n.to_string())
    }

    #[test]
    fn each_reader_takes_each_change_once_and_begins_with_everything() {
        let (sender, readers) = (watch::Sender::new(0), Readers::default());
        let mut a = readers.subscribe(sender.subscribe());
        assert!(a.take().everything);
        let mut b = readers.subscribe(sender.subscribe());
        readers.tell(|c| c.pods.extend([key(1)]));
        readers.tell(|c| c.nodes = true);
        assert!(b.take().everything);
        assert_eq!(a.take(), Changed { pods: [key(1)].into(), nodes: true, ..Changed::default() });
        assert_eq!(a.take(), Changed::default());
        drop(b);
        readers.tell(|c| c.mesh = true);
        assert_eq!(readers.0.lock().unwrap().len(), 1, "one that is gone is forgotten");
    }

    #[test]
    fn a_reader_that_is_too_far_behind_looks_at_everything() {
        let (sender, readers) = (watch::Sender::new(0), Readers::default());
        let mut reader = readers.subscribe(sender.subscribe());
        reader.take();
        (0..=MAX_KEYS).for_each(|n| readers.tell(|c| c.spiffe_ids.extend([key(n)])));
        assert_eq!(reader.take(), Changed::everything());
    }
}
