//! The handshake: from a stream to an export that is ready to be read.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    Closed, Violation,
    connect::{BlockSize, Export, Options},
    connection::broken,
    wire::{self, Info, Opt, OptionReply},
};

/// The most replies that are read to one option.
const MAX_REPLIES: usize = 256;
const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const SEND_DF: u16 = 1 << 7;
const CAN_MULTI_CONN: u16 = 1 << 8;

/// Why a handshake failed.
pub(crate) enum Error {
    Closed(Closed),
    Refused { option: &'static str, why: &'static str, message: String },
    NoContext { context: String },
}

impl From<Closed> for Error {
    fn from(reason: Closed) -> Self {
        Self::Closed(reason)
    }
}

impl From<Violation> for Error {
    fn from(violation: Violation) -> Self {
        Self::Closed(violation.into())
    }
}

/// An export and the ids of its contexts, in the order that they were asked in.
pub(crate) struct Negotiated {
    pub(crate) export: Export,
    pub(crate) context_ids: Vec<u32>,
    /// Whether a read may ask for its data in one piece.
    pub(crate) dont_fragment: bool,
}

pub(crate) async fn run<S>(stream: &mut S, options: &Options) -> Result<Negotiated, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream).await?;
    negotiate(stream, Opt::StructuredReply, &[], |_, _| Ok(false)).await?;
    let context_ids = match options.contexts.is_empty() {
        true => Vec::new(),
        false => set_contexts(stream, options).await?,
    };
    let (export, flags) = go(stream, options).await?;
    Ok(Negotiated { export, context_ids, dont_fragment: flags & SEND_DF != 0 })
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), Error> {
    let found = stream.read_u64().await.map_err(broken)?;
    if found != wire::MAGIC {
        return Err(Violation::Magic { what: "the greeting", found }.into());
    }
    if stream.read_u64().await.map_err(broken)? != wire::OPTION_MAGIC {
        return Err(Violation::OldStyle.into());
    }
    if stream.read_u16().await.map_err(broken)? & wire::FIXED_NEWSTYLE == 0 {
        return Err(Violation::OldStyle.into());
    }
    stream.write_u32(wire::CLIENT_FLAGS).await.map_err(broken)?;
    Ok(())
}

/// Sends an option and reads its replies up to the last. `take` says whether it knows a reply.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    option: Opt,
    data: &[u8],
    mut take: impl FnMut(u32, &[u8]) -> Result<bool, Violation>,
) -> Result<(), Error> {
    stream.write_all(&wire::option(option, data)).await.map_err(broken)?;
    for _ in 0..MAX_REPLIES {
        let mut header = [0; wire::OPTION_REPLY_HEADER];
        stream.read_exact(&mut header).await.map_err(broken)?;
        let reply = OptionReply::parse(&header)?;
        let mut data = vec![0; reply.len as usize];
        stream.read_exact(&mut data).await.map_err(broken)?;

        let unexpected = Violation::OptionReply { option: reply.option, reply: reply.kind };
        if reply.option != option as u32 {
            return Err(unexpected.into());
        }
        if let Some(why) = reply.refusal() {
            let message = wire::text(&data);
            return Err(Error::Refused { option: option.name(), why, message });
        }
        if reply.kind == wire::REPLY_ACK {
            return Ok(());
        }
        if !take(reply.kind, &data)? {
            return Err(unexpected.into());
        }
    }
    Err(Violation::OptionReplies.into())
}

async fn set_contexts<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    options: &Options,
) -> Result<Vec<u32>, Error> {
    let mut granted = Vec::new();
    let data = wire::set_meta_context(&options.export, &options.contexts);
    negotiate(stream, Opt::SetMetaContext, &data, |kind, data| {
        if kind != wire::REPLY_META_CONTEXT {
            return Ok(false);
        }
        granted.push(wire::meta_context(data)?);
        Ok(true)
    })
    .await?;

    let mut ids = Vec::with_capacity(options.contexts.len());
    for context in &options.contexts {
        match granted.iter().find(|(_, name)| name == context) {
            Some((id, _)) if ids.contains(id) => return Err(Violation::Context(*id).into()),
            Some((id, _)) => ids.push(*id),
            None => return Err(Error::NoContext { context: context.clone() }),
        }
    }
    Ok(ids)
}

/// The export and its transmission flags.
async fn go<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    options: &Options,
) -> Result<(Export, u16), Error> {
    let mut described = None;
    let mut block_size = BlockSize::default();
    negotiate(stream, Opt::Go, &wire::go(&options.export), |kind, data| {
        if kind != wire::REPLY_INFO {
            return Ok(false);
        }
        match Info::parse(data)? {
            Info::Export { size, flags } => described = Some((size, flags)),
            Info::BlockSize { minimum, preferred, maximum } => {
                block_size = BlockSize::checked(minimum, preferred, maximum)
                    .ok_or(Violation::Export("its block sizes make no sense"))?;
            }
            Info::Other => {}
        }
        Ok(true)
    })
    .await?;

    let (size, flags) = described.ok_or(Violation::Export("it does not say its size"))?;
    if flags & HAS_FLAGS == 0 || size > i64::MAX as u64 {
        return Err(Violation::Export("its size or its flags make no sense").into());
    }
    let export = Export {
        name: options.export.clone(),
        size,
        read_only: flags & READ_ONLY != 0,
        can_multi_conn: flags & CAN_MULTI_CONN != 0,
        block_size,
        contexts: options.contexts.clone(),
    };
    Ok((export, flags))
}
