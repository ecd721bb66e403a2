//! Speaks to a launcher through its [`api`].

use crate::api::{self, FailpointRequest, Failure, ShutdownRequest, StartRequest};
use crate::chain;
use crate::forecast::Measured;
use crate::migration::ticket::Ticket;
use crate::migration::verify::{self, Differing, VerifyReport, VerifyTicket};
use crate::migration::{PrepareRequest, SendRequest};
use crate::spec::VmSpec;
use crate::status::Status;
use crate::usage::Usage;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A launcher answers these from memory, unless its QEMU hangs.
const ANSWER: Duration = Duration::from_secs(30);
/// A start and what prepares a move wait for the handler, then for QEMU.
const START: Duration = Duration::from_secs(120);
/// Comparing disks takes as long as reading them.
const VERIFY: Duration = Duration::from_secs(24 * 3600);

/// Why a launcher did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not run, or its socket is none.
    #[error("the launcher of VM {vm} cannot be reached")]
    Unreachable {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: channel::socket::Error,
    },
    /// It said no.
    #[error("{text}")]
    Refused {
        /// HTTP's status, see [`api`].
        status: u16,
        /// Its own words.
        text: String,
    },
    /// It did not answer in time; it may have done what was asked.
    #[error("the launcher of VM {vm} did not answer within {deadline:?}; its log may tell why")]
    Silent {
        /// The VM.
        vm: String,
        /// The time that was given.
        deadline: Duration,
    },
    /// The connection broke; it may have done what was asked.
    #[error("the launcher of VM {vm} was lost before it answered: {why}; does it still run?")]
    Lost {
        /// The VM.
        vm: String,
        /// How.
        why: String,
    },
    /// It answers something else.
    #[error("the launcher of VM {vm} answers what was not asked: {why}; is it of this version?")]
    Strange {
        /// The VM.
        vm: String,
        /// What.
        why: String,
    },
}

impl Error {
    /// Whether the launcher said that the VM is in no state for the request.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == StatusCode::CONFLICT.as_u16())
    }
}

/// A way to one launcher. Connects at each call.
#[derive(Debug, Clone)]
pub struct Client {
    folder: PathBuf,
    vm: String,
}

impl Client {
    /// For the launcher of `vm` on the host whose folder is `host`.
    pub fn new(host: &Path, vm: &str) -> Self {
        Self { folder: host.join("vms").join(vm), vm: vm.to_owned() }
    }

