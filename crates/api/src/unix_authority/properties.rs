//! Properties that hold for any input, tried on many random ones. A failure prints its seed.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // small numbers made up by the tests

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;

const ROUNDS: u64 = 3_000;
const PREFACE_BYTES: &[u8; PREFACE] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The symbols of our Huffman table: those of paths.
const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%/:@";

/// Passes a client's bytes on in pieces of random length.
fn filtered(random: &mut StdRng, mut bytes: &[u8]) -> Vec<u8> {
    let mut filter = Filter::default();
    let mut out = vec![];
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(random.random_range(1..=bytes.len().min(700)));
        filter.push(now);
        out.extend(filter.out().drain(..));
        bytes = later;
    }
    out
}

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
}

fn bytes(random: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..=most)];
    random.fill(&mut bytes[..]);
    bytes
}

fn text(random: &mut StdRng, most: usize) -> String {
    let length = random.random_range(1..=most);
    (0..length).map(|_| char::from(*ALPHABET.choose(random).unwrap())).collect()
}

/// A header as encoded on the wire, and its meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    /// An index only, or a change of the table's size: the first byte.
    Index(u8),
    Literal {
        first: u8,
        name: Option<String>,
        value: String,
    },
}

fn field(random: &mut StdRng) -> (Field, bool) {
    let coded = random.random();
    let index = |random: &mut StdRng| Field::Index(0x80 | random.random_range(1..=61));
    let literal = |random: &mut StdRng, index: u8, name: Option<&str>| {
        let first = *[0x40, 0x00, 0x10].choose(random).unwrap() | index;
        Field::Literal { first, name: name.map(str::to_owned), value: text(random, 300) }
    };
    let field = match random.random_range(0..5) {
        0 => index(random),
        1 => literal(random, 1, None),
        2 => literal(random, 0, Some(":authority")),
        3 => literal(random, 4, None),
        _ => {
            let name = text(random, 40).to_lowercase();
            literal(random, 0, Some(&name))
        }
    };
    (field, coded)
}

/// Encodes a string by RFC 7541 5.1 and 5.2.
fn write_string(text: &str, coded: bool, to: &mut Vec<u8>) {
    let string = if coded { huffman::encode(text) } else { text.as_bytes().to_vec() };
    let flag = u8::from(coded) << 7;
    match u8::try_from(string.len()) {
        Ok(short) if short < 0x7f => to.push(flag | short),
        _ => {
            to.push(flag | 0x7f);
            let mut rest = string.len() - 0x7f;
            while rest >= 0x80 {
                to.push(0x80 | (rest % 0x80) as u8);
                rest /= 0x80;
            }
            to.push(rest as u8);
        }
    }
    to.extend(string);
}

fn write(field: &Field, coded: bool, to: &mut Vec<u8>) {
    match field {
        Field::Index(first) => to.push(*first),
        Field::Literal { first, name, value } => {
            to.push(*first);
            name.iter().for_each(|name| write_string(name, coded, to));
            write_string(value, coded, to);
        }
    }
}

/// Parses a string independently of the filter's own parser.
fn read_string(block: &mut &[u8]) -> String {
    let (coded, mut length) = (block[0] & 0x80 != 0, usize::from(block[0] & 0x7f));
    *block = &block[1..];
    let mut shift = 0;
    while length >= 0x7f && shift < 28 {
        length += usize::from(block[0] & 0x7f) << shift;
        shift += 7;
        let last = block[0] & 0x80 == 0;
        *block = &block[1..];
        if last {
            break;
        }
    }
    let (string, rest) = block.split_at(length);
    *block = rest;
    if coded { huffman::decode(string) } else { String::from_utf8(string.to_vec()).unwrap() }
}

fn read(mut block: &[u8]) -> Vec<Field> {
    let mut fields = vec![];
    while let Some((first, rest)) = block.split_first() {
        block = rest;
        if first & 0x80 != 0 {
            fields.push(Field::Index(*first));
            continue;
        }
        let name = first.trailing_zeros().ge(&4).then(|| read_string(&mut block));
        fields.push(Field::Literal { first: *first, name, value: read_string(&mut block) });
    }
    fields
}

/// The expected result for a field.
fn mended(field: &Field) -> Field {
    match field {
        Field::Literal { first, name, value }
            if name.as_deref() == Some(":authority") || (name.is_none() && first & 0x0f == 1) =>
        {
            Field::Literal { first: *first, name: name.clone(), value: value.replace(['%', '/'], "-") }
        }
        other => other.clone(),
    }
}

