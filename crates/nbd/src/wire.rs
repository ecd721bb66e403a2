//! The bytes of the protocol, both ways. Pure: slices in, values or a [`Violation`] out.

use bytes::{Buf, BufMut, TryGetError};

use crate::Errno;

/// `NBDMAGIC`, the first 8 bytes of every server.
pub(crate) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the server is newstyle; also begins every option.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of the server: options and their replies follow fixed rules.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
/// The client's flags: fixed newstyle, no zeroes.
pub(crate) const CLIENT_FLAGS: u32 = 0b11;

/// The longest string that the protocol allows, in bytes: names and messages.
pub(crate) const MAX_STRING: usize = 4096;
/// The longest reply to an option that is read, in bytes: a string and what goes with it.
pub(crate) const MAX_OPTION_REPLY: u32 = MAX_STRING as u32 + 64;
/// The most runs that QEMU sends in one block status (1 MiB of them); more are not read.
pub(crate) const MAX_RUNS: usize = (1 << 20) / 8;

/// An option that the client negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opt {
    Go = 7,
    StructuredReply = 8,
    SetMetaContext = 10,
}

impl Opt {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Go => "NBD_OPT_GO",
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::SetMetaContext => "NBD_OPT_SET_META_CONTEXT",
        }
    }
}

/// What a server did that the protocol, or what was asked of it, does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Bytes that cannot be what must come there.
    #[error("{what} begins with {found:#x}")]
    Magic {
        /// What should have come.
        what: &'static str,
        /// What came.
        found: u64,
    },
    /// The server only speaks a handshake of before 2011.
    #[error("it does not offer the fixed newstyle handshake")]
    OldStyle,
    /// A message that is shorter or longer than it can be.
    #[error("{what} of {len} bytes")]
    Length {
        /// Which message.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
    },
    /// A reply to an option that was not sent, or of a kind that it does not have.
    #[error("an unexpected reply of type {reply:#x} to option {option}")]
    OptionReply {
        /// The option.
        option: u32,
        /// The type of the reply.
        reply: u32,
    },
    /// The server never comes to the end of its answer to an option.
    #[error("too many replies to one option")]
    OptionReplies,
    /// The export was accepted without saying its size, or with sizes that make no sense.
    #[error("it does not describe the export properly: {0}")]
    Export(&'static str),
    /// A reply to a request that is not open.
    #[error("a reply to request {0}, which is not open")]
    Cookie(u64),
    /// A kind of reply that the request does not have.
    #[error("an unexpected reply of type {0:#x}")]
    Chunk(u16),
    /// A reply to a read outside of what was asked.
    #[error("{len} bytes at {offset}, outside of what was asked")]
    Outside {
        /// The chunk's offset in the export.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Bytes of a read that were sent twice.
    #[error("{len} bytes at {offset}, which overlap what was sent before")]
    Overlap {
        /// The chunk's offset in the export.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Bytes of a read, or a context of a block status, that were not sent.
    #[error("a reply that lacks {0}")]
    Incomplete(&'static str),
    /// A reply in more pieces than there are sectors in it.
    #[error("a reply in too many pieces")]
    Pieces,
    /// The block status of a context that was not negotiated, or twice of the same.
    #[error("the block status of context {0}, which was not asked")]
    Context(u32),
    /// A run of no length: following it would never end.
    #[error("a run of no length")]
    EmptyRun,
}

/// A message that ends before its members do.
fn short(what: &'static str, whole: usize) -> impl Fn(TryGetError) -> Violation {
    move |_| Violation::Length { what, len: whole as u64 }
}

// --- handshake ---

pub(crate) fn option(option: Opt, data: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(16 + data.len());
    message.put_u64(OPTION_MAGIC);
    message.put_u32(option as u32);
    message.put_u32(data.len() as u32);
    message.put_slice(data);
    message
}

/// The data of `SET_META_CONTEXT`.
pub(crate) fn set_meta_context(export: &str, contexts: &[String]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, export);
    data.put_u32(contexts.len() as u32);
    for context in contexts {
        put_string(&mut data, context);
    }
    data
}

/// The data of `GO`, which also asks for the block sizes.
pub(crate) fn go(export: &str) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, export);
    data.put_u16(1);
    data.put_u16(INFO_BLOCK_SIZE);
    data
}