    /// The status as it is.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn status(&self) -> Result<Status, Error> {
        self.get("/v1/status", ANSWER).await
    }

    /// The status once it is of another generation than `after`, at the latest after `wait`
    /// (60 s at most).
    ///
    /// # Errors
    /// [`Error`].
    pub async fn status_after(&self, after: u64, wait: Duration) -> Result<Status, Error> {
        let wait = wait.min(api::MAX_WAIT);
        let path = format!("/v1/status?after={after}&wait={}", wait.as_secs_f64());
        self.get(&path, ANSWER + wait).await
    }

    /// What the guest is; None when none is here.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn spec(&self) -> Result<Option<VmSpec>, Error> {
        match self.get("/v1/spec", START).await {
            Ok(spec) => Ok(Some(spec)),
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What the guest has used.
    ///
    /// # Errors
    /// [`Error`], also when there is none.
    pub async fn usage(&self) -> Result<Usage, Error> {
        self.get("/v1/usage", ANSWER).await
    }

    /// What of the guest would move: it is watched for about a second.
    ///
    /// # Errors
    /// [`Error`], also when there is none.
    pub async fn measure(&self) -> Result<Measured, Error> {
        self.get("/v1/measure", ANSWER).await
    }

    /// Starts the VM; `forced`: though it has left.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start(&self, spec: &VmSpec, forced: bool) -> Result<Status, Error> {
        let request = StartRequest { paused: false, spec: spec.clone(), forced };
        self.post("/v1/start", &request, START).await
    }

    /// Starts the VM, standing still at its first instruction.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start_paused(&self, spec: &VmSpec) -> Result<Status, Error> {
        let request = StartRequest { paused: true, spec: spec.clone(), forced: false };
        self.post("/v1/start", &request, START).await
    }

    /// Lets the guest shut itself down, and has it ended if it has not after `grace`. Does not
    /// wait for it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn shut_down(&self, grace: Duration) -> Result<Status, Error> {
        let request = ShutdownRequest { grace_seconds: grace.as_secs_f64() };
        self.post("/v1/shutdown", &request, ANSWER).await
    }

    /// Begins the guest anew.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn reset(&self) -> Result<Status, Error> {
        self.post("/v1/reset", &(), ANSWER).await
    }

    /// Ends the guest at once.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn kill(&self) -> Result<Status, Error> {
        self.post("/v1/kill", &(), ANSWER).await
    }

    /// Lets the guest stand still.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn pause(&self) -> Result<Status, Error> {
        self.post("/v1/pause", &(), ANSWER).await
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn resume(&self) -> Result<Status, Error> {
        self.post("/v1/resume", &(), ANSWER).await
    }

    /// Has the launcher expect a guest; the ticket is for the source.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn prepare(&self, request: &PrepareRequest) -> Result<Ticket, Error> {
        self.post("/v1/prepare", request, START).await
    }

    /// Begins to move the guest away. Does not wait for it: the status tells.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn send(&self, request: &SendRequest) -> Result<Status, Error> {
        self.post("/v1/send", request, START).await
    }

    /// Ends the move that is under way. Does not wait for it: the status tells.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn cancel(&self) -> Result<Status, Error> {
        self.post("/v1/cancel", &(), ANSWER).await
    }

    /// Has the guest that is on its way stand still until it is through.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn disrupt(&self) -> Result<Status, Error> {
        self.post("/v1/disrupt", &(), ANSWER).await
    }

    /// See [`verify::verify_begin`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn verify_begin(
        &self,
        request: &verify::BeginRequest,
    ) -> Result<VerifyTicket, Error> {
        self.post("/v1/verify/begin", request, ANSWER).await
    }

    /// See [`verify::verify_send`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn verify_send(
        &self,
        request: &verify::SendRequest,
    ) -> Result<Vec<Differing>, Error> {
        self.post("/v1/verify/send", request, VERIFY).await
    }

    /// See [`verify::verify_judge`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn verify_judge(
        &self,
        request: &verify::JudgeRequest,
    ) -> Result<VerifyReport, Error> {
        self.post("/v1/verify/judge", request, ANSWER).await
    }

    /// Has the next move stop at a point.
    ///
    /// # Errors
    /// [`Error`], also when the launcher was started without failpoints.
    pub async fn arm(&self, point: &str) -> Result<Status, Error> {
        self.post("/v1/failpoint", &FailpointRequest { point: point.to_owned() }, ANSWER).await
    }

    /// Lets a move that stands at a point go on, and disarms all points.
    ///
    /// # Errors
    /// [`Error`], also when the launcher was started without failpoints.
    pub async fn release(&self) -> Result<Status, Error> {
        self.ask(Method::DELETE, "/v1/failpoint", Bytes::new(), ANSWER).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, deadline: Duration) -> Result<T, Error> {
        self.ask(Method::GET, path, Bytes::new(), deadline).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        deadline: Duration,
    ) -> Result<T, Error> {
        let body = serde_json::to_vec(body).map_err(|error| self.strange(&error))?;
        self.ask(Method::POST, path, body.into(), deadline).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        deadline: Duration,
    ) -> Result<T, Error> {
        let exchange = self.exchange(method, path, body);
        let silent = |_| Error::Silent { vm: self.vm.clone(), deadline };
        let (status, body) = tokio::time::timeout(deadline, exchange).await.map_err(silent)??;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.strange(&error));
        }
        match serde_json::from_slice(&body) {
            Ok(Failure { error: text }) => Err(Error::Refused { status: status.as_u16(), text }),
            Err(error) => Err(self.strange(&error)),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Error> {
        let unreachable = |source| Error::Unreachable { vm: self.vm.clone(), source };
        let stream = channel::socket::connect_beneath(&self.folder, api::SOCKET).await;
        let stream = TokioIo::new(stream.map_err(unreachable)?);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(|e| self.lost(&e))?;
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "launcher")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.strange(&error))?;
        let answer = async {
            let answer = sender.send_request(request).await.map_err(|e| self.lost(&e))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, api::MAX_REPORT).collect().await;
            Ok((head.status, body.map_err(|e| self.lost(&*e))?.to_bytes()))
        };
        tokio::pin!(answer);
        // N.B. the connection is driven here, so that nothing is left behind when this is dropped.
        tokio::select! {
            answer = &mut answer => answer,
            // It may end with the answer still to be read; its failure the answer tells, too.
            _ = connection => answer.await,
        }
    }

    fn lost(&self, error: &dyn std::error::Error) -> Error {
        Error::Lost { vm: self.vm.clone(), why: chain(error) }
    }

    fn strange(&self, error: &dyn std::error::Error) -> Error {
        Error::Strange { vm: self.vm.clone(), why: chain(error) }
    }
}
