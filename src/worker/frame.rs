//! Frames over a Unix stream socket: a length, a number of descriptors, a payload.
//!
//! ```text
//! | u32 LE: bytes of payload | u32 LE: descriptors | payload (postcard) |
//! ```
//!
//! The length is compared with [`FRAME_MAX`] before anything is allocated for it. Descriptors travel as SCM_RIGHTS with the
//! first byte of their frame: the kernel hands them out with a read that ends at or after that byte, so they are there when
//! the header is.
//!
//! Source of the socket's rules: `unix(7)`, and `unix_stream_read_generic` in Linux, which never joins what follows a
//! message with descriptors to it.

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of payload that a frame has at most. A prompt of a million tokens takes five of the sixteen.
pub const FRAME_MAX: usize = 16 << 20;
/// Descriptors that a frame has at most.
pub const FDS_MAX: usize = 16;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 8;
/// What a reader holds between frames; it grows for a longer frame, and shrinks again.
const BUFFER_BYTES: usize = 64 << 10;

/// Why a frame was not written or read. The connection is of no use any more, except after [`FrameError::TooLong`] or
/// [`FrameError::Encode`] from a write.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The payload is longer than a frame may be.
    #[error("a frame of {found} bytes, expected at most {FRAME_MAX}")]
    TooLong {
        /// What it is, or says that it is.
        found: u64,
    },
    /// More descriptors than a frame may have.
    #[error("a frame with {found} descriptors, expected at most {FDS_MAX}")]
    TooManyFds {
        /// What it has, or says that it has.
        found: u64,
    },
    /// The descriptors that came are not those that frames say they have.
    #[error("{found} descriptors came, the frames have {expected}")]
    WrongFds {
        /// What the header says.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// The socket was closed in the middle of a frame.
    #[error("the socket was closed after {found} bytes of a frame of {expected}")]
    Truncated {
        /// Bytes of the frame with its header, as far as known.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// The other end closed the socket; nothing more can be written.
    #[error("the socket is closed")]
    Closed,
    /// The payload is not what was expected.
    #[error("a payload of {bytes} bytes is not {expected}: {why}")]
    Malformed {
        /// The type.
        expected: &'static str,
        /// Its size.
        bytes: usize,
        /// The decoder's words.
        why: String,
    },
    /// A value has no encoding.
    #[error("{what} cannot be encoded: {why}")]
    Encode {
        /// The type.
        what: &'static str,
        /// The encoder's words.
        why: String,
    },
    /// The system refused.
    #[error("the socket failed")]
    Io(#[source] std::io::Error),
}

impl From<Errno> for FrameError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// Appends the frame of `value` to `buffer`, for a message without descriptors.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::Encode`]; the buffer is as it was.
pub fn encode<T: Serialize>(value: &T, buffer: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_with(buffer, 0, |buffer| append(value, buffer))
}

/// Appends a frame for `n_fds` descriptors, whose payload `fill` appends.
///
/// # Errors
/// As [`encode`], and [`FrameError::TooManyFds`].
pub fn encode_with(
    buffer: &mut Vec<u8>,
    n_fds: usize,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), FrameError>,
) -> Result<(), FrameError> {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; HEADER_BYTES]);
    let filled = fill(buffer).and_then(|()| header(buffer.len() - start - HEADER_BYTES, n_fds));
    match filled {
        Ok(header) => buffer[start..start + HEADER_BYTES].copy_from_slice(&header),
        Err(_) => buffer.truncate(start),
    }
    filled.map(drop)
}

/// Appends the bare encoding of `value`.
///
/// # Errors
/// [`FrameError::Encode`].
pub fn append<T: Serialize>(value: &T, buffer: &mut Vec<u8>) -> Result<(), FrameError> {
    let why = |error: postcard::Error| FrameError::Encode { what: name_of::<T>(), why: error.to_string() };
    postcard::to_io(value, buffer).map(drop).map_err(why)
}

/// Reads a value that takes up all of `payload`.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    let malformed = |why: String| FrameError::Malformed { expected: name_of::<T>(), bytes: payload.len(), why };
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(malformed(format!("{} bytes are left over", rest.len()))),
        Err(error) => Err(malformed(error.to_string())),
    }
}

/// `WorkerEvent` of `playhouse_actors::messages::WorkerEvent`.
fn name_of<T>() -> &'static str {
    let path = std::any::type_name::<T>();
    path.rsplit("::").next().unwrap_or(path)
}

fn header(n_bytes: usize, n_fds: usize) -> Result<[u8; HEADER_BYTES], FrameError> {
    let (bytes, fds) = (u32::try_from(n_bytes), u32::try_from(n_fds));
    match (bytes, fds) {
        (Ok(bytes), Ok(fds)) if n_bytes <= FRAME_MAX && n_fds <= FDS_MAX => {
            let mut header = [0; HEADER_BYTES];
            header[..4].copy_from_slice(&bytes.to_le_bytes());
            header[4..].copy_from_slice(&fds.to_le_bytes());
            Ok(header)
        }
        _ if n_bytes > FRAME_MAX => Err(FrameError::TooLong { found: n_bytes as u64 }),
        _ => Err(FrameError::TooManyFds { found: n_fds as u64 }),
    }
}