fn put_string(data: &mut Vec<u8>, string: &str) {
    data.put_u32(string.len() as u32);
    data.put_slice(string.as_bytes());
}

pub(crate) const OPTION_REPLY_HEADER: usize = 20;

/// The head of a reply to an option.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OptionReply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) len: u32,
}

pub(crate) const REPLY_ACK: u32 = 1;
pub(crate) const REPLY_INFO: u32 = 3;
pub(crate) const REPLY_META_CONTEXT: u32 = 4;
const REPLY_ERROR: u32 = 1 << 31;

impl OptionReply {
    pub(crate) fn parse(header: &[u8; OPTION_REPLY_HEADER]) -> Result<Self, Violation> {
        let short = short("a reply to an option", header.len());
        let mut header = &header[..];
        let found = header.try_get_u64().map_err(&short)?;
        if found != OPTION_REPLY_MAGIC {
            return Err(Violation::Magic { what: "a reply to an option", found });
        }
        let option = header.try_get_u32().map_err(&short)?;
        let kind = header.try_get_u32().map_err(&short)?;
        let len = header.try_get_u32().map_err(&short)?;
        if len > MAX_OPTION_REPLY {
            return Err(Violation::Length { what: "a reply to an option", len: len.into() });
        }
        Ok(Self { option, kind, len })
    }

    /// The name of the error, if the server refuses.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        if self.kind & REPLY_ERROR == 0 {
            return None;
        }
        Some(match self.kind & !REPLY_ERROR {
            1 => "it does not know that option",
            2 => "its policy forbids it",
            3 => "it calls the request invalid",
            4 => "its platform cannot do it",
            5 => "it wants TLS",
            6 => "it has no such export",
            7 => "it is shutting down",
            8 => "it wants the block sizes to be asked",
            9 => "the request is too big for it",
            10 => "it wants extended headers",
            _ => "it gives a reason that this client does not know",
        })
    }
}

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

/// One piece of information about an export.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Info {
    Export { size: u64, flags: u16 },
    BlockSize { minimum: u32, preferred: u32, maximum: u32 },
    Other,
}

impl Info {
    pub(crate) fn parse(data: &[u8]) -> Result<Self, Violation> {
        let short = short("NBD_REP_INFO", data.len());
        let mut rest = data;
        let info = match rest.try_get_u16().map_err(&short)? {
            INFO_EXPORT => Self::Export {
                size: rest.try_get_u64().map_err(&short)?,
                flags: rest.try_get_u16().map_err(&short)?,
            },
            INFO_BLOCK_SIZE => Self::BlockSize {
                minimum: rest.try_get_u32().map_err(&short)?,
                preferred: rest.try_get_u32().map_err(&short)?,
                maximum: rest.try_get_u32().map_err(&short)?,
            },
            _ => return Ok(Self::Other),
        };
        match rest {
            [] => Ok(info),
            _ => Err(Violation::Length { what: "NBD_REP_INFO", len: data.len() as u64 }),
        }
    }
}

/// A context's id and name.
pub(crate) fn meta_context(data: &[u8]) -> Result<(u32, String), Violation> {
    let mut rest = data;
    let id = rest.try_get_u32().map_err(short("NBD_REP_META_CONTEXT", data.len()))?;
    Ok((id, text(rest)))
}

/// What a server wrote for people; no control characters reach a terminal.
pub(crate) fn text(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(MAX_STRING)];
    let printable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(bytes).chars().map(printable).collect()
}

// --- transmission ---

/// A command that the client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Disconnect = 2,
    BlockStatus = 7,
}

/// Flag of a read: its data comes in one piece.
pub(crate) const DONT_FRAGMENT: u16 = 1 << 2;

