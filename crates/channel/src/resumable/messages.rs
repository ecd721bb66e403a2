//! Messages over a byte stream: a length before each.

use std::io;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::task::JoinHandle;

use super::{Config, Error, Links, Summary, run};

/// The most bytes in one message.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Between the messages and the stream that carries them.
const PIPE: usize = 64 << 10;

type Io = tokio::io::DuplexStream;

/// Both directions of a stream of messages.
#[derive(Debug)]
pub struct Messages<S = Io> {
    sender: MessageSender<S>,
    receiver: MessageReceiver<S>,
}

impl Messages<Io> {
    /// Messages over links that may be cut. The task ends when both sides have been
    /// dropped or closed, or with the reason why the stream failed.
    pub fn over<L: Links + 'static>(
        links: L,
        config: Config,
    ) -> (Self, JoinHandle<Result<Summary, Error>>) {
        let (near, far) = tokio::io::duplex(PIPE);
        (Self::new(near), tokio::spawn(run(far, links, config)))
    }
}

impl<S: AsyncRead + AsyncWrite> Messages<S> {
    /// Messages over any stream.
    pub fn new(io: S) -> Self {
        let (reader, writer) = tokio::io::split(io);
        Self {
            sender: MessageSender { io: writer, queued: BytesMut::new() },
            receiver: MessageReceiver { io: reader, buffer: BytesMut::new() },
        }
    }

    /// See [`MessageSender::send`].
    pub async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.sender.send(message).await
    }

    /// See [`MessageReceiver::recv`].
    pub async fn recv(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.receiver.recv().await
    }

    /// See [`MessageSender::close`].
    pub async fn close(&mut self) -> io::Result<()> {
        self.sender.close().await
    }

    /// For two tasks.
    pub fn split(self) -> (MessageSender<S>, MessageReceiver<S>) {
        (self.sender, self.receiver)
    }
}

/// Sends messages.
#[derive(Debug)]
pub struct MessageSender<S = Io> {
    io: WriteHalf<S>,
    queued: BytesMut,
}

impl<S: AsyncWrite> MessageSender<S> {
    /// Sends a message of at most [`MAX_MESSAGE`] bytes. If this is cancelled, the message
    /// is sent whole by the next call.
    ///
    /// Returning means that the stream has taken it, not that the peer has it.
    pub async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        if message.len() > MAX_MESSAGE {
            let text = format!("a message of {} bytes is over {MAX_MESSAGE}", message.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self.queued.put_u32(message.len() as u32);
        self.queued.put_slice(message);
        self.flush().await
    }

    /// Sends no more: the peer's `recv` returns none.
    pub async fn close(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.io.shutdown().await
    }

    async fn flush(&mut self) -> io::Result<()> {
        while self.queued.has_remaining() {
            if self.io.write_buf(&mut self.queued).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        self.io.flush().await
    }
}

/// Receives messages.
#[derive(Debug)]
pub struct MessageReceiver<S = Io> {
    io: ReadHalf<S>,
    buffer: BytesMut,
}

impl<S: AsyncRead> MessageReceiver<S> {
    /// The next message, or none when the peer has closed. Cancel safe.
    pub async fn recv(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                let clean = self.buffer.is_empty();
                return if clean { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    fn whole(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some((length, rest)) = self.buffer.split_first_chunk() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_MESSAGE {
            let text = format!("a message of {length} bytes is over {MAX_MESSAGE}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let Some(message) = rest.get(..length).map(<[u8]>::to_vec) else { return Ok(None) };
        self.buffer.advance(4 + length);
        Ok(Some(message))
    }
}
