//! A server that speaks from a script, and the messages that a script consists of.

use nbd::{Client, Options, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::LONG;

pub const SIZE: u64 = 1 << 20;
/// The id that the fake gives to a test's context.
pub const CONTEXT: u32 = 7;

/// What the fake says after each of the client's messages; it hangs up after the last.
pub type Script = Vec<Vec<u8>>;

pub fn greeting() -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &3u16.to_be_bytes()].concat()
}

pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut message = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    message
}

/// The handshake for an export of [`SIZE`] with one context.
pub fn handshake() -> Script {
    let meta = [&CONTEXT.to_be_bytes()[..], b"test:context"].concat();
    let size = [&0u16.to_be_bytes()[..], &SIZE.to_be_bytes(), &1u16.to_be_bytes()].concat();
    let sizes = [1u32, 4096, 1 << 20].map(u32::to_be_bytes).concat();
    let blocks = [&3u16.to_be_bytes()[..], &sizes].concat();
    vec![
        greeting(),
        option_reply(8, 1, &[]),
        [option_reply(10, 4, &meta), option_reply(10, 1, &[])].concat(),
        [option_reply(7, 3, &size), option_reply(7, 3, &blocks), option_reply(7, 1, &[])].concat(),
    ]
}

pub fn options() -> Options {
    Options::new("fake").context("test:context")
}

pub const DONE: u16 = 1;

pub fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut message = 0x668e_33ef_u32.to_be_bytes().to_vec();
    message.extend(flags.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message.extend((payload.len() as u32).to_be_bytes());
    message.extend(payload);
    message
}

pub fn data(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(flags, 1, cookie, &[&offset.to_be_bytes()[..], data].concat())
}

pub fn hole(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    chunk(flags, 2, cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

pub fn status(flags: u16, cookie: u64, context: u32, runs: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (len, status) in runs {
        payload.extend(len.to_be_bytes());
        payload.extend(status.to_be_bytes());
    }
    chunk(flags, 5, cookie, &payload)
}

pub fn error(flags: u16, cookie: u64, errno: u32, message: &str) -> Vec<u8> {
    let len = message.len() as u16;
    let payload = [&errno.to_be_bytes()[..], &len.to_be_bytes(), message.as_bytes()].concat();
    chunk(flags, 0x8001, cookie, &payload)
}

pub fn simple_reply(errno: u32, cookie: u64) -> Vec<u8> {
    let mut message = 0x6744_6698_u32.to_be_bytes().to_vec();
    message.extend(errno.to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message
}

/// A client and a server that runs a script against it.
pub async fn connect(script: Script) -> Result<Client, connect::Error> {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(serve(theirs, script));
    Client::over(ours, "fake", options(), LONG).await
}

/// A client of a fake that replies to its requests, in turn, with these.
pub async fn negotiated(replies: Script) -> Client {
    connect([handshake(), replies].concat()).await.unwrap()
}

async fn serve(mut stream: DuplexStream, script: Script) -> std::io::Result<()> {
    for (index, piece) in script.into_iter().enumerate() {
        match index {
            0 => {}
            1 => {
                // The client's flags come before its first option.
                stream.read_u32().await?;
                option(&mut stream).await?;
            }
            2 | 3 => option(&mut stream).await?,
            _ => drop(stream.read_exact(&mut [0; 28]).await?),
        }
        stream.write_all(&piece).await?;
    }
    Ok(())
}

async fn option(stream: &mut DuplexStream) -> std::io::Result<()> {
    stream.read_exact(&mut [0; 12]).await?;
    let len = stream.read_u32().await?;
    stream.read_exact(&mut vec![0; len as usize]).await?;
    Ok(())
}
