//! The wall clock, passed in wherever logic depends on time.

use std::sync::Arc;

use time::OffsetDateTime;

/// Returns the current time.
pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

/// The system's clock, in UTC.
pub fn system_clock() -> Clock {
    Arc::new(OffsetDateTime::now_utc)
}