/// Writes one or more whole frames, waiting for room. Descriptors go with the first, which must say how many.
///
/// # Errors
/// [`FrameError::Closed`], [`FrameError::Io`]; part of the frames may have been written.
pub fn write(socket: impl AsFd, mut frames: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if !fds.is_empty() {
        let sent = rustix::io::retry_on_intr(|| send_with_fds(socket.as_fd(), frames, fds))?;
        frames = &frames[sent..];
    }
    while !frames.is_empty() {
        let sent = rustix::io::retry_on_intr(|| send(socket.as_fd(), frames, SendFlags::NOSIGNAL))?;
        frames = &frames[sent..];
    }
    Ok(())
}

fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Bytes.
    Data,
    /// Nothing now; only without waiting.
    Nothing,
    /// The end: the other side closed the socket.
    Closed,
}

/// Whether a read waits for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until there are some.
    Yes,
    /// Not at all.
    No,
}

/// A frame that came.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Its payload.
    pub payload: &'a [u8],
    /// Its descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Reads frames. One read of the socket may bring many of them.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Descriptors that came, of frames that were not taken yet.
    fds: VecDeque<OwnedFd>,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES], start: 0, end: 0, fds: VecDeque::new() }
    }
}

impl FrameReader {
    /// The next frame if all of it has come.
    ///
    /// # Errors
    /// [`FrameError::TooLong`], [`FrameError::TooManyFds`], [`FrameError::WrongFds`].
    pub fn take(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let Some((n_bytes, n_fds)) = self.header()? else { return Ok(None) };
        let whole = HEADER_BYTES + n_bytes;
        if self.end - self.start < whole {
            self.make_room(whole);
            return Ok(None);
        }
        if self.fds.len() < n_fds {
            return Err(FrameError::WrongFds { expected: n_fds, found: self.fds.len() });
        }
        let first = self.start + HEADER_BYTES;
        self.start += whole;
        Ok(Some(Frame { payload: &self.buffer[first..self.start], fds: self.fds.drain(..n_fds).collect() }))
    }

    /// Reads the socket once.
    ///
    /// # Errors
    /// [`FrameError::Io`], [`FrameError::WrongFds`]; [`FrameError::Truncated`] if it was closed within a frame.
    pub fn fill(&mut self, socket: impl AsFd, wait: Wait) -> Result<Fill, FrameError> {
        self.tidy()?;
        let flags = match wait {
            Wait::Yes => RecvFlags::CMSG_CLOEXEC,
            Wait::No => RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        };
        let received = rustix::io::retry_on_intr(|| self.receive(socket.as_fd(), flags));
        match received {
            Ok(0) | Err(Errno::CONNRESET) if self.start == self.end => Ok(Fill::Closed),
            Ok(0) | Err(Errno::CONNRESET) => {
                let expected = self.header()?.map_or(HEADER_BYTES, |(n_bytes, _)| HEADER_BYTES + n_bytes);
                Err(FrameError::Truncated { expected, found: self.end - self.start })
            }
            Ok(n) => {
                self.end += n;
                Ok(Fill::Data)
            }
            Err(Errno::AGAIN) => Ok(Fill::Nothing),
            Err(Errno::MSGSIZE) => Err(FrameError::TooManyFds { found: FDS_MAX as u64 + 1 }),
            Err(errno) => Err(FrameError::Io(errno.into())),
        }
    }

    /// Waits for the next frame and decodes it; `None` when the socket was closed after the last one.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn read<T: DeserializeOwned>(&mut self, socket: impl AsFd) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
        loop {
            if let Some(Frame { payload, fds }) = self.take()? {
                return Ok(Some((decode(payload)?, fds)));
            }
            if self.fill(socket.as_fd(), Wait::Yes)? == Fill::Closed {
                return Ok(None);
            }
        }
    }

    fn header(&self) -> Result<Option<(usize, usize)>, FrameError> {
        let Some(header) = self.buffer[self.start..self.end].first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [b0, b1, b2, b3, f0, f1, f2, f3] = *header;
        let (n_bytes, n_fds) = (u32::from_le_bytes([b0, b1, b2, b3]), u32::from_le_bytes([f0, f1, f2, f3]));
        match (n_bytes as usize, n_fds as usize) {
            (bytes, _) if bytes > FRAME_MAX => Err(FrameError::TooLong { found: n_bytes.into() }),
            (_, fds) if fds > FDS_MAX => Err(FrameError::TooManyFds { found: n_fds.into() }),
            known => Ok(Some(known)),
        }
    }

    /// Moves what is left to the front where there is no room behind it, and gives a long frame's memory back.
    fn tidy(&mut self) -> Result<(), FrameError> {
        if self.start == self.end {
            if !self.fds.is_empty() {
                return Err(FrameError::WrongFds { expected: 0, found: self.fds.len() });
            }
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > BUFFER_BYTES {
                self.buffer.truncate(BUFFER_BYTES);
                self.buffer.shrink_to_fit();
            }
        }
        if self.end == self.buffer.len() {
            self.make_room(self.end - self.start + 1);
        }
        Ok(())
    }

    /// Room for `needed` bytes from the start of what is left.
    fn make_room(&mut self, needed: usize) {
        if self.buffer.len() - self.start < needed {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() < needed {
            self.buffer.resize(needed, 0);
        }
    }

    fn receive(&mut self, socket: BorrowedFd<'_>, flags: RecvFlags) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut target = [IoSliceMut::new(&mut self.buffer[self.end..])];
        let message = recvmsg(socket, &mut target, &mut ancillary, flags)?;
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                self.fds.extend(fds);
            }
        }
        // The kernel had more descriptors than fit, and closed them.
        if message.flags.contains(ReturnFlags::CTRUNC) { Err(Errno::MSGSIZE) } else { Ok(message.bytes) }
    }
}
