//! The capture file format of tcpdump and Wireshark (draft-ietf-opsawg-pcap), and the parts of a frame that `verify`
//! needs.

/// One frame of an Ethernet link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Time of capture, microseconds since 1970.
    pub at_us: u64,
    /// The whole frame, Ethernet header included.
    pub bytes: Vec<u8>,
}

/// A capture file with these frames.
#[allow(clippy::cast_possible_truncation)] // the format's fields are 32 bits wide
pub fn file(frames: &[Frame]) -> Vec<u8> {
    let mut out = vec![];
    let mut put = |numbers: &[u32]| out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    // Magic number with microseconds, version 2.4, no time zone, no accuracy, longest frame, Ethernet.
    put(&[0xa1b2_c3d4, 2 | 4 << 16, 0, 0, super::MAX_FRAME as u32, 1]);
    for frame in frames {
        let length = frame.bytes.len() as u32;
        let (seconds, rest) = (frame.at_us / 1_000_000, frame.at_us % 1_000_000);
        for number in [seconds as u32, rest as u32, length, length] {
            out.extend(number.to_le_bytes());
        }
        out.extend(&frame.bytes);
    }
    out
}

impl Frame {
    /// The payload of a TCP segment to or from this port; `None` if it is not such a segment.
    pub fn tcp_payload(&self, port: u16) -> Option<&[u8]> {
        let packet = self.bytes.get(14..)?;
        let tcp = match self.bytes.get(12..14)? {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
                // Segments that the network card splits later have no length.
                let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
                (*packet.get(9)? == 6).then(|| packet.get(header..end))??
            }
            [0x86, 0xdd] => (*packet.get(6)? == 6).then(|| packet.get(40..))??,
            _ => return None,
        };
        let number = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        if number(0)? != port && number(2)? != port {
            return None;
        }
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        tcp.get(header..).filter(|payload| !payload.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(port: u16, payload: &[u8]) -> Frame {
        let mut bytes = vec![2; 12];
        bytes.extend([0x08, 0x00]);
        let total = u16::try_from(40 + payload.len()).unwrap().to_be_bytes();
        bytes.extend([0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.extend(port.to_be_bytes());
        bytes.extend([0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        Frame { at_us: 1_500_000, bytes }
    }

    #[test]
    fn a_segments_payload_is_found_by_its_port() {
        assert_eq!(segment(15008, b"hello").tcp_payload(15008), Some(&b"hello"[..]));
        assert_eq!(segment(15008, b"hello").tcp_payload(80), None);
        assert_eq!(segment(15008, b"").tcp_payload(15008), None);
        let mut short = segment(15008, b"hello");
        for length in 0..short.bytes.len() {
            short.bytes.truncate(short.bytes.len() - length.min(1));
            let _ = short.tcp_payload(15008);
        }
    }

    #[test]
    fn a_file_has_a_head_and_a_record_a_frame() {
        let made = file(&[segment(1, b"x")]);
        assert_eq!(made[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(made.len(), 24 + 16 + 55);
        assert_eq!(made[24..32], [1, 0, 0, 0, 0x20, 0xa1, 0x07, 0]);
    }
}
