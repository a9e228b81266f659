//! The directory's wire from both ends: [`Subscriptions`] follows addresses, [`serve`] answers those who follow.

mod serve;
mod subscriptions;

pub use serve::{Source, serve};
pub use subscriptions::Subscriptions;
