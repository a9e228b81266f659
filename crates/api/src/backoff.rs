//! Exponential backoff with jitter, so that many clients do not reconnect at once.

use std::time::Duration;

/// Delays that double from `first` to `most`; each one is drawn from the upper half of its range.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// A backoff that starts at `first` and never exceeds `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (self.next * 2).min(self.most);
        delay / 2 + (delay / 2).mul_f64(rand::random::<f64>())
    }

    /// Starts again at the first delay, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_most_and_start_anew() {
        let mut b = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        for most in [100, 200, 350, 350] {
            let d = b.next_delay();
            assert!(d >= Duration::from_millis(most / 2) && d <= Duration::from_millis(most), "{d:?}");
        }
        b.reset();
        assert!(b.next_delay() <= Duration::from_millis(100));
    }
}
