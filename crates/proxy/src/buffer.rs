//! Buffers from a pool per thread: connections that move bytes take turns with them, and an idle connection holds none.

use std::cell::RefCell;

/// Most bytes moved at once: three TLS records. With more, the data does not stay in the CPU cache between read,
/// encrypt and send: on the machine of docs/benchmarks.md, 48 KiB took 15 % less CPU per byte than 64 KiB, and 256 KiB
/// 20 % more.
pub const CHUNK: usize = 48 * 1024;
/// Longest TLS record on the wire, in bytes (RFC 8446 5.2).
pub const RECORD: usize = 5 + 16 * 1024 + 256;
/// Size of a buffer in bytes: a chunk as TLS records, or a chunk behind the beginning of a record.
const SIZE: usize = CHUNK + RECORD;
/// Most buffers that the pool of a thread keeps; further ones are freed.
const KEPT: usize = 8;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(vec![]) };
}

/// A buffer with content, returned to the thread's pool when dropped.
pub struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// Takes an empty buffer from the thread's pool, or allocates one.
    pub fn lend() -> Self {
        let bytes = POOL.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice());
        Self { bytes, start: 0, end: 0 }
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
        let bytes = std::mem::take(&mut self.bytes);
        POOL.with_borrow_mut(|pool| {
            if pool.len() < KEPT {
                pool.push(bytes);
            }
        });
    }
}
