//! Two hosts in one process: gateways on 127.0.0.2 and 127.0.0.3, folders of their own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use channel::client::{self, GatewayClient, Incoming, IncomingError};
use channel::gateway::{Answer, Config, Gateway, Limits, Service};
use channel::identity::{Ca, Identity, Role, SpiffeId, Trust};
use channel::preface::{Preface, Stream};
use channel::tokens::{Token, Tokens};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};

pub const PATIENCE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

pub fn id(cluster: &str, role: Role, instance: &str) -> SpiffeId {
    SpiffeId::new(cluster, role, instance).expect("a valid id")
}

pub fn handler(cluster: &str, node: &str) -> SpiffeId {
    id(cluster, Role::Handler, node)
}

pub fn identity(ca: &Ca, id: &SpiffeId) -> Identity {
    ca.issue(id, HOUR).expect("a certificate")
}

pub fn trust(cas: &[&Ca]) -> Trust {
    let mut trust = Trust::new();
    for ca in cas {
        trust.add_linked(ca.cluster(), ca.certificate_pem()).expect("a CA's certificate");
    }
    trust
}

/// Answers with what it was asked, and who asked.
pub struct Echo;

impl Service for Echo {
    fn peer<'a>(&'a self, peer: &'a SpiffeId, request: Value) -> Answer<'a> {
        Box::pin(async move { json!({ "peer": peer, "request": request }) })
    }

    fn local(&self, request: Value) -> Answer<'_> {
        Box::pin(async move { json!({ "local": request }) })
    }
}

/// One host: its folder, and its gateway while it runs.
pub struct Host {
    pub dir: TempDir,
    pub listen: SocketAddr,
    pub identity: Identity,
    pub trust: Trust,
    pub limits: Limits,
    pub gateway: Option<Gateway>,
}

impl Host {
    pub fn start(ip: &str, identity: Identity, trust: Trust) -> Self {
        let limits = Limits { handshake: Duration::from_secs(2), ..Limits::default() };
        Self::start_with(ip, identity, trust, limits)
    }

    pub fn start_with(ip: &str, identity: Identity, trust: Trust, limits: Limits) -> Self {
        let listen = SocketAddr::new(ip.parse().expect("an address"), 0);
        let dir = TempDir::new().expect("a folder");
        let mut host = Self { dir, listen, identity, trust, limits, gateway: None };
        host.restart();
        host
    }

    /// Starts the gateway, again at the same address.
    pub fn restart(&mut self) {
        let gateway = Gateway::start(Config {
            listen: self.listen,
            host_dir: self.dir.path().into(),
            identity: self.identity.clone(),
            trust: self.trust.clone(),
            service: Arc::new(Echo),
            limits: self.limits.clone(),
        });
        let gateway = gateway.expect("the gateway starts");
        self.listen = gateway.local_addr();
        self.gateway = Some(gateway);
    }

    pub async fn kill(&mut self) {
        if let Some(gateway) = self.gateway.take() {
            gateway.shutdown().await;
        }
    }

    pub fn id(&self) -> SpiffeId {
        self.identity.id().clone()
    }

    pub fn address(&self) -> String {
        self.listen.to_string()
    }

    pub fn client(&self) -> GatewayClient {
        GatewayClient::new(self.dir.path())
    }

    pub fn gateway(&self) -> &Gateway {
        self.gateway.as_ref().expect("the gateway runs")
    }
}

/// A source and a target host of one cluster.
pub fn pair() -> (Host, Host) {
    let ca = Ca::create("east").expect("a CA");
    let source = identity(&ca, &handler("east", "node-a"));
    let target = identity(&ca, &handler("east", "node-b"));
    (
        Host::start("127.0.0.2", source, trust(&[&ca])),
        Host::start("127.0.0.3", target, trust(&[&ca])),
    )
}

/// A launcher that waits for a migration's streams.
pub struct Target {
    pub listener: UnixListener,
    pub tokens: Arc<Mutex<Tokens>>,
}

impl Target {
    pub fn of(host: &Host, vm: &str) -> Self {
        let dir = host.dir.path().join("vms").join(vm);
        std::fs::create_dir_all(&dir).expect("a folder");
        Self::in_dir(&dir)
    }

    pub fn in_dir(dir: &Path) -> Self {
        let listener = client::listen(dir).expect("the launcher listens");
        Self { listener, tokens: Arc::default() }
    }

    pub fn issue(&self, stream: Stream) -> Token {
        self.tokens.lock().expect("no panic").issue(stream)
    }

    /// The next stream that stands, refusing those that do not on the way.
    pub async fn next(&self) -> (Preface, SpiffeId, UnixStream) {
        loop {
            let (stream, _) = self.listener.accept().await.expect("a connection");
            match self.admit(stream).await {
                Ok(Some(accepted)) => return accepted,
                Ok(None) | Err(IncomingError::Cut(_)) => {}
                Err(e) => panic!("an incoming stream failed: {e:?}"),
            }
        }
    }

    async fn admit(
        &self,
        stream: UnixStream,
    ) -> Result<Option<(Preface, SpiffeId, UnixStream)>, IncomingError> {
        let incoming = Incoming::read(stream, PATIENCE).await?;
        let (preface, peer) = (incoming.preface().clone(), incoming.peer().clone());
        let offered = self.tokens.lock().expect("no panic").offer(preface.stream, &preface.token);
        match offered {
            Ok(successor) => {
                let stream = incoming.accept(&successor, PATIENCE).await?;
                let stands =
                    self.tokens.lock().expect("no panic").confirm(preface.stream, &successor);
                Ok(stands.then_some((preface, peer, stream)))
            }
            Err(refusal) => {
                incoming.refuse(refusal).await;
                Ok(None)
            }
        }
    }
}

pub fn preface(vm: &str, stream: Stream, token: &Token) -> Preface {
    Preface {
        vm: vm.parse().expect("a VM's name"),
        migration: "m1".into(),
        stream,
        token: token.clone(),
    }
}
