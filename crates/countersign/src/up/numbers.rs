//! Numbers of a mesh's workloads. A number stands for two users, by which the agent knows whose identity a process gets:
//! it is free again only when nothing of the workload before is left that the next one could inherit.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow};

use super::mesh_file::MAX_WORKLOADS;

/// Which numbers are taken; clones are the same.
#[derive(Clone, Default)]
pub struct Numbers(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    taken: BTreeSet<usize>,
    /// Where the search begins: a number comes again as late as possible.
    next: usize,
}

impl Numbers {
    /// Takes a number that no workload has, whose registration entries are gone, and whose users `are_busy` finds no process
    /// of.
    ///
    /// # Errors
    /// All are taken.
    pub fn take(&self, are_busy: impl Fn(usize) -> bool) -> Result<usize> {
        let mut state = self.lock();
        let found = (0..MAX_WORKLOADS)
            .map(|n| (state.next + n) % MAX_WORKLOADS)
            .find(|n| !state.taken.contains(n) && !are_busy(*n));
        let number = found.ok_or_else(|| anyhow!("a mesh on one machine holds at most {MAX_WORKLOADS} workloads"))?;
        state.taken.insert(number);
        state.next = number + 1;
        Ok(number)
    }

    /// Gives a number back.
    pub fn release(&self, number: usize) {
        self.lock().taken.remove(&number);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_comes_again_late_and_never_while_anything_of_it_is_left() {
        let numbers = Numbers::default();
        let free = |_| false;
        assert_eq!((numbers.take(free).unwrap(), numbers.take(free).unwrap()), (0, 1));
        numbers.release(0);
        assert_eq!(numbers.take(free).unwrap(), 2, "the others come first");
        assert_eq!(numbers.take(|n| n == 3).unwrap(), 4, "a process has its users");
        for _ in 5..MAX_WORKLOADS {
            numbers.take(free).unwrap();
        }
        assert_eq!((numbers.take(free).unwrap(), numbers.take(free).unwrap()), (0, 3), "round to what is free");
        assert!(numbers.take(free).unwrap_err().to_string().contains("at most 200 workloads"));
        numbers.release(7);
        assert!(numbers.take(|_| true).is_err());
        assert_eq!(numbers.take(free).unwrap(), 7);
    }
}
