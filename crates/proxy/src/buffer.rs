//! Buffers that a thread lends: connections that move bytes use them in turn, and an idle one holds none.

use std::cell::RefCell;

/// Bytes moved at once: three TLS records. With more, what is read, encrypted and sent does not stay in the cache: on the
/// machine of docs/benchmarks.md, 48 KiB took 15 % less CPU a byte than 64 KiB, and 256 KiB 20 % more.
pub const CHUNK: usize = 48 * 1024;
/// Longest TLS record on the wire.
pub const RECORD: usize = 5 + 16 * 1024 + 256;
/// Room for a chunk in TLS records, or for a chunk behind the beginning of a record.
const SIZE: usize = CHUNK + RECORD;
/// Buffers that a thread keeps.
const KEPT: usize = 8;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(vec![]) };
}

/// Bytes in a buffer that goes back when dropped.
pub struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// An empty one.
    pub fn lend() -> Self {
        let bytes = POOL.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice());
        Self { bytes, start: 0, end: 0 }
    }

    /// What is in it.
    pub fn content(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// What is in it, to be changed in place.
    pub fn content_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// The first `n` bytes of the content are done with.
    pub fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
    }

    /// Where more goes: all that is free behind the content.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// `n` bytes were put into the room.
    pub fn extend(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len());
    }

    /// Puts bytes behind the content, as many as there is room for.
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
        let bytes = std::mem::take(&mut self.bytes);
        POOL.with_borrow_mut(|pool| {
            if pool.len() < KEPT {
                pool.push(bytes);
            }
        });
    }
}
