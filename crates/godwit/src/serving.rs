//! The API role of a cluster whose API server is not ours.

use crate::cli;
use crate::cluster::Handlers;
use anyhow::{Context, Result};
use channel::identity::{Ca, Credentials, Role, SpiffeId};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use reconcile::why;
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use webapi::registration;
use webapi::server::{self, Credential};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Of the certificate that handlers see: it ends with the process.
const VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);
/// Of the server's certificate, which is renewed.
const SERVING: Duration = Duration::from_secs(90 * 24 * 3600);
/// What the API server does not take is sent again after this.
const AGAIN: Duration = Duration::from_secs(5);
/// What it has taken is sent again, too: without webhooks anything would be written.
const KNOWN: Duration = Duration::from_secs(300);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot begin.
pub async fn run(arguments: cli::ApiRole) -> Result<ExitCode> {
    let ca = Ca::load(&arguments.identity)
        .with_context(|| format!("there is no CA in {}", arguments.identity.display()))?;
    let client = client(arguments.kubeconfig.as_deref()).await?;
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let (credentials, credential) = watch::channel(serving(&ca)?);
    let (ending, ends) = watch::channel(false);
    let serve = server::run(server::Config {
        web: Arc::new(webapi::WebApi::new(client.clone(), Arc::new(handlers(&client, &ca)?))),
        client: client.clone(),
        listener,
        credential,
        ending: ends,
    });
    let mut serve = std::pin::pin!(serve);
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = serve.as_mut() => {
            ended?;
            return Ok(ExitCode::SUCCESS);
        }
        () = register(&client, ca.certificate_pem()) => {}
        () = renew(&ca, &credentials) => {}
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    ending.send_replace(true);
    serve.await?;
    Ok(ExitCode::SUCCESS)
}

/// A cluster that was named, or the one that this runs in.
async fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let found = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Config::from_custom_kubeconfig(found, &KubeConfigOptions::default()).await?
        }
        None => Config::infer().await.context("name the cluster's kubeconfig: --kubeconfig")?,
    };
    // Whoever asks the API role asks again by himself.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

fn handlers(client: &Client, ca: &Ca) -> Result<Handlers> {
    let id = SpiffeId::new(ca.cluster(), Role::Api, "api")?;
    let credentials = Credentials::new(ca.issue(&id, VALIDITY)?, ca.certificate_pem())?;
    // N.B. whoever reads it keeps the last value.
    let (_, credentials) = watch::channel(credentials);
    Ok(Handlers { client: client.clone(), credentials })
}

fn serving(ca: &Ca) -> Result<Credential> {
    let (chain, key) = ca.issue_server(&registration::names(), SERVING)?;
    Ok(Credential { chain, key })
}

/// Renews the server's certificate long before its end. Never ends.
async fn renew(ca: &Ca, credentials: &watch::Sender<Credential>) {
    loop {
        tokio::time::sleep(30 * DAY).await;
        match serving(ca) {
            Ok(credential) => {
                credentials.send_replace(credential);
            }
            Err(error) => tracing::warn!("the certificate cannot be renewed: {error:#}"),
        }
    }
}

/// Tells the API server of this role, and sees to it that it knows. Never ends.
async fn register(client: &Client, authority: &str) {
    let mut known = false;
    loop {
        let told = tell(client, authority).await;
        match &told {
            Ok(()) if !known => tracing::info!("the API server knows this role"),
            Ok(()) => {}
            Err(error) => tracing::warn!("the API server is not told of this role: {error}"),
        }
        known = told.is_ok();
        tokio::time::sleep(if known { KNOWN } else { AGAIN }).await;
    }
}

async fn tell(client: &Client, authority: &str) -> Result<(), String> {
    for (path, object) in registration::objects(authority) {
        let told = replace(client, &path, &object).await;
        told.map_err(|error| format!("{path}: {}", why(&error)))?;
    }
    Ok(())
}

/// Makes an object what it should be. Not by a server-side apply: aggregators of old clusters have
/// none for API services.
async fn replace(client: &Client, path: &str, object: &Value) -> kube::Result<()> {
    let body = object.to_string().into_bytes();
    let patch = http::Request::patch(path)
        .header("Content-Type", "application/merge-patch+json")
        .body(body.clone())
        .map_err(kube::Error::HttpError)?;
    match client.request_text(patch).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => return other.map(|_| ()),
    }
    let all = path.rsplit_once('/').map_or(path, |(all, _)| all);
    let post = http::Request::post(all)
        .header("Content-Type", "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)?;
    client.request_text(post).await.map(|_| ())
}
