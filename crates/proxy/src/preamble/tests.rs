//! Requests and answers survive the wire, and nothing else is accepted.

use super::*;

fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

#[test]
fn requests_and_answers_survive_the_wire_and_leave_what_follows() {
    for destination in ["10.0.0.1:80", "[fd00::1]:65535"] {
        let request = Request { destination: destination.parse().unwrap(), workload: "web-1".into() };
        let bytes = [&request.encode()[..], b"payload"].concat();
        let mut wire = &bytes[..];
        assert_eq!(block(Request::read(&mut wire)).unwrap(), request);
        assert_eq!(wire, b"payload");
    }
    for answer in [Answer::Accepted, Answer::Refused { code: "not_allowed".into(), text: "no".into() }] {
        let bytes = [&answer.encode()[..], b"payload"].concat();
        let mut wire = &bytes[..];
        assert_eq!(block(Answer::read(&mut wire)).unwrap(), answer);
        assert_eq!(wire, b"payload");
    }
}

#[test]
fn a_mapped_address_is_the_ipv4_one() {
    let request = Request { destination: "[::ffff:10.0.0.1]:80".parse().unwrap(), workload: String::new() };
    assert_eq!(block(Request::read(&mut &request.encode()[..])).unwrap().destination, "10.0.0.1:80".parse().unwrap());
    let mut six = vec![1, 0, 19, 6];
    six.extend("::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets());
    six.extend([0, 80]);
    assert_eq!(block(Request::read(&mut &six[..])).unwrap().destination, "10.0.0.1:80".parse().unwrap());
}

#[test]
fn garbage_is_refused_without_reading_more_than_a_preamble() {
    let good = Request { destination: "10.0.0.1:80".parse().unwrap(), workload: "w".into() }.encode();
    for cut in 0..good.len() {
        assert!(block(Request::read(&mut &good[..cut])).is_err(), "cut at {cut}");
    }
    for bad in [
        &b"GET / HTTP/1.1\r\n"[..],
        &[2, 0, 7, 4, 1, 2, 3, 4, 0, 80],
        &[1, 255, 255],
        &[1, 0, 0],
        &[1, 0, 7, 5, 1, 2, 3, 4, 0, 80],
        &[1, 0, 8, 4, 1, 2, 3, 4, 0, 80, 0xff],
    ] {
        assert!(block(Request::read(&mut &bad[..])).is_err(), "{bad:?}");
    }
    assert!(block(Answer::read(&mut &[1, 1, b'x', 255, 255][..])).is_err());
    assert!(block(Answer::read(&mut &[7][..])).is_err());
    let hostile = Answer::Refused { code: "a\nb".into(), text: "\x1b[31mred".into() }.encode();
    assert_eq!(
        block(Answer::read(&mut &hostile[..])).unwrap(),
        Answer::Refused { code: "unknown".into(), text: r"\u{1b}[31mred".into() }
    );
    for uid in ["a\nb", "\u{1b}[31m", "a b", "ü", "\u{202e}x"] {
        let request = Request { destination: "10.0.0.1:80".parse().unwrap(), workload: uid.into() };
        assert!(block(Request::read(&mut &request.encode()[..])).is_err(), "{uid:?} was believed");
    }
}
