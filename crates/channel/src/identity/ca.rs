//! A cluster's certificate authority, and the credentials that it issues.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::{Error, SpiffeId, check_cluster, files, trust};

const CA_CERT: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const CERT: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Clocks of two hosts differ: a new certificate is valid from a little earlier.
const SKEW: Duration = Duration::from_secs(5 * 60);
/// Of the CA of hosts that no cluster looks after.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A cluster's CA: vouches for the ids of its own cluster, and for no others.
pub struct Ca {
    cluster: String,
    pem: String,
    validity: Validity,
    issuer: Issuer<'static, KeyPair>,
}

/// When a certificate is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// When it was made: it holds from a little earlier, since clocks differ.
    pub made: SystemTime,
    /// Its last moment.
    pub until: SystemTime,
}

impl Validity {
    fn of(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let (from, until) = trust::validity_of(certificate)?;
        Ok(Self { made: from + SKEW, until })
    }

    /// How long it was made for.
    pub fn life(&self) -> Duration {
        self.until.duration_since(self.made).unwrap_or_default()
    }
}

impl Ca {
    /// Makes a new CA (ECDSA P-256, ten years) for a cluster.
    pub fn create(cluster: &str) -> Result<Self, Error> {
        Self::create_for(cluster, CA_VALIDITY)
    }

    /// Makes one that is valid for so long from now.
    pub fn create_for(cluster: &str, validity: Duration) -> Result<Self, Error> {
        check_cluster(cluster)?;
        let key = KeyPair::generate().map_err(Error::Generate)?;
        let mut params = params(
            &format!("spiffe://{cluster}"),
            &format!("godwit CA of {cluster}"),
            SystemTime::now() - SKEW,
            validity + SKEW,
        )?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(Error::Generate)?;
        Ok(Self {
            cluster: cluster.into(),
            pem: certificate.pem(),
            validity: Validity::of(certificate.der())?,
            issuer: Issuer::new(params, key),
        })
    }

    /// Reads a CA from its certificate and key, both PEM.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, Error> {
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|e| encoding("the CA's certificate", e))?;
        let cluster = trust::cluster_of_ca(&der)?;
        let key = KeyPair::from_pem(key).map_err(|e| encoding("the CA's key", e))?;
        let issuer =
            Issuer::from_ca_cert_der(&der, key).map_err(|e| encoding("the CA's certificate", e))?;
        Ok(Self { cluster, pem: certificate.into(), validity: Validity::of(&der)?, issuer })
    }

    /// Writes `ca.crt` and `ca.key` (0600) into a folder.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::write(dir, CA_KEY, self.issuer.key().serialize_pem().as_bytes())?;
        files::write(dir, CA_CERT, self.pem.as_bytes())
    }

    /// Reads what [`Ca::save`] wrote.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let key = files::read_text(&dir.join(CA_KEY), true)?;
        Self::from_pem(&files::read_text(&dir.join(CA_CERT), false)?, &key)
    }

    /// The cluster that it vouches for.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its certificate, which peers put into their [`super::Trust`].
    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    /// When it is believed.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// A new key and a certificate for `id`, valid from five minutes ago (clocks differ)
    /// for `validity` from now.
    pub fn issue(&self, id: &SpiffeId, validity: Duration) -> Result<Identity, Error> {
        self.issue_from(id, SystemTime::now() - SKEW, validity + SKEW)
    }

    /// As [`Ca::issue`], valid from a given time on.
    pub fn issue_from(
        &self,
        id: &SpiffeId,
        from: SystemTime,
        validity: Duration,
    ) -> Result<Identity, Error> {
        if id.cluster() != self.cluster {
            let asked = id.to_string();
            return Err(Error::ForeignCluster { ca: self.cluster.clone(), asked });
        }
        let key = KeyPair::generate().map_err(Error::Generate)?;
        let mut params = params(&id.to_string(), id.instance(), from, validity)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(Error::Generate)?;
        Identity::from_pem(&certificate.pem(), &key.serialize_pem())
    }
}

impl Ca {
    /// A new key and a certificate for a server of this cluster that others than Godwit ask, by
    /// these DNS names and addresses: chain and key, both PEM. It carries no SPIFFE id, so that it
    /// is nobody to a peer.
    pub fn issue_server(
        &self,
        names: &[String],
        validity: Duration,
    ) -> Result<(String, String), Error> {
        let key = KeyPair::generate().map_err(Error::Generate)?;
        let mut params = CertificateParams::new(names).map_err(Error::Generate)?;
        params.distinguished_name = DistinguishedName::new();
        let name = names.first().map(String::as_str).unwrap_or_default();
        params.distinguished_name.push(DnType::CommonName, clipped_name(name));
        let from = SystemTime::now() - SKEW;
        (params.not_before, params.not_after) = (from.into(), (from + SKEW + validity).into());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(Error::Generate)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Its key, PEM: for who keeps it elsewhere than in a folder.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ca({})", self.cluster)
    }
}

fn params(
    uri: &str,
    name: &str,
    from: SystemTime,
    validity: Duration,
) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, clipped_name(name));
    params.subject_alt_names =
        vec![SanType::URI(uri.to_owned().try_into().map_err(Error::Generate)?)];
    let since_epoch = from.duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = date_time_ymd(1970, 1, 1) + since_epoch;
    params.not_after = params.not_before + validity;
    Ok(params)
}

/// X.509 bounds a common name to 64 characters.
fn clipped_name(name: &str) -> String {
    name.chars().take(64).collect()
}

/// A process's credentials: its certificate chain, leaf first, and its key.
pub struct Identity {
    id: SpiffeId,
    chain_pem: String,
    key_pem: String,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a chain (leaf first) and its key, both PEM.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, Error> {
        let certificates = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| encoding("the certificate chain", e))?;
        let leaf =
            certificates.first().ok_or_else(|| encoding("the certificate chain", "it is empty"))?;
        Ok(Self {
            id: trust::id_of(leaf)?,
            key: PrivateKeyDer::from_pem_slice(key.as_bytes())
                .map_err(|e| encoding("the private key", e))?,
            chain: certificates,
            chain_pem: chain.into(),
            key_pem: key.into(),
        })
    }

    /// Writes `tls.crt` and `tls.key` (both 0600) into a folder.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::write(dir, KEY, self.key_pem.as_bytes())?;
        files::write(dir, CERT, self.chain_pem.as_bytes())
    }

    /// Reads what [`Identity::save`] wrote; refuses links, keys that others may read, and a key
    /// of another certificate, as there is while the two are renewed.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let key = files::read_text(&dir.join(KEY), true)?;
        let identity = Self::from_pem(&files::read_text(&dir.join(CERT), false)?, &key)?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        CertifiedKey::from_der(identity.chain(), identity.key(), &provider)
            .map_err(|e| encoding("the pair of certificate and key", e))?;
        Ok(identity)
    }

    /// Who this is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// When the leaf ends, so that it can be renewed before.
    pub fn expires(&self) -> Result<SystemTime, Error> {
        Ok(self.validity()?.until)
    }

    /// When the leaf is believed.
    pub fn validity(&self) -> Result<Validity, Error> {
        Validity::of(&self.chain[0])
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        self.chain_pem == other.chain_pem && self.key_pem == other.key_pem
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.chain.clone()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            id: self.id.clone(),
            chain_pem: self.chain_pem.clone(),
            key_pem: self.key_pem.clone(),
            chain: self.chain(),
            key: self.key(),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.id)
    }
}

fn encoding(what: &'static str, text: impl fmt::Display) -> Error {
    Error::Encoding { what, text: text.to_string() }
}
