//! The launcher's API: HTTP and JSON on `launcher.sock` in its folder, for this user alone.
//!
//! ```text
//! GET    /v1/status?after=N&wait=S  the status; the next one after generation N, S <= 60 s later at most
//! GET    /v1/spec                   what the guest is; 404 when there is none
//! GET    /v1/usage                  what the guest has used; 404 when there is none
//! GET    /v1/measure                what of it would move, watched for about a second; 404 when there is none
//! POST   /v1/start                  {spec, forced}
//! POST   /v1/shutdown               {grace_seconds}; returns at once
//! POST   /v1/kill  /v1/pause  /v1/resume
//! POST   /v1/prepare                a move to here: its ticket
//! POST   /v1/send  /v1/cancel       a move away from here; 202, the status tells the rest
//! POST   /v1/disrupt                the guest stands still until it is through; 202
//! POST   /v1/verify/{begin,send,judge}  compares disks with those that were left: see [`migration::verify`]
//! POST   /v1/failpoint  DELETE      tests only: 404 unless failpoints are on
//! ```
//!
//! What fails answers `{"error": …}` with all causes: 400 for a wrong request, 409 for one that
//! does not fit what the VM does, 500 for the rest. All but the answers above is the status.

use crate::chain;
use crate::forecast::{Measured, measure};
use crate::migration::ticket::Ticket;
use crate::migration::verify::{self, Differing, VerifyReport, VerifyTicket};
use crate::migration::{self, PrepareRequest, SendRequest};
use crate::qemu::Qemu;
use crate::spec::VmSpec;
use crate::status::Status;
use crate::usage::{self, Usage};
use crate::vm::{self, Begin, Handle};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Name of the API's socket in the launcher's folder.
pub const SOCKET: &str = "launcher.sock";
/// The longest wait for a newer status.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
/// A spec is a few kilobytes, a move's ticket or report not much more.
const MAX_BODY: usize = 1 << 20;
/// The most that a comparison of disks may find.
pub(crate) const MAX_REPORT: usize = 16 << 20;

/// Which status is wanted.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusQuery {
    /// One of another generation than this; None: the status as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// Seconds to wait for it; then the status as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<f64>,
}

/// Starts the VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// Let the guest stand still at its first instruction.
    #[serde(default)]
    pub paused: bool,
    /// What to start.
    pub spec: VmSpec,
    /// A person insists, though the owner record or a disk's mark says that the VM has left.
    #[serde(default)]
    pub forced: bool,
}

/// Lets the guest shut itself down.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// Seconds after which it is ended.
    pub grace_seconds: f64,
}

/// Arms a failpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailpointRequest {
    /// Its name.
    pub point: String,
}

/// What a request that failed is answered with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// What happened, with all causes, on one line.
    pub error: String,
}

/// Serves the API for as long as the launcher lives.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(launcher: &Handle) -> Result<JoinHandle<()>, channel::socket::Error> {
    let listener = channel::socket::bind_beneath(&launcher.folder, SOCKET)?;
    let router = router(launcher.clone());
    Ok(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the API has ended");
        }
    }))
}

