//! The API in this process, as one user: what controllers speak to, without a socket.

use crate::api::Api;
use crate::auth::User;
use crate::body::Answer;
use crate::status::Failure;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Body;
use serde_json::Value;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// The API as a user.
#[derive(Clone)]
pub struct Local {
    api: Api,
    user: Arc<User>,
}

impl Api {
    /// This API as a user.
    pub fn as_user(&self, user: User) -> Local {
        Local { api: self.clone(), user: Arc::new(user) }
    }
}

impl Local {
    /// Sends one request and returns what came back.
    ///
    /// # Errors
    /// The failure that came back.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        media: &'static str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let sent = body.map(|b| b.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Content-Type", media)
            .header("User-Agent", concat!("godwit/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Bytes::from(sent)))
            .map_err(|e| Failure::bad_request(e.to_string()))?;
        let answer = self.api.answer(request, Some(self.user.clone())).await;
        let code = answer.status();
        // It is whole already, and cannot break off.
        let bytes = answer.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if code.is_success() {
            return Ok(value);
        }
        Err(failure_of(code.as_u16(), &value))
    }

    /// Creates an object; one that exists is let be.
    ///
    /// # Errors
    /// Any other failure.
    pub async fn ensure(&self, path: &str, object: &Value) -> Result<(), Failure> {
        match self.send(Method::POST, path, "application/json", Some(object)).await {
            Err(failure) if failure.reason != "AlreadyExists" => Err(failure),
            _ => Ok(()),
        }
    }

    /// Patches an object by a merge patch.
    ///
    /// # Errors
    /// The failure.
    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, Failure> {
        self.send(Method::PATCH, path, "application/merge-patch+json", Some(patch)).await
    }

    /// Deletes an object; one that is gone is let be.
    ///
    /// # Errors
    /// Any other failure.
    pub async fn delete(&self, path: &str, options: &Value) -> Result<(), Failure> {
        match self.send(Method::DELETE, path, "application/json", Some(options)).await {
            Err(failure) if failure.code != 404 => Err(failure),
            _ => Ok(()),
        }
    }
}

/// The failure that an answer tells of.
pub fn failure_of(code: u16, status: &Value) -> Failure {
    let text = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
    let reason = match code {
        404 => "NotFound",
        409 if text("reason") == "AlreadyExists" => "AlreadyExists",
        409 => "Conflict",
        403 => "Forbidden",
        422 => "Invalid",
        _ => "Failure",
    };
    Failure { code, reason, message: text("message"), details: status["details"].clone() }
}

impl<B> tower::Service<Request<B>> for Local
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: std::fmt::Display,
{
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (api, user) = (self.api.clone(), self.user.clone());
        Box::pin(async move { Ok(api.answer(request, Some(user)).await) })
    }
}
