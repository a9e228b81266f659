//! Records, keys and handshake: rustls' unbuffered engines, asked in the same way at both ends.

use std::io;

use rustls::CommonState;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, UnbufferedStatus, WriteTraffic};

use crate::buffer::Buffer;

/// Longest `ClientHello`, in bytes. Ours has some 1,500, of which the post-quantum key share takes 1,216; other
/// implementations add groups and extensions.
pub const MAX_HELLO: usize = 6 * 1024;
/// Longest unfinished part of a flight after it, in bytes: the longest chain that the verifier reads takes 48 KiB.
pub const MAX_FLIGHT: usize = 50 * 1024;

/// One end's state machine.
pub trait Engine: Unpin {
    /// What tells the ends apart.
    type Data;
    /// Bytes of the first message that comes in, at most.
    const MAX_FIRST: usize;
    /// [`UnbufferedClientConnection`]'s or [`UnbufferedServerConnection`]'s.
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    /// What the handshake agreed.
    fn state(&self) -> &CommonState;
}

impl Engine for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    const MAX_FIRST: usize = MAX_FLIGHT;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }
}

impl Engine for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    const MAX_FIRST: usize = MAX_HELLO;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn state(&self) -> &CommonState {
        self
    }
}

/// Lets the engine take what came in, hand out what it decrypts, and say what it has to say into `out`; then, when it
/// may write, `write`. Gives the bytes taken.
pub fn digest<E: Engine>(
    engine: &mut E,
    incoming: &mut [u8],
    out: &mut Option<Buffer>,
    ended: &mut bool,
    mut plain: impl FnMut(&[u8]),
    write: impl FnOnce(&mut WriteTraffic<'_, E::Data>, &mut Option<Buffer>) -> io::Result<()>,
) -> io::Result<usize> {
    let mut used = 0;
    loop {
        let UnbufferedStatus { discard, state } = engine.process(&mut incoming[used..]);
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(invalid)?;
                    used += record.discard;
                    plain(record.payload);
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => fill(out, |room| data.encode(room))?,
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            Ok(ConnectionState::PeerClosed) => *ended = true,
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                write(&mut traffic, out)?;
                return Ok(used + discard);
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::Closed) => return Ok(used + discard),
            Ok(_) => return Err(invalid(rustls::Error::General("early data, which we never offer".into()))),
            Err(error) => {
                // What it has for the peer still; it must not be shown the same bytes again beyond that.
                while engine.state().wants_write() {
                    match engine.process(&mut []).state {
                        Ok(ConnectionState::EncodeTlsData(mut data)) => fill(out, |room| data.encode(room))?,
                        _ => break,
                    }
                }
                return Err(invalid(error));
            }
        }
        used += discard;
    }
}

/// Lets the engine put something behind what is there.
pub fn fill<E: std::fmt::Display>(
    out: &mut Option<Buffer>,
    put: impl FnOnce(&mut [u8]) -> Result<usize, E>,
) -> io::Result<()> {
    let out = out.get_or_insert_with(Buffer::lend);
    let written = put(out.room()).map_err(|e| invalid(rustls::Error::General(e.to_string())))?;
    out.extend(written);
    Ok(())
}

/// As the stream tells it: [`io::ErrorKind::InvalidData`], which holds it.
pub fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
