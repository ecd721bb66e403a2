//! The API role's server beside a world, as the API server of another cluster would reach it.

use crate::world::{Reply, World, admin};
use apiserver::auth::{MASTERS, User};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use kube::Client;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webapi::WebApi;
use webapi::server::{Config, Credential, run};

/// A certificate and its key.
pub type Certificate = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// Vouches for clients.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    pub fn client(&self, name: &str) -> Certificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

pub struct Site {
    pub world: World,
    /// Vouches for aggregators.
    pub aggregators: Authority,
    address: SocketAddr,
    own: CertificateDer<'static>,
    _ending: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Site {
    pub async fn new() -> Self {
        let world = World::new().await;
        let aggregators = Authority::new();
        // As kube-apiserver publishes it.
        let config = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "extension-apiserver-authentication"},
            "data": {
                "requestheader-allowed-names": r#"["front-proxy-client"]"#,
                "requestheader-client-ca-file": aggregators.pem,
                "requestheader-extra-headers-prefix": r#"["X-Remote-Extra-"]"#,
                "requestheader-group-headers": r#"["X-Remote-Group"]"#,
                "requestheader-username-headers": r#"["X-Remote-User"]"#,
            },
        });
        world.create(&admin(), "/api/v1/namespaces/kube-system/configmaps", &config).await;
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let credential = Credential { chain: own.cert.pem(), key: own.signing_key.serialize_pem() };
        let account = User::new("system:serviceaccount:kubevirt:godwit-api", &[MASTERS]);
        let client = Client::new(world.server.api.as_user(account), "default");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ending, ends) = watch::channel(false);
        let web = Arc::new(WebApi::new(client.clone(), world.guests.clone()));
        let (_, credential) = watch::channel(credential);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            run(Config { web, client, listener, credential, ending: ends }).await.unwrap();
        });
        let own = own.cert.der().clone();
        Self { world, aggregators, address, own, _ending: ending, _tasks: tasks }
    }

    /// A connection, with a client's certificate or none.
    pub async fn connect(&self, certificate: Option<Certificate>) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.own.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certificate {
            Some((certificate, key)) => {
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// What comes back; None: the connection is not let in.
    pub async fn send(
        &self,
        certificate: Option<Certificate>,
        method: Method,
        path: &str,
        headers: &[(&'static str, &str)],
        body: String,
    ) -> Option<Reply> {
        let stream = TokioIo::new(self.connect(certificate).await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.ok()?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("Host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let (head, body) = sender.send_request(request).await.ok()?.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes).unwrap_or_default();
        Some(Reply { code: head.status.as_u16(), headers: head.headers, body })
    }

    /// As the API server passes a user's request on.
    pub async fn aggregated(&self, user: &str, method: Method, path: &str) -> Reply {
        let certificate = self.aggregators.client("front-proxy-client");
        let headers = [("X-Remote-User", user), ("X-Remote-Group", "system:authenticated")];
        self.send(Some(certificate), method, path, &headers, String::new()).await.unwrap()
    }

    /// As the API server asks a webhook.
    pub async fn webhook(&self, path: &str, review: &Value) -> Reply {
        let headers = [("Content-Type", "application/json")];
        self.send(None, Method::POST, path, &headers, review.to_string()).await.unwrap()
    }
}
