//! What passes over a link: `kind:u8 length:u32 body`, numbers big-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The most bytes of the stream in one frame.
pub(super) const MAX_DATA: u64 = 256 << 10;
const HEADER: usize = 5;
const OFFSET: usize = 8;
const MAX_TEXT: usize = 1024;

/// What a peer must not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Violation(pub(super) &'static str);

/// One frame; a long `Data` arrives as several, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// Bytes of the stream from an offset on.
    Data {
        offset: u64,
        bytes: Bytes,
    },
    /// Delivered to the user up to here; `fin`: and so was the end.
    Ack {
        delivered: u64,
        fin: bool,
    },
    /// The stream ends at this offset.
    Fin {
        at: u64,
    },
    /// To be sent back as it is.
    Ping(u64),
    Pong(u64),
    /// First on every link: received up to here, and room for so many undelivered bytes.
    Resume {
        received: u64,
        window: u64,
    },
    /// This side has delivered and been told everything.
    Bye,
    /// This side's user is gone.
    Abort(String),
}

mod kind {
    pub(super) const DATA: u8 = 1;
    pub(super) const ACK: u8 = 2;
    pub(super) const FIN: u8 = 3;
    pub(super) const PING: u8 = 4;
    pub(super) const PONG: u8 = 5;
    pub(super) const RESUME: u8 = 6;
    pub(super) const BYE: u8 = 7;
    pub(super) const ABORT: u8 = 8;
}

impl Frame {
    /// Appends any frame but data, whose bytes are not copied: see [`data_header`].
    pub(super) fn put(&self, out: &mut BytesMut) {
        let head = |out: &mut BytesMut, kind, length| {
            out.put_u8(kind);
            out.put_u32(length);
        };
        match self {
            Self::Data { offset, bytes } => {
                data_header(out, *offset, bytes.len());
                out.put_slice(bytes);
            }
            Self::Ack { delivered, fin } => {
                head(out, kind::ACK, 9);
                out.put_u64(*delivered);
                out.put_u8(u8::from(*fin));
            }
            Self::Fin { at } => {
                head(out, kind::FIN, 8);
                out.put_u64(*at);
            }
            Self::Ping(n) => {
                head(out, kind::PING, 8);
                out.put_u64(*n);
            }
            Self::Pong(n) => {
                head(out, kind::PONG, 8);
                out.put_u64(*n);
            }
            Self::Resume { received, window } => {
                head(out, kind::RESUME, 16);
                out.put_u64(*received);
                out.put_u64(*window);
            }
            Self::Bye => head(out, kind::BYE, 0),
            Self::Abort(text) => {
                let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
                head(out, kind::ABORT, text.len() as u32);
                out.put_slice(text);
            }
        }
    }
}

/// Appends what precedes `length` (at most [`MAX_DATA`]) bytes of the stream.
pub(super) fn data_header(out: &mut BytesMut, offset: u64, length: usize) {
    out.put_u8(kind::DATA);
    out.put_u32((OFFSET + length) as u32);
    out.put_u64(offset);
}

/// Cuts frames out of what was read. Keeps nothing but where it is within a data frame.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// Offset and length of what is still to come of a data frame.
    data: Option<(u64, usize)>,
}

impl Parser {
    /// The next frame, or none until more is read.
    pub(super) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, Violation> {
        if let Some((offset, left)) = self.data {
            if input.is_empty() {
                return Ok(None);
            }
            let bytes = input.split_to(left.min(input.len())).freeze();
            let left = left - bytes.len();
            self.data = (left > 0).then_some((offset + bytes.len() as u64, left));
            return Ok(Some(Frame::Data { offset, bytes }));
        }
        let Some((header, _)) = input.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [kind, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if kind == kind::DATA {
            return self.begin_data(length, input);
        }
        if length > if kind == kind::ABORT { MAX_TEXT } else { 16 } {
            return Err(Violation("a frame is longer than its kind allows"));
        }
        if input.len() < HEADER + length {
            return Ok(None);
        }
        input.advance(HEADER);
        short(kind, &input.split_to(length)).map(Some)
    }

    fn begin_data(
        &mut self,
        length: usize,
        input: &mut BytesMut,
    ) -> Result<Option<Frame>, Violation> {
        if length <= OFFSET || length - OFFSET > MAX_DATA as usize {
            return Err(Violation("a data frame is empty or longer than allowed"));
        }
        if input.len() < HEADER + OFFSET {
            return Ok(None);
        }
        input.advance(HEADER);
        self.data = Some((input.get_u64(), length - OFFSET));
        self.next(input)
    }
}

fn short(kind: u8, mut body: &[u8]) -> Result<Frame, Violation> {
    let expected = match kind {
        kind::ACK => 9,
        kind::FIN | kind::PING | kind::PONG => 8,
        kind::RESUME => 16,
        kind::BYE => 0,
        kind::ABORT => body.len(),
        _ => return Err(Violation("a frame is of an unknown kind")),
    };
    if body.len() != expected {
        return Err(Violation("a frame has not the length of its kind"));
    }
    Ok(match kind {
        kind::ACK => Frame::Ack { delivered: body.get_u64(), fin: body.get_u8() != 0 },
        kind::FIN => Frame::Fin { at: body.get_u64() },
        kind::PING => Frame::Ping(body.get_u64()),
        kind::PONG => Frame::Pong(body.get_u64()),
        kind::RESUME => Frame::Resume { received: body.get_u64(), window: body.get_u64() },
        kind::BYE => Frame::Bye,
        _ => Frame::Abort(String::from_utf8_lossy(body).into_owned()),
    })
}
