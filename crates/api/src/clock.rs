//! The time, handed in from outside wherever logic depends on it.

use std::sync::Arc;

use time::OffsetDateTime;

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

/// The machine's clock.
pub fn system_clock() -> Clock {
    Arc::new(OffsetDateTime::now_utc)
}
