//! TLS 1.3, both sides with certificates, and nothing else.
//!
//! A certificate is believed in this order: it carries one SPIFFE id; a CA *of that id's
//! cluster* signed it, now and for this use; the id has the role (a server's check) or is
//! exactly the one (a client's check) that is expected here. Sessions are never resumed,
//! so every connection makes the whole check.
//!
//! One server alone, where it says so, lets somebody in who has no such certificate: a cluster that is about to
//! be linked, which proves by a secret that it was invited.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{Acceptor, NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, DistinguishedName,
    OtherError, ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor, TlsConnector, client, server};

use crate::identity::{self, Identity, Role, SpiffeId, Trust, id_of};

/// Names this protocol to the other side, so that no other TLS service takes part.
const ALPN: &[u8] = b"godwit/1";

/// Why a peer was not believed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// It carries no id, two, or a malformed one.
    #[error("the peer's certificate does not say who it is: {0}")]
    NoId(String),
    /// No CA of its cluster is known here.
    #[error(
        "{peer} is of cluster {}, which is not trusted here; link the clusters first",
        peer.cluster()
    )]
    UnknownCluster {
        /// Who it claims to be.
        peer: SpiffeId,
    },
    /// Signed by anybody but a CA of its own cluster.
    #[error(
        "{peer} is not vouched for by the CA of cluster {}; was the CA replaced, or does \
         another cluster claim its name?",
        peer.cluster()
    )]
    WrongCa {
        /// Who it claims to be.
        peer: SpiffeId,
    },
    /// Its time is over.
    #[error("the certificate of {peer} has expired; renew it, or check this host's clock")]
    Expired {
        /// Who it claims to be.
        peer: SpiffeId,
    },
    /// Its time has not begun.
    #[error("the certificate of {peer} is not valid yet; check the clocks of both hosts")]
    NotYetValid {
        /// Who it claims to be.
        peer: SpiffeId,
    },
    /// The chain is broken in some other way.
    #[error("the certificate of {peer} is not valid: {text}")]
    Invalid {
        /// Who it claims to be.
        peer: SpiffeId,
        /// What the verifier said.
        text: String,
    },
    /// Believed, but may not speak here.
    #[error("{peer} has the role {}; only these may connect here: {allowed}", peer.role())]
    WrongRole {
        /// Who it is.
        peer: SpiffeId,
        /// The roles that may.
        allowed: String,
    },
    /// Believed, but of another cluster than was called.
    #[error("{peer} answered where cluster {expected} was expected; was the address given away?")]
    WrongCluster {
        /// Who it is.
        peer: SpiffeId,
        /// The cluster that was called.
        expected: String,
    },
    /// Believed, but not the one that was called.
    #[error(
        "{peer} answered where {expected} was expected; was the address given to another node?"
    )]
    WrongInstance {
        /// Who it is.
        peer: SpiffeId,
        /// Who was called.
        expected: SpiffeId,
    },
}

/// Why a TLS connection does not stand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// We do not believe the peer.
    #[error("{0}")]
    Peer(PeerError),
    /// The peer does not believe us.
    #[error(
        "the peer refused this host's certificate ({0}); its log says why. Common reasons: \
         clusters that are not linked, an expired certificate, a wrong clock"
    )]
    RefusedByPeer(String),
    /// Our own credentials do not work.
    #[error("this host's certificate and key do not work together")]
    Credentials(#[source] rustls::Error),
    /// Anything else on the way.
    #[error("the TLS handshake failed")]
    Handshake(#[source] std::io::Error),
}

/// Whoever says this has no certificate that could be checked, and says so.
const GUEST: &[u8] = b"godwit-guest/1";

/// Accepts peers of certain roles.
#[derive(Clone)]
pub struct Server {
    peers: Arc<ServerConfig>,
    guests: Arc<ServerConfig>,
}

/// Who came.
#[derive(Debug)]
pub enum Accepted<S> {
    /// One whose certificate was checked.
    Peer(server::TlsStream<S>, SpiffeId),
    /// One without. What it may ask, and what it must know for that, is the caller's to see to.
    Guest(server::TlsStream<S>),
}

/// Calls peers, each by its exact id.
#[derive(Clone)]
pub struct Client {
    base: Arc<Base>,
    identity: Identity,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("tls::Server")
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tls::Client({})", self.identity.id())
    }
}

