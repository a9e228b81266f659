//! Accepts gRPC clients that send a Unix socket's path as the HTTP/2 `:authority`.
//!
//! gRPC's C core, and with it Python, C++ and Ruby, sends the percent-encoded path of the socket; grpc-java sends the
//! path itself. Neither is an authority by RFC 9113 8.3.1, and our HTTP/2 library resets such streams. On a Unix socket
//! the authority has no meaning, so this filter, between socket and library, replaces each byte that is not allowed by
//! `-`. `%`, `/` and `-` have codes of one length in HPACK's Huffman code (RFC 7541 B): no byte moves, and the header
//! tables of both sides stay equal.

mod huffman;

use std::collections::VecDeque;

/// Length of the client's preface in bytes (RFC 9113 3.4).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
const TYPE_HEADERS: u8 = 1;
const FLAG_END_HEADERS: u8 = 0x4;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// Longest header frame that is inspected: the most that a client may send by default (RFC 9113 4.2).
const MAX_FRAME: usize = 16_384;

/// `:authority` in HPACK's Huffman code.
const CODED_NAME: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// Filters the bytes that a client sends and corrects the authority of each request.
pub struct Filter {
    state: State,
    out: VecDeque<u8>,
}

enum State {
    /// Number of bytes of the preface, or of an uninteresting frame, that still pass unchanged.
    Pass(usize),
    /// Collects the header of a frame.
    Header(Vec<u8>),
    /// Collects the payload of a header frame, `length` bytes.
    Collect { flags: u8, length: usize, payload: Vec<u8> },
}

impl Default for Filter {
    fn default() -> Self {
        Self { state: State::Pass(PREFACE), out: VecDeque::new() }
    }
}

impl Filter {
    /// Bytes that are ready to be read.
    pub fn out(&mut self) -> &mut VecDeque<u8> {
        &mut self.out
    }

    /// Adds bytes from the client.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Pass(left) => {
                    let (now, later) = bytes.split_at(bytes.len().min(*left));
                    self.out.extend(now);
                    *left -= now.len();
                    bytes = later;
                    if *left == 0 {
                        self.state = State::Header(Vec::with_capacity(FRAME_HEADER));
                    }
                }
                State::Header(header) => {
                    let (now, later) = bytes.split_at(bytes.len().min(FRAME_HEADER - header.len()));
                    header.extend(now);
                    bytes = later;
                    if header.len() == FRAME_HEADER {
                        self.out.extend(header.iter());
                        let length =
                            usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
                        let whole = header[3] == TYPE_HEADERS && header[4] & FLAG_END_HEADERS != 0;
                        self.state = match length {
                            0 => State::Header(Vec::with_capacity(FRAME_HEADER)),
                            1..=MAX_FRAME if whole => State::Collect { flags: header[4], length, payload: Vec::new() },
                            _ => State::Pass(length),
                        };
                    }
                }
                State::Collect { flags, length, payload } => {
                    let (now, later) = bytes.split_at(bytes.len().min(*length - payload.len()));
                    payload.extend(now);
                    bytes = later;
                    if payload.len() == *length {
                        let skip =
                            usize::from(*flags & FLAG_PADDED != 0) + if *flags & FLAG_PRIORITY == 0 { 0 } else { 5 };
                        if let Some(block) = payload.get_mut(skip..) {
                            mend_block(block);
                        }
                        self.out.extend(payload.iter());
                        self.state = State::Header(Vec::with_capacity(FRAME_HEADER));
                    }
                }
            }
        }
    }
}

/// Walks a header block (RFC 7541 6) and corrects literal values of `:authority`. Malformed parts are left unchanged.
fn mend_block(block: &mut [u8]) {
    let mut at = 0;
    while at < block.len() {
        let first = block[at];
        // Number of index bits in the first byte, and whether a literal value follows.
        let (bits, literal) = match first {
            b if b & 0x80 != 0 => (7, false),
            b if b & 0x40 != 0 => (6, true),
            b if b & 0x20 != 0 => (5, false),
            _ => (4, true),
        };
        let Some((index, next)) = integer(block, at, bits) else { return };
        at = next;
        if !literal {
            continue;
        }
        // Entry 1 of the static table is `:authority` (RFC 7541 A); gRPC's C core sends the name literally.
        let mut is_authority = index == 1;
        if index == 0 {
            let Some((coded, length, start)) = string(block, at) else { return };
            let name = &block[start..start + length];
            is_authority = if coded { name == CODED_NAME } else { name == b":authority" };
            at = start + length;
        }
        let Some((coded, length, start)) = string(block, at) else { return };
        let Some(value) = block.get_mut(start..start + length) else { return };
        if is_authority {
            if coded {
                huffman::replace(value, is_foreign);
            } else {
                value.iter_mut().filter(|b| is_foreign(**b)).for_each(|b| *b = b'-');
            }
        }
        at = start + length;
    }
}

/// Whether a byte occurs in paths but not in authorities.
fn is_foreign(byte: u8) -> bool {
    byte == b'%' || byte == b'/'
}

/// An integer with a prefix of `bits` bits (RFC 7541 5.1), and where it ends.
fn integer(block: &[u8], at: usize, bits: u32) -> Option<(usize, usize)> {
    let most = (1usize << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & most;
    let mut at = at + 1;
    if value < most {
        return Some((value, at));
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(at)?;
        at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// A string (RFC 7541 5.2): whether it is Huffman-coded, its length, and where it starts.
fn string(block: &[u8], at: usize) -> Option<(bool, usize, usize)> {
    let coded = *block.get(at)? & 0x80 != 0;
    let (length, start) = integer(block, at, 7)?;
    (start + length <= block.len()).then_some((coded, length, start))
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