fn router(launcher: Handle) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/spec", get(spec))
        .route("/v1/usage", get(usage))
        .route("/v1/measure", get(measure))
        .route("/v1/start", post(start))
        .route("/v1/shutdown", post(shut_down))
        .route("/v1/kill", post(kill))
        .route("/v1/reset", post(reset))
        .route("/v1/pause", post(pause))
        .route("/v1/resume", post(resume))
        .route("/v1/prepare", post(prepare))
        .route("/v1/send", post(send))
        .route("/v1/cancel", post(cancel))
        .route("/v1/disrupt", post(disrupt))
        .route("/v1/verify/begin", post(verify_begin))
        .route("/v1/verify/send", post(verify_send))
        .route("/v1/verify/judge", post(verify_judge).layer(DefaultBodyLimit::max(MAX_REPORT)))
        .route("/v1/failpoint", post(arm).delete(release))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "there is no such request"))
        .method_not_allowed_fallback(async || {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this request has another method")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(launcher)
}

/// An answer that is an error.
struct Refusal(StatusCode, String);

impl Refusal {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self(status, text.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}

impl From<vm::Error> for Refusal {
    fn from(error: vm::Error) -> Self {
        Self(code_of(&error), chain(&error))
    }
}

fn code_of(error: &vm::Error) -> StatusCode {
    use mover::disk::Error as Disk;
    match error {
        vm::Error::Spec(_)
        | vm::Error::Disk(Disk::Open { .. } | Disk::Kind { .. } | Disk::Sectors { .. })
        | vm::Error::Migration(migration::Error::Request(_)) => StatusCode::BAD_REQUEST,
        vm::Error::Denied { .. }
        | vm::Error::Marked { .. }
        | vm::Error::Owner(crate::owner::Error::Refused(_) | crate::owner::Error::Elsewhere(_)) => {
            StatusCode::CONFLICT
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        let status = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self(status, chain(&rejection))
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, chain(&rejection))
    }
}

/// Carries a change to its end, whether or not the client waits for it: a half-done start is worse
/// than one that nobody hears of.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, vm::Error>> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::spawn(work).await {
        Ok(done) => Ok(done?),
        Err(panic) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&panic))),
    }
}

/// A body, or what is wrong with it.
type Body<T> = Result<Json<T>, JsonRejection>;
type Answer<T> = Result<Json<T>, Refusal>;

fn seconds(name: &str, seconds: f64) -> Result<Duration, Refusal> {
    let wrong = || format!("{name} is {seconds}, which is no time");
    Duration::try_from_secs_f64(seconds).map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, wrong()))
}

fn now(launcher: &Handle) -> Json<Status> {
    Json(launcher.status().borrow().clone())
}

async fn status(
    State(launcher): State<Handle>,
    query: Result<Query<StatusQuery>, QueryRejection>,
) -> Answer<Status> {
    let Query(StatusQuery { after, wait }) = query?;
    let wait = seconds("wait", wait.unwrap_or_default())?.min(MAX_WAIT);
    if let Some(after) = after {
        let mut status = launcher.status();
        // N.B. not "greater": a launcher that was started anew counts from 0 again.
        let newer = status.wait_for(|status| status.generation != after);
        // In vain: then it is as it was.
        let _ = tokio::time::timeout(wait, newer).await;
    }
    Ok(now(&launcher))
}

async fn spec(State(launcher): State<Handle>) -> Answer<VmSpec> {
    let vm = launcher.vm.lock().await;
    let guest = vm.guest.as_ref();
    let none = || Refusal::new(StatusCode::NOT_FOUND, "no guest is here");
    guest.map(|guest| Json(guest.qemu.spec.clone())).ok_or_else(none)
}

/// N.B. not locked: a QEMU that hangs must not hold what others need.
async fn qemu(launcher: &Handle) -> Result<Qemu, Refusal> {
    let qemu = launcher.vm.lock().await.guest.as_ref().map(|guest| guest.qemu.clone());
    qemu.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "no guest is here"))
}

async fn usage(State(launcher): State<Handle>) -> Answer<Usage> {
    let failed =
        |error: usage::Error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&error));
    usage::of(&qemu(&launcher).await?).await.map(Json).map_err(failed)
}

async fn measure(State(launcher): State<Handle>) -> Answer<Measured> {
    let failed =
        |error: measure::Error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&error));
    measure::of(&qemu(&launcher).await?).await.map(Json).map_err(failed)
}

async fn start(State(launcher): State<Handle>, body: Body<StartRequest>) -> Answer<Status> {
    let Json(StartRequest { paused, spec, forced }) = body?;
    let vm = &launcher.config.vm;
    if spec.name != *vm {
        let text = format!("the spec is that of VM {}, this launcher's is {vm}", spec.name);
        return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
    }
    let here = launcher.clone();
    let spec = spec.below(here.config.root.as_deref());
    finish(async move { here.start(spec, Begin { forced, paused }).await }).await?;
    Ok(now(&launcher))
}

