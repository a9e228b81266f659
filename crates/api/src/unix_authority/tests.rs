//! Input passes unchanged, except for an invalid authority, however it is split into reads.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // small numbers made up by the tests

use super::*;

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
}

fn literal(index: u8, value: &[u8], coded: bool) -> Vec<u8> {
    [&[0x40 | index, u8::from(coded) << 7 | u8::try_from(value.len()).unwrap()][..], value].concat()
}

fn filtered(bytes: &[u8], cut: usize) -> Vec<u8> {
    let mut filter = Filter::default();
    bytes.chunks(cut).for_each(|c| filter.push(c));
    filter.out().drain(..).collect()
}

#[test]
fn the_code_is_the_one_of_the_standard() {
    // From RFC 7541 C.4.1 and C.4.3.
    assert_eq!(
        huffman::encode("www.example.com"),
        [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff]
    );
    assert_eq!(huffman::encode(":authority"), CODED_NAME);
    assert_eq!(huffman::encode("no-cache"), [0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]);
}

#[test]
fn a_path_as_authority_becomes_an_authority_of_the_same_length_and_nothing_else_changes() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for (coded, priority) in [(false, false), (true, false), (false, true), (true, true)] {
        let value = |text: &str| if coded { huffman::encode(text) } else { text.as_bytes().to_vec() };
        let request = |authority: &str| {
            let name = [&[0x00, 6][..], b"x-path", &[5], b"/a%2F"].concat();
            let block = [
                &[0x83, 0x86][..],
                &literal(4, &value("/Service/Method%2F"), coded),
                &literal(1, &value(authority), coded),
                &name,
            ]
            .concat();
            let (flags, head) = if priority { (0x24, &[0, 0, 0, 0, 16][..]) } else { (0x4, &[][..]) };
            [&preface[..], &frame(4, 0, &[0; 6]), &frame(1, flags, &[head, &block].concat()), &frame(0, 1, b"body%/")]
                .concat()
        };
        let (sent, expected) = (request("tmp%2Fim%2Fag.sock"), request("tmp-2Fim-2Fag.sock"));
        for cut in [1, 7, 10_000] {
            assert_eq!(filtered(&sent, cut), expected, "coded {coded}, priority {priority}, cut {cut}");
        }
        assert_eq!(filtered(&request("/run/agent.sock"), 5), request("-run-agent.sock"));
        assert_eq!(filtered(&request("localhost"), 5), request("localhost"));
    }
}

#[test]
fn a_name_that_is_spelled_out_is_known_too() {
    for coded in [false, true] {
        let value = |text: &str| if coded { huffman::encode(text) } else { text.as_bytes().to_vec() };
        let string = |text: &str| {
            [&[u8::from(coded) << 7 | u8::try_from(value(text).len()).unwrap()][..], &value(text)].concat()
        };
        let request = |authority: &str| {
            [&[b'x'; 24][..], &frame(1, 4, &[&[0x40][..], &string(":authority"), &string(authority)].concat())].concat()
        };
        assert_eq!(filtered(&request("run%2Fa"), 3), request("run-2Fa"), "coded {coded}");
    }
}

#[test]
fn garbage_passes_as_it_is() {
    let mut bytes = vec![0u8; 5_000];
    for seed in 0..50u8 {
        bytes
            .iter_mut()
            .enumerate()
            .for_each(|(n, b)| *b = (n as u8).wrapping_mul(31).wrapping_add(seed) ^ (n >> 8) as u8);
        bytes[24 + 3] = 1;
        bytes[24 + 4] = 0x4;
        bytes[24] = 0;
        let out = filtered(&bytes, 997);
        // All of it except an incomplete header frame.
        assert!(bytes.len() - out.len() <= MAX_FRAME, "{seed}");
        assert_eq!(out.len().min(24), 24);
    }
}