/// N.B. `len` has been held against the longest read and the longest block status: it fits.
pub(crate) fn request(command: Command, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(28);
    message.put_u32(REQUEST_MAGIC);
    message.put_u16(flags);
    message.put_u16(command as u16);
    message.put_u64(cookie);
    message.put_u64(offset);
    message.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    message
}

pub(crate) const SIMPLE_REPLY_REST: usize = 12;

/// A simple reply's error and cookie, from what follows its magic.
pub(crate) fn simple_reply(rest: &[u8; SIMPLE_REPLY_REST]) -> Result<(Errno, u64), Violation> {
    let short = short("a simple reply", rest.len());
    let mut rest = &rest[..];
    Ok((Errno(rest.try_get_u32().map_err(&short)?), rest.try_get_u64().map_err(&short)?))
}

pub(crate) const CHUNK_REST: usize = 16;
const CHUNK_DONE: u16 = 1;

pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_DATA: u16 = 1;
pub(crate) const CHUNK_HOLE: u16 = 2;
pub(crate) const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;

/// The head of one chunk of a structured reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) done: bool,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) len: u32,
}

impl Chunk {
    /// From what follows its magic.
    pub(crate) fn parse(rest: &[u8; CHUNK_REST]) -> Result<Self, Violation> {
        let short = short("a chunk's head", rest.len());
        let mut rest = &rest[..];
        Ok(Self {
            done: rest.try_get_u16().map_err(&short)? & CHUNK_DONE != 0,
            kind: rest.try_get_u16().map_err(&short)?,
            cookie: rest.try_get_u64().map_err(&short)?,
            len: rest.try_get_u32().map_err(&short)?,
        })
    }

    /// Error chunks of a kind not known here still begin like all of them.
    pub(crate) fn is_error(&self) -> bool {
        self.kind & CHUNK_ERROR != 0
    }
}

/// The longest error chunk: number, length, message, offset.
pub(crate) const MAX_ERROR_CHUNK: u32 = MAX_STRING as u32 + 14;

/// An error chunk's number and message.
pub(crate) fn error_chunk(data: &[u8]) -> Result<(Errno, String), Violation> {
    let short = short("an error chunk", data.len());
    let mut rest = data;
    let errno = rest.try_get_u32().map_err(&short)?;
    let len = rest.try_get_u16().map_err(&short)?;
    let message = rest
        .get(..len.into())
        .ok_or(Violation::Length { what: "an error chunk", len: data.len() as u64 })?;
    Ok((Errno(errno), text(message)))
}

pub(crate) const HOLE_CHUNK: u32 = 12;

/// A hole's offset and length.
pub(crate) fn hole_chunk(data: &[u8]) -> Result<(u64, u32), Violation> {
    let short = short("a hole chunk", data.len());
    let mut rest = data;
    Ok((rest.try_get_u64().map_err(&short)?, rest.try_get_u32().map_err(&short)?))
}

/// A stretch with the same flags; where it begins follows from those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u32,
    pub(crate) flags: u32,
}

pub(crate) const MAX_BLOCK_STATUS_CHUNK: u32 = 4 + 8 * MAX_RUNS as u32;

/// A context's id and its runs: at least one, none of them empty.
pub(crate) fn block_status_chunk(data: &[u8]) -> Result<(u32, Vec<Run>), Violation> {
    let short = short("a block status chunk", data.len());
    let mut rest = data;
    let context = rest.try_get_u32().map_err(&short)?;
    let mut runs = Vec::with_capacity(rest.len() / 8);
    while !rest.is_empty() {
        let len = rest.try_get_u32().map_err(&short)?;
        let flags = rest.try_get_u32().map_err(&short)?;
        if len == 0 {
            return Err(Violation::EmptyRun);
        }
        runs.push(Run { len, flags });
    }
    match runs.is_empty() {
        true => Err(Violation::Incomplete("runs")),
        false => Ok((context, runs)),
    }
}