impl Server {
    /// A server with these credentials for peers of the roles `allowed`.
    pub fn new(identity: &Identity, trust: Trust, allowed: &[Role]) -> Result<Self, Error> {
        let base = Base::new(trust);
        let provider = base.provider.clone();
        let verifier = Verifier { base, expected: Expected::Roles(allowed.into()) };
        let config = |verifier: Arc<dyn ClientCertVerifier>, alpn: &[u8]| {
            let mut config = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(Error::Credentials)?
                .with_client_cert_verifier(verifier)
                .with_single_cert(identity.chain(), identity.key())
                .map_err(Error::Credentials)?;
            config.send_tls13_tickets = 0;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.alpn_protocols = vec![alpn.into()];
            Ok(Arc::new(config))
        };
        let peers = config(Arc::new(verifier), ALPN)?;
        Ok(Self { peers, guests: config(WebPkiClientVerifier::no_client_auth(), GUEST)? })
    }

    /// Shakes hands; returns the stream and who is at its other end.
    pub async fn accept<S>(&self, io: S) -> Result<(server::TlsStream<S>, SpiffeId), Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = TlsAcceptor::from(self.peers.clone());
        known(settled(acceptor.accept(io).into_fallible().await).await?)
    }

    /// The same, and lets those in, too, who cannot prove yet who they are: see [`visit`].
    ///
    /// # Errors
    /// As [`Server::accept`].
    pub async fn accept_any<S>(&self, io: S) -> Result<Accepted<S>, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await;
        let hello = hello.map_err(Error::from_io)?;
        let is_guest =
            hello.client_hello().alpn().is_some_and(|mut alpn| alpn.any(|one| one == GUEST));
        let config = if is_guest { &self.guests } else { &self.peers };
        let shaken = hello.into_stream(config.clone()).into_fallible().await;
        let stream = settled(shaken).await?;
        match is_guest {
            true => Ok(Accepted::Guest(stream)),
            false => known(stream).map(|(stream, peer)| Accepted::Peer(stream, peer)),
        }
    }
}

/// Ends a handshake that failed so that its peer hears why.
async fn settled<S>(
    shaken: Result<server::TlsStream<S>, (std::io::Error, S)>,
) -> Result<server::TlsStream<S>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match shaken {
        Ok(stream) => Ok(stream),
        Err((error, mut io)) => {
            // Or the reset that follows unread bytes would outrun the alert.
            crate::copy::farewell(&mut io).await;
            Err(Error::from_io(error))
        }
    }
}

fn known<S>(stream: server::TlsStream<S>) -> Result<(server::TlsStream<S>, SpiffeId), Error> {
    let id = peer_of(stream.get_ref().1.peer_certificates())?;
    Ok((stream, id))
}

/// Shakes hands with whoever has a role in a cluster, without proving who asks: a [`Accepted::Guest`]
/// there. The other end is checked as ever.
///
/// # Errors
/// As [`Client::connect`].
pub async fn visit<S>(
    trust: Trust,
    role: Role,
    cluster: &str,
    io: S,
) -> Result<client::TlsStream<S>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let base = Base::new(trust);
    let expected = Expected::Of { role, cluster: Some(cluster.to_owned()) };
    let config = checking(&base, expected)?.with_no_client_auth();
    call(config, GUEST, io).await
}

/// A client's configuration that checks who answers.
fn checking(
    base: &Arc<Base>,
    expected: Expected,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error> {
    let verifier = Verifier { base: base.clone(), expected };
    Ok(ClientConfig::builder_with_provider(base.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::Credentials)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

async fn call<S>(
    mut config: ClientConfig,
    alpn: &[u8],
    io: S,
) -> Result<client::TlsStream<S>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.alpn_protocols = vec![alpn.into()];
    // The id is in the URI, not in a DNS name; this one is sent to nobody.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    TlsConnector::from(Arc::new(config)).connect(name, io).await.map_err(Error::from_io)
}

impl Client {
    /// A client with these credentials.
    pub fn new(identity: Identity, trust: Trust) -> Self {
        Self { base: Base::new(trust), identity }
    }

    /// Shakes hands with exactly `expected`.
    ///
    /// N.B. TLS 1.3 ends the client's handshake before the server has judged the client:
    /// a refusal shows at the first read. [`Error::from_io`] tells it apart there.
    pub async fn connect<S>(
        &self,
        expected: &SpiffeId,
        io: S,
    ) -> Result<client::TlsStream<S>, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.shake(Expected::Exactly(expected.clone()), io).await
    }

    /// Shakes hands with whoever has a role, in one cluster or in any that is believed; returns who it
    /// is.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_to<S>(
        &self,
        role: Role,
        cluster: Option<&str>,
        io: S,
    ) -> Result<(client::TlsStream<S>, SpiffeId), Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let expected = Expected::Of { role, cluster: cluster.map(str::to_owned) };
        let stream = self.shake(expected, io).await?;
        let id = peer_of(stream.get_ref().1.peer_certificates())?;
        Ok((stream, id))
    }

    async fn shake<S>(&self, expected: Expected, io: S) -> Result<client::TlsStream<S>, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = checking(&self.base, expected)?
            .with_client_auth_cert(self.identity.chain(), self.identity.key())
            .map_err(Error::Credentials)?;
        call(config, ALPN, io).await
    }
}

