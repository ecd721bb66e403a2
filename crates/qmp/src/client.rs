//! The handle: commands in, replies and events out.

use std::{path::Path, sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc};

use crate::{
    Closed, Event, Events,
    commands::Version,
    connection::{Request, Shared},
    line::Reply,
};

/// A QMP command: the value serialises to its `arguments` (null for none).
pub trait Command: Serialize {
    /// Its name on the wire.
    const NAME: &'static str;
    /// What QEMU returns.
    type Return: DeserializeOwned;
}

impl<C: Command> Command for &C {
    const NAME: &'static str = C::NAME;
    type Return = C::Return;
}

/// A command that QEMU also takes out of band, that is while its main loop hangs.
pub trait OutOfBand: Command {}

impl<C: OutOfBand> OutOfBand for &C {}

open_enum! {
    /// The class of a QMP error. Almost everything is `GenericError`.
    ErrorClass {
        GenericError = "GenericError",
        CommandNotFound = "CommandNotFound",
        DeviceNotActive = "DeviceNotActive",
        DeviceNotFound = "DeviceNotFound",
        KvmMissingCap = "KVMMissingCap",
    }
}

/// Why a command has no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU refused the command; nothing was done but what `desc` says.
    #[error("QEMU refused {command} on {}: {desc} ({class})", socket.display())]
    Refused {
        /// The command's name.
        command: &'static str,
        /// The socket it was sent on.
        socket: Arc<Path>,
        /// QEMU's error class.
        class: ErrorClass,
        /// QEMU's text.
        desc: String,
    },
    /// The deadline passed. Whether QEMU carried the command out, or still will, is not known.
    #[error(
        "QEMU did not answer {command} on {} within {deadline:?}; it may still carry it out, \
         so ask for its state before going on",
        socket.display()
    )]
    Deadline {
        /// The command's name.
        command: &'static str,
        /// The socket it was sent on.
        socket: Arc<Path>,
        /// The time that was given.
        deadline: Duration,
    },
    /// The connection ended. Whether QEMU carried the command out is not known.
    #[error(
        "the QMP connection {} ended before {command} was answered; QEMU's log tells if it crashed",
        socket.display()
    )]
    Closed {
        /// The command's name.
        command: &'static str,
        /// The socket it was sent on.
        socket: Arc<Path>,
        /// Why it ended.
        #[source]
        reason: Closed,
    },
    /// The reply is not what this crate knows of the command, which was carried out.
    #[error(
        "the reply to {command} on {} is not understood; is this QEMU supported?",
        socket.display()
    )]
    Reply {
        /// The command's name.
        command: &'static str,
        /// The socket it was sent on.
        socket: Arc<Path>,
        /// What was found instead.
        #[source]
        source: serde_json::Error,
    },
    /// The command cannot be written as JSON, or was to go out of band on a connection without
    /// that capability. Nothing was sent.
    #[error("{command} cannot be sent on {}: {why}", socket.display())]
    NotSent {
        /// The command's name.
        command: &'static str,
        /// The socket it was meant for.
        socket: Arc<Path>,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// The class of QEMU's refusal, when it is one.
    pub fn class(&self) -> Option<&ErrorClass> {
        match self {
            Self::Refused { class, .. } => Some(class),
            _ => None,
        }
    }

    /// Whether QEMU may have carried the command out all the same.
    pub fn is_outcome_unknown(&self) -> bool {
        matches!(self, Self::Deadline { .. } | Self::Closed { .. })
    }
}

/// A handle on one QMP connection. Clones are cheap; the connection ends with the last one.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) socket: Arc<Path>,
    pub(crate) version: Version,
    pub(crate) oob: bool,
    pub(crate) requests: mpsc::Sender<Request>,
    // Weak, so that subscribers see the end of the connection while handles are still held.
    pub(crate) events: broadcast::WeakSender<Event>,
    pub(crate) shared: Arc<Shared>,
}

impl Client {
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Executes a command and waits at most `deadline` for its reply.
    ///
    /// Dropping the future is allowed at any time; the reply is then thrown away when it comes.
    /// A command that was not yet written to the socket when its deadline passed is never sent.
    pub async fn execute<C: Command>(
        &self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Return, Error> {
        self.send("execute", command, deadline).await
    }

    /// Executes a command out of band: QEMU answers it even while its main loop hangs.
    pub async fn execute_out_of_band<C: OutOfBand>(
        &self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Return, Error> {
        if !self.inner.oob {
            return Err(self.not_sent(C::NAME, "QEMU did not offer the capability oob"));
        }
        self.send("exec-oob", command, deadline).await
    }

    /// Subscribes to the events from now on. Subscribe before the command that causes them.
    pub fn events(&self) -> Events {
        let receiver = match self.inner.events.upgrade() {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1,
        };
        Events::new(receiver, self.inner.shared.watch_closed())
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> Closed {
        let mut closed = self.inner.shared.watch_closed();
        let _ = closed.wait_for(Option::is_some).await;
        self.inner.shared.reason()
    }

    /// The socket, as it was given to [`Client::connect`].
    pub fn socket(&self) -> &Path {
        &self.inner.socket
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> &Version {
        &self.inner.version
    }

    /// Whether out-of-band execution was negotiated.
    pub fn out_of_band(&self) -> bool {
        self.inner.oob
    }

    async fn send<C: Command>(
        &self,
        how: &str,
        command: C,
        deadline: Duration,
    ) -> Result<C::Return, Error> {
        let arguments = serde_json::to_value(&command)
            .map_err(|source| self.not_sent(C::NAME, &source.to_string()))?;
        let value = self.call(how, C::NAME, arguments, deadline).await?;
        serde_json::from_value(value).map_err(|source| Error::Reply {
            command: C::NAME,
            socket: self.inner.socket.clone(),
            source,
        })
    }

    async fn call(
        &self,
        how: &str,
        command: &'static str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, Error> {
        let socket = self.inner.socket.clone();
        match tokio::time::timeout(deadline, self.exchange(how, command, arguments)).await {
            Err(_) => Err(Error::Deadline { command, socket, deadline }),
            Ok(Err(reason)) => Err(Error::Closed { command, socket, reason }),
            Ok(Ok(Err(refusal))) => {
                let (class, desc) = (refusal.class, refusal.desc);
                Err(Error::Refused { command, socket, class, desc })
            }
            Ok(Ok(Ok(value))) => Ok(value),
        }
    }

    async fn exchange(&self, how: &str, command: &str, arguments: Value) -> Result<Reply, Closed> {
        let shared = &self.inner.shared;
        let mut waiter = shared.wait().ok_or_else(|| shared.reason())?;
        let request = Request { id: waiter.id, line: encode(how, command, arguments, waiter.id) };
        self.inner.requests.send(request).await.map_err(|_| shared.reason())?;
        waiter.reply().await
    }

    fn not_sent(&self, command: &'static str, why: &str) -> Error {
        Error::NotSent { command, socket: self.inner.socket.clone(), why: why.to_owned() }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("socket", &self.inner.socket).finish_non_exhaustive()
    }
}

fn encode(how: &str, command: &str, arguments: Value, id: u64) -> Vec<u8> {
    let mut line = json!({ how: command, "id": id });
    if !arguments.is_null() {
        line["arguments"] = arguments;
    }
    format!("{line}\n").into_bytes()
}
