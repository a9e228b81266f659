//! Both ends of the directory's protocol: [`Subscriptions`] follows addresses, [`serve`] answers followers within the
//! bounds of a [`Quota`].

mod quota;
mod serve;
mod subscriptions;

pub use quota::{Quota, QuotaError, Share};
pub use serve::{Source, serve};
pub use subscriptions::Subscriptions;

#[cfg(test)]
mod tests;