async fn shut_down(State(launcher): State<Handle>, body: Body<ShutdownRequest>) -> Answer<Status> {
    let Json(ShutdownRequest { grace_seconds }) = body?;
    let grace = seconds("grace_seconds", grace_seconds)?;
    let here = launcher.clone();
    finish(async move { here.shut_down(grace).await }).await?;
    Ok(now(&launcher))
}

async fn kill(State(launcher): State<Handle>) -> Answer<Status> {
    let here = launcher.clone();
    finish(async move { here.kill().await }).await?;
    Ok(now(&launcher))
}

async fn reset(State(launcher): State<Handle>) -> Answer<Status> {
    let here = launcher.clone();
    finish(async move { here.reset().await }).await?;
    Ok(now(&launcher))
}

async fn pause(State(launcher): State<Handle>) -> Answer<Status> {
    let here = launcher.clone();
    finish(async move { here.pause().await }).await?;
    Ok(now(&launcher))
}

async fn resume(State(launcher): State<Handle>) -> Answer<Status> {
    let here = launcher.clone();
    finish(async move { here.resume().await }).await?;
    Ok(now(&launcher))
}

async fn prepare(State(launcher): State<Handle>, body: Body<PrepareRequest>) -> Answer<Ticket> {
    let Json(mut request) = body?;
    request.spec = request.spec.below(launcher.config.root.as_deref());
    finish(async move { migration::prepare(&launcher, request).await }).await.map(Json)
}

async fn send(
    State(launcher): State<Handle>,
    body: Body<SendRequest>,
) -> Result<(StatusCode, Json<Status>), Refusal> {
    let Json(request) = body?;
    let here = launcher.clone();
    finish(async move { migration::send(&here, request).await }).await?;
    Ok((StatusCode::ACCEPTED, now(&launcher)))
}

async fn cancel(State(launcher): State<Handle>) -> Result<(StatusCode, Json<Status>), Refusal> {
    let here = launcher.clone();
    finish(async move { migration::cancel(&here).await }).await?;
    Ok((StatusCode::ACCEPTED, now(&launcher)))
}

async fn disrupt(State(launcher): State<Handle>) -> Result<(StatusCode, Json<Status>), Refusal> {
    let here = launcher.clone();
    finish(async move { migration::disrupt(&here).await }).await?;
    Ok((StatusCode::ACCEPTED, now(&launcher)))
}

async fn verify_begin(
    State(launcher): State<Handle>,
    body: Body<verify::BeginRequest>,
) -> Answer<VerifyTicket> {
    let Json(request) = body?;
    finish(async move { verify::verify_begin(&launcher, request).await }).await.map(Json)
}

async fn verify_send(
    State(launcher): State<Handle>,
    body: Body<verify::SendRequest>,
) -> Answer<Vec<Differing>> {
    let Json(request) = body?;
    finish(async move { verify::verify_send(&launcher, request).await }).await.map(Json)
}

async fn verify_judge(
    State(launcher): State<Handle>,
    body: Body<verify::JudgeRequest>,
) -> Answer<VerifyReport> {
    let Json(request) = body?;
    finish(async move { verify::verify_judge(&launcher, request).await }).await.map(Json)
}

async fn arm(State(launcher): State<Handle>, body: Body<FailpointRequest>) -> Answer<Status> {
    let Json(FailpointRequest { point }) = body?;
    if launcher.failpoints.arm(&point) { Ok(now(&launcher)) } else { Err(no_failpoints()) }
}

async fn release(State(launcher): State<Handle>) -> Answer<Status> {
    if !launcher.config.failpoints {
        return Err(no_failpoints());
    }
    launcher.failpoints.release();
    Ok(now(&launcher))
}

fn no_failpoints() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "this launcher was started without failpoints")
}