impl Error {
    /// Finds what TLS meant by an I/O error of a handshake or of a first read.
    pub fn from_io(error: std::io::Error) -> Self {
        let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
                if let Some(peer) = other.0.downcast_ref::<PeerError>() {
                    return Self::Peer(peer.clone());
                }
            }
            Some(rustls::Error::AlertReceived(alert)) => {
                return Self::RefusedByPeer(format!("{alert:?}"));
            }
            _ => {}
        }
        Self::Handshake(error)
    }
}

fn peer_of(chain: Option<&[CertificateDer<'_>]>) -> Result<SpiffeId, Error> {
    let leaf = chain.and_then(|c| c.first());
    let leaf = leaf.ok_or_else(|| Error::Peer(PeerError::NoId("there is none".into())))?;
    id_of(leaf).map_err(|e| Error::Peer(PeerError::NoId(e.to_string())))
}

/// What every check needs.
#[derive(Debug)]
struct Base {
    trust: Trust,
    provider: Arc<CryptoProvider>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Base {
    fn new(trust: Trust) -> Arc<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        Arc::new(Self { trust, provider, algorithms })
    }
}

#[derive(Debug)]
enum Expected {
    Roles(Vec<Role>),
    Exactly(SpiffeId),
    Of { role: Role, cluster: Option<String> },
}

impl Expected {
    fn check(&self, peer: SpiffeId) -> Result<(), PeerError> {
        match self {
            Self::Roles(allowed) if !allowed.contains(&peer.role()) => {
                let allowed: Vec<_> = allowed.iter().map(|r| r.as_str()).collect();
                Err(PeerError::WrongRole { peer, allowed: allowed.join(", ") })
            }
            Self::Exactly(expected) if *expected != peer => {
                Err(PeerError::WrongInstance { peer, expected: expected.clone() })
            }
            Self::Of { cluster: Some(cluster), .. } if peer.cluster() != cluster => {
                Err(PeerError::WrongCluster { peer, expected: cluster.clone() })
            }
            Self::Of { role, .. } if *role != peer.role() => {
                Err(PeerError::WrongRole { peer, allowed: role.to_string() })
            }
            _ => Ok(()),
        }
    }
}

/// WebPKI's chain check, by the CAs of the cluster that the certificate names, and ours.
#[derive(Debug)]
struct Verifier {
    base: Arc<Base>,
    expected: Expected,
}

impl Verifier {
    /// `chain` checks the certificate against the CAs of its own cluster.
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        chain: impl FnOnce(&rustls::RootCertStore) -> Result<(), rustls::Error>,
    ) -> Result<(), rustls::Error> {
        self.judge(leaf, chain).map_err(|e| {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e))))
        })
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        chain: impl FnOnce(&rustls::RootCertStore) -> Result<(), rustls::Error>,
    ) -> Result<(), PeerError> {
        let peer = id_of(leaf).map_err(|e: identity::Error| PeerError::NoId(e.to_string()))?;
        let Some(roots) = self.base.trust.roots(peer.cluster()) else {
            return Err(PeerError::UnknownCluster { peer });
        };
        match chain(roots) {
            Ok(()) => self.expected.check(peer),
            Err(e) => Err(named(peer, e)),
        }
    }
}

fn named(peer: SpiffeId, error: rustls::Error) -> PeerError {
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer,
    };
    match error {
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => {
            PeerError::Expired { peer }
        }
        rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => {
            PeerError::NotYetValid { peer }
        }
        rustls::Error::InvalidCertificate(UnknownIssuer | BadSignature) => {
            PeerError::WrongCa { peer }
        }
        e => PeerError::Invalid { peer, text: e.to_string() },
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, |roots| {
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(leaf)?,
                roots,
                intermediates,
                now,
                self.base.algorithms.all,
            )
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.base.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.base.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(leaf, |roots| {
            let roots = Arc::new(roots.clone());
            WebPkiClientVerifier::builder_with_provider(roots, self.base.provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?
                .verify_client_cert(leaf, intermediates, now)
                .map(|_| ())
        })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.base.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.base.algorithms.supported_schemes()
    }
}

fn only_tls13() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken here".into())
}
