//! Buffers that a thread lends: connections that move bytes use them in turn, and an idle one holds none.
//!
//! A connection whose reader takes nothing keeps one with what is left. Kept buffers are counted, for anybody can make many
//! such connections: while they hold their share of the memory, less is read at once and what is kept is cut to its content.

use std::cell::RefCell;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes moved at once: three TLS records. With more, the data does not stay in the CPU cache between read,
/// encrypt and send: on the machine of docs/benchmarks.md, 48 KiB took 15 % less CPU per byte than 64 KiB, and 256 KiB
/// 20 % more.
pub const CHUNK: usize = 48 * 1024;
/// Longest TLS record on the wire, in bytes (RFC 8446 5.2).
pub const RECORD: usize = 5 + 16 * 1024 + 256;
/// Size of a buffer in bytes: a chunk as TLS records, or a chunk behind the beginning of a record.
const SIZE: usize = CHUNK + RECORD;
/// Buffers in a thread's pool.
const POOLED: usize = 8;
/// Bytes moved at once while kept buffers hold all that they may: a quarter of a record, so that each connection that gets
/// stuck from then on keeps little. One byte costs more then, which is the lesser evil.
const SMALL: usize = 4 * 1024;
/// What kept buffers may hold of the memory. In 256 MiB these are 510 connections that wait with a whole buffer.
const SHARE: usize = 8;

/// Bytes that kept buffers hold, of all threads.
static KEPT: AtomicUsize = AtomicUsize::new(0);
/// Bytes that they may hold before memory counts as short.
static BUDGET: LazyLock<usize> = LazyLock::new(|| {
    let memory = countersign_api::memory::limit().and_then(|bytes| usize::try_from(bytes).ok());
    memory.unwrap_or(usize::MAX) / SHARE
});

#[cfg(test)]
thread_local! {
    /// Makes memory short for this thread's tests.
    pub static SHORT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn is_short() -> bool {
    #[cfg(test)]
    if SHORT.get() {
        return true;
    }
    // Nothing is ordered by it: a connection that reads an older number keeps one buffer more.
    KEPT.load(Ordering::Relaxed) > *BUDGET
}

/// Bytes that a flow may read at once now, and so have to keep.
pub fn chunk() -> usize {
    if is_short() { SMALL } else { CHUNK }
}

/// Bytes that may be received at once now.
pub fn receive() -> usize {
    if is_short() { SMALL } else { SIZE }
}

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(vec![]) };
}

/// A buffer with content, returned to the thread's pool when dropped.
pub struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes that it is counted with; 0 while it is only lent.
    counted: usize,
}

impl Buffer {
    /// Takes an empty buffer from the thread's pool, or allocates one.
    pub fn lend() -> Self {
        let bytes = POOL.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice());
        Self { bytes, start: 0, end: 0, counted: 0 }
    }

    /// It is kept by a connection until it is dropped, for the peer takes nothing now.
    pub fn keep(&mut self) {
        if self.counted > 0 {
            return;
        }
        if is_short() {
            let content = self.content().into();
            give_back(std::mem::replace(&mut self.bytes, content));
            (self.start, self.end) = (0, self.bytes.len());
        }
        self.counted = self.bytes.len();
        KEPT.fetch_add(self.counted, Ordering::Relaxed);
    }

    /// Bytes of memory that it takes.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes that were put in and not consumed.
    pub fn content(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The content, for changes in place.
    pub fn content_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// Removes the first `n` bytes of the content.
    pub fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
    }

    /// The free space behind the content, after moving the content to the start of the buffer.
    pub fn room(&mut self) -> &mut [u8] {
        if self.bytes.len() < SIZE {
            // It was cut to its content when it was kept.
            let mut whole = Self::lend();
            let content = self.content();
            whole.bytes[..content.len()].copy_from_slice(content);
            whole.end = content.len();
            *self = whole;
        }
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// Adds the first `n` bytes of [`Self::room`] to the content.
    pub fn extend(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len());
    }

    /// Appends as many bytes as fit and returns their number.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let room = self.room();
        let n = bytes.len().min(room.len());
        room[..n].copy_from_slice(&bytes[..n]);
        self.extend(n);
        n
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        KEPT.fetch_sub(self.counted, Ordering::Relaxed);
        give_back(std::mem::take(&mut self.bytes));
    }
}

fn give_back(bytes: Box<[u8]>) {
    POOL.with_borrow_mut(|pool| {
        if bytes.len() == SIZE && pool.len() < POOLED {
            pool.push(bytes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_while_memory_is_short_is_as_large_as_its_content_and_grows_again() {
        let held = |buffer: &Buffer| (buffer.bytes.len(), buffer.counted);
        let mut buffer = Buffer::lend();
        buffer.put(b"some bytes");
        buffer.consume(5);
        assert_eq!(held(&buffer), (SIZE, 0), "lent");
        SHORT.set(true);
        buffer.keep();
        assert_eq!((held(&buffer), buffer.content()), ((5, 5), &b"bytes"[..]));
        buffer.consume(1);
        buffer.put(b" and more");
        assert_eq!((held(&buffer), buffer.content()), ((SIZE, 0), &b"ytes and more"[..]));
        SHORT.set(false);
        buffer.keep();
        assert_eq!((held(&buffer), chunk()), ((SIZE, SIZE), CHUNK), "counted whole while there is room");
    }
}
