//! The first bytes inside a mesh connection (ALPN `countersign/1`): its destination, and the answer. The app's bytes
//! follow.
//!
//! Request: version (1), length of the rest (2), family 4 or 6 (1), address (4 or 16), port (2), workload UID (the rest).
//! Answer: 0, or 1 with code (length 1, bytes) and reason (length 2, bytes). Numbers are big-endian.

use std::io;
use std::net::{IpAddr, SocketAddr};

use countersign_identity::shown::sentence;
use tokio::io::{AsyncRead, AsyncReadExt};

/// ALPN protocol name.
pub const ALPN: &[u8] = b"countersign/1";
/// Longest workload UID, in bytes.
const MAX_UID: usize = 255;
/// Longest code of a refusal that is accepted, in bytes.
const MAX_CODE: usize = 64;
/// Longest reason that is sent or read, in bytes.
const MAX_REASON: usize = 1024;

const VERSION: u8 = 1;
const ACCEPTED: u8 = 0;
const REFUSED: u8 = 1;

/// The caller's request: where the connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The destination that the app dialled.
    pub destination: SocketAddr,
    /// UID of the workload that the caller's directory names there; empty for a fixed destination.
    pub workload: String,
}

/// The called sidecar's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Accepted; the app's bytes follow.
    Accepted,
    /// Refused; nothing follows.
    Refused {
        /// Name for programs: [`crate::refusal::Refused::code`].
        code: String,
        /// Reason for people.
        text: String,
    },
}

impl Request {
    /// The request as sent on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let ip = self.destination.ip().to_canonical();
        let uid = &self.workload.as_bytes()[..self.workload.len().min(MAX_UID)];
        let mut body = Vec::with_capacity(24 + uid.len());
        match ip {
            IpAddr::V4(ip) => {
                body.push(4);
                body.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                body.push(6);
                body.extend(ip.octets());
            }
        }
        body.extend(self.destination.port().to_be_bytes());
        body.extend(uid);
        let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
        [&[VERSION][..], &length.to_be_bytes(), &body].concat()
    }

    /// Reads one request and not a byte more. Errors: [`io::ErrorKind::InvalidData`] if it is malformed or too long.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut head = [0; 3];
        stream.read_exact(&mut head).await?;
        if head[0] != VERSION {
            return Err(malformed(format!("version {}, only {VERSION} is spoken here", head[0])));
        }
        let length = usize::from(u16::from_be_bytes([head[1], head[2]]));
        if !(7..=19 + MAX_UID).contains(&length) {
            return Err(malformed(format!("{length} bytes long")));
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        Self::parse(&body).ok_or_else(|| malformed("cannot be parsed".into()))
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let (family, rest) = body.split_first()?;
        let (ip, rest): (IpAddr, _) = match family {
            4 => {
                let (ip, rest) = rest.split_first_chunk::<4>()?;
                ((*ip).into(), rest)
            }
            6 => {
                let (ip, rest) = rest.split_first_chunk::<16>()?;
                ((*ip).into(), rest)
            }
            _ => return None,
        };
        let (port, uid) = rest.split_first_chunk::<2>()?;
        // The UID goes into errors and logs. Our UIDs are printable ASCII, so anything else is rejected.
        if uid.len() > MAX_UID || !uid.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let workload = std::str::from_utf8(uid).ok()?.to_owned();
        Some(Self { destination: SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(*port)), workload })
    }
}

impl Answer {
    /// The answer as sent on the wire; code and reason are shortened to fit.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Accepted => vec![ACCEPTED],
            Self::Refused { code, text } => {
                let code = &code.as_bytes()[..code.len().min(255)];
                let text = &text.as_bytes()[..text.len().min(MAX_REASON)];
                let lengths =
                    (u8::try_from(code.len()).unwrap_or(u8::MAX), u16::try_from(text.len()).unwrap_or(u16::MAX));
                [&[REFUSED, lengths.0][..], code, &lengths.1.to_be_bytes(), text].concat()
            }
        }
    }

    /// Reads one answer and not a byte more. Errors: [`io::ErrorKind::InvalidData`] if it is malformed or too long.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        match stream.read_u8().await? {
            ACCEPTED => Ok(Self::Accepted),
            REFUSED => {
                let mut code = vec![0; usize::from(stream.read_u8().await?)];
                stream.read_exact(&mut code).await?;
                let length = usize::from(stream.read_u16().await?);
                if length > MAX_REASON {
                    return Err(malformed(format!("a reason of {length} bytes")));
                }
                let mut text = vec![0; length];
                stream.read_exact(&mut text).await?;
                // Both go into logs. Our codes are lower-case words; any other bytes are replaced.
                let is_word =
                    (1..=MAX_CODE).contains(&code.len()) && code.iter().all(|b| b.is_ascii_lowercase() || *b == b'_');
                let code = if is_word { String::from_utf8_lossy(&code).into_owned() } else { "unknown".to_owned() };
                let text = sentence(&String::from_utf8_lossy(&text), MAX_REASON).to_string();
                Ok(Self::Refused { code, text })
            }
            other => Err(malformed(format!("answer {other}"))),
        }
    }
}

fn malformed(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests;
