//! How much a role logs, and the way to change it while it runs.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::Level;

/// Applies a level; `None` applies what the role was started with.
type Apply = Box<dyn Fn(Option<Level>) -> Result<(), String> + Send + Sync>;

/// The level of a role's own lines.
#[derive(Clone)]
pub struct LogLevels(Arc<Levels>);

struct Levels {
    launch: Level,
    current: Mutex<Level>,
    apply: Apply,
}

impl fmt::Debug for LogLevels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogLevels({}, started with {})", self.current(), self.launch())
    }
}

impl LogLevels {
    /// Of a role that was started with `launch`.
    pub fn new(launch: Level, apply: impl Fn(Option<Level>) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Levels { launch, current: Mutex::new(launch), apply: Box::new(apply) }))
    }

    /// Of a role whose level stays as it is.
    pub fn fixed(launch: Level) -> Self {
        Self::new(launch, |_| Err("this role's level of logging cannot be changed".to_owned()))
    }

    /// What the role was started with.
    pub fn launch(&self) -> Level {
        self.0.launch
    }

    /// What applies now.
    pub fn current(&self) -> Level {
        *self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies this level; `None` applies what the role was started with. Errors: why it cannot be changed.
    pub fn set(&self, level: Option<Level>) -> Result<(), String> {
        let mut current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        (self.0.apply)(level)?;
        *current = level.unwrap_or(self.0.launch);
        Ok(())
    }
}