#[test]
fn valid_requests_come_through_with_nothing_but_the_authority_mended() {
    for seed in 0..ROUNDS {
        let random = &mut StdRng::seed_from_u64(seed);
        let fields: Vec<(Field, bool)> = (0..random.random_range(1..12)).map(|_| field(random)).collect();
        let mut block = vec![];
        fields.iter().for_each(|(field, coded)| write(field, *coded, &mut block));
        let (padded, prioritised) = (random.random::<bool>(), random.random::<bool>());
        let padding = if padded { random.random_range(0..40) } else { 0 };
        let mut flags = FLAG_END_HEADERS;
        let mut payload = vec![];
        if padded {
            flags |= FLAG_PADDED;
            payload.push(padding);
        }
        if prioritised {
            flags |= FLAG_PRIORITY;
            payload.extend([0, 0, 0, 0, 16]);
        }
        let begin = payload.len();
        payload.extend(&block);
        payload.extend(vec![0; usize::from(padding)]);
        let (before, after) = (frame(4, 0, &bytes(random, 60)), frame(0, 1, &bytes(random, 3_000)));
        let headers = frame(TYPE_HEADERS, flags, &payload);
        let sent = [&PREFACE_BYTES[..], &before, &headers, &after].concat();
        let out = filtered(random, &sent);
        assert_eq!(out.len(), sent.len(), "seed {seed}");
        let at = PREFACE + before.len() + FRAME_HEADER + begin;
        let (head, rest) = out.split_at(at);
        let (got, tail) = rest.split_at(block.len());
        assert_eq!((head, tail), (&sent[..at], &sent[at + block.len()..]), "seed {seed}");
        let expected: Vec<Field> = fields.iter().map(|(field, _)| mended(field)).collect();
        assert_eq!(read(got), expected, "seed {seed}");
    }
}

#[test]
fn whatever_is_sent_no_byte_is_lost_added_or_moved_and_nothing_panics() {
    for seed in 0..ROUNDS {
        let random = &mut StdRng::seed_from_u64(seed);
        let mut sent = PREFACE_BYTES.to_vec();
        for _ in 0..random.random_range(0..6) {
            // Header frames with any flags and any block, some of them valid except for a few bytes; and any other
            // frames.
            let mut block = vec![];
            match random.random_range(0..3) {
                0 => block = bytes(random, 2_000),
                1 => block = bytes(random, MAX_FRAME + 10),
                _ => {
                    for _ in 0..random.random_range(1..8) {
                        let (field, coded) = field(random);
                        write(&field, coded, &mut block);
                    }
                    for _ in 0..random.random_range(0..4) {
                        let at = random.random_range(0..block.len());
                        block[at] = random.random();
                    }
                }
            }
            let kind = if random.random_range(0..4) == 0 { random.random() } else { TYPE_HEADERS };
            sent.extend(frame(kind, random.random(), &block));
        }
        // The last frame may be truncated, and bytes that do not form a frame may follow.
        sent.truncate(random.random_range(PREFACE..=sent.len()));
        sent.extend(bytes(random, 30));
        let out = filtered(random, &sent);
        assert_eq!(filtered(random, &sent), out, "seed {seed}: it matters how the bytes are cut");
        // What was not returned yet is an incomplete header frame or a frame's header.
        assert!(sent.len() - out.len() <= MAX_FRAME + FRAME_HEADER, "seed {seed}");
        let changed = sent.iter().zip(&out).enumerate().filter(|(_, (was, is))| was != is);
        assert!(changed.clone().all(|(at, _)| at >= PREFACE), "seed {seed}");
    }
}

#[test]
fn the_state_that_a_client_can_make_us_keep_is_bounded() {
    let mut filter = Filter::default();
    filter.push(PREFACE_BYTES);
    // A header frame that announces its length and never arrives.
    filter.push(&frame(TYPE_HEADERS, FLAG_END_HEADERS, &[0; MAX_FRAME])[..FRAME_HEADER + 10]);
    let State::Collect { payload, length, .. } = &filter.state else { panic!("it is to be collected") };
    assert!(payload.capacity() <= MAX_FRAME && *length == MAX_FRAME);
    // A longer one passes without being buffered.
    let mut filter = Filter::default();
    filter.push(PREFACE_BYTES);
    filter.push(&frame(TYPE_HEADERS, FLAG_END_HEADERS, &vec![0; MAX_FRAME + 1]));
    assert_eq!(filter.out().len(), PREFACE + FRAME_HEADER + MAX_FRAME + 1);
}
