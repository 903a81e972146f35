//! Waits for the head of a connection's first request while it lies in the kernel: one that never comes, of which there may
//! be thousands at a time, costs none of the buffers that a connection in use has.

use super::door::Conn;
use rustix::net::RecvFlags;
use std::io;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes that are looked at. A longer head is worth its buffers.
const LOOK_MAX: usize = 4 << 10;
/// For a client whose headers did not come in time, or whose place somebody else needed before they had.
const TOO_SLOW: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// What HTTP/2 begins with.
pub(super) const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// As much of it as tells the versions apart: clients of HTTP/2 would take words for a broken frame.
const H2: &[u8] = b"PRI ";

/// Returns when there is a whole head, or something that will not become one: who reads it next will know.
///
/// # Errors
/// The socket's. Nothing is read from it.
pub(super) async fn arrives(socket: &TcpStream, conn: &Conn) -> io::Result<()> {
    loop {
        if socket.ready(Interest::READABLE).await?.is_read_closed() {
            return Ok(());
        }
        let looked = socket.try_io(Interest::READABLE, || {
            let mut seen = [0; LOOK_MAX];
            let (n, _) = rustix::net::recv(socket, &mut seen, RecvFlags::PEEK)?;
            if n > 0 {
                conn.heard(is_h2(&seen[..n]));
            }
            // With this error the next look is taken when more has come, and not before.
            if n == 0 || is_settled(&seen[..n]) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match looked {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            looked => return looked,
        }
    }
}

/// Says to a client that its head came too slowly. A courtesy: whoever cannot take it at once does not get it.
pub(super) fn refuse(socket: &TcpStream) {
    // Bytes that nobody read would make the end a reset, in which these words may be lost.
    let _ = rustix::net::recv(socket, &mut [0_u8; LOOK_MAX], RecvFlags::DONTWAIT);
    let _ = socket.try_write(TOO_SLOW);
}

/// Whether a connection begins as one of HTTP/2.
pub(super) fn is_h2(bytes: &[u8]) -> bool {
    bytes.starts_with(H2)
}

/// Whether these bytes hold the end of a head, or are none, or are more than is looked at.
fn is_settled(bytes: &[u8]) -> bool {
    let is_method = bytes.first().is_some_and(|byte| byte.is_ascii_uppercase());
    // Lines may end without a carriage return, too.
    let ends = |end: &[u8]| bytes.windows(end.len()).any(|window| window == end);
    !is_method || bytes.len() == LOOK_MAX || ends(b"\n\r\n") || ends(b"\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_still_become_a_head_is_waited_for() {
        for waits in ["G", "GET / HTTP/1.1", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\na: b\r\n", "PRI * HTTP/2.0\r\n"] {
            assert!(!is_settled(waits.as_bytes()), "{waits:?}");
        }
        for settled in [
            "GET / HTTP/1.1\r\na: b\r\n\r\n",
            "GET /\n\n",
            "PRI * HTTP/2.0\r\n\r\nSM",
            "\u{16}\u{3}\u{1}",
            "\r\n",
            "get",
        ] {
            assert!(is_settled(settled.as_bytes()), "{settled:?}");
        }
        assert!(is_settled(&[b'A'; LOOK_MAX]));
    }
}
