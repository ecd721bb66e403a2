//! The cluster's certificates and keys, in a folder of its own.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Of the CA, and of what it vouches for.
const YEARS: (u32, u32) = (10, 1);
/// A certificate that ends sooner is made anew.
const RENEW: Duration = Duration::from_secs(30 * 24 * 3600);
/// A file of the folder is a page of text.
const MOST: u64 = 64 << 10;

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// A file is not what it should be.
    #[error("{} is damaged: {why}; move the folder away to have all made anew", file.display())]
    Damaged {
        /// Which.
        file: PathBuf,
        /// How.
        why: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// The clock stands before or after the time of the cluster's CA.
    #[error(
        "the clock says {now}, and the cluster's certificates hold from {from} to {until}; set the \
         clock right"
    )]
    Clock {
        /// The clock.
        now: String,
        /// The CA's first moment.
        from: String,
        /// Its last.
        until: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
}

fn damaged_file(file: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::Damaged { file: file.to_owned(), why: why.to_string() }
}

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub struct Credential {
    /// The certificate.
    pub certificate: String,
    /// PKCS #8.
    pub key: String,
}

/// The certificates and keys of a cluster.
pub struct Pki {
    folder: PathBuf,
    authority: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Pki {
    /// Opens the folder; makes it and the CA if there are none.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).map_err(|e| Error::File(folder.into(), e))?;
        let found = load(folder, "ca")?;
        let ca = match found {
            Some(ca) => ca,
            None => {
                let ca = new_authority()?;
                store(folder, "ca", &ca)?;
                ca
            }
        };
        check_clock(folder, &ca.certificate)?;
        let damaged = |e: rcgen::Error| damaged_file(&folder.join("ca.key"), &e);
        let key = KeyPair::from_pem(&ca.key).map_err(damaged)?;
        let issuer = Issuer::from_ca_cert_pem(&ca.certificate, key).map_err(damaged)?;
        Ok(Self { folder: folder.into(), authority: ca.certificate, issuer })
    }

    /// The CA's certificate, PEM.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The certificate of a user, kept under a file name.
    ///
    /// # Errors
    /// [`Error`].
    pub fn user(&self, file: &str, name: &str, groups: &[&str]) -> Result<Credential, Error> {
        self.kept(file, |params| {
            let mut subject = DistinguishedName::new();
            subject.push(DnType::CommonName, name);
            for group in groups {
                subject.push(DnType::OrganizationName, *group);
            }
            params.distinguished_name = subject;
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    }

    /// The server's TLS: its certificate for these addresses and names, and clients' certificates
    /// of this CA.
    ///
    /// # Errors
    /// [`Error`].
    pub fn server(&self, addresses: &[IpAddr], names: &[&str]) -> Result<Arc<ServerConfig>, Error> {
        let own = self.kept("server", |params| {
            let mut subject = DistinguishedName::new();
            subject.push(DnType::CommonName, "godwit-apiserver");
            params.distinguished_name = subject;
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            let addresses = addresses.iter().map(|a| SanType::IpAddress(*a));
            let names = names.iter().filter_map(|n| Some(SanType::DnsName((*n).try_into().ok()?)));
            params.subject_alt_names = addresses.chain(names).collect();
        })?;
        let damaged =
            |file: &str, e: &dyn std::fmt::Display| damaged_file(&self.folder.join(file), e);
        let chain = CertificateDer::from_pem_slice(own.certificate.as_bytes())
            .map_err(|e| damaged("server.crt", &e))?;
        let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes())
            .map_err(|e| damaged("server.key", &e))?;
        let authority = CertificateDer::from_pem_slice(self.authority.as_bytes())
            .map_err(|e| damaged("ca.crt", &e))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority).map_err(Error::Tls)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|e| damaged("ca.crt", &e))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(Error::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![chain], key)
            .map_err(Error::Tls)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// The key pair that tokens are signed with: private and public, PEM.
    ///
    /// # Errors
    /// [`Error`].
    pub fn token_keys(&self) -> Result<(String, String), Error> {
        let file = self.folder.join("tokens.key");
        let key = match read(&file)? {
            Some(key) => KeyPair::from_pem(&key).map_err(|e| damaged_file(&file, &e))?,
            None => {
                let key = KeyPair::generate()?;
                write(&file, &key.serialize_pem())?;
                key
            }
        };
        Ok((key.serialize_pem(), key.public_key_pem()))
    }

    /// The credential of a file name, made where there is none or it is about to end.
    fn kept(
        &self,
        file: &str,
        fill_in: impl FnOnce(&mut CertificateParams),
    ) -> Result<Credential, Error> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.not_before = (now - DAY).into();
        params.not_after = (now + DAY * 365 * YEARS.1).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        fill_in(&mut params);
        if let Some(found) = load(&self.folder, file)?
            && still_fits(&found.certificate, &params)
        {
            return Ok(found);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let made = Credential { certificate: certificate.pem(), key: key.serialize_pem() };
        store(&self.folder, file, &made)?;
        Ok(made)
    }
}

/// Nobody would believe a CA that is not of this time: better said once, and here.
fn check_clock(folder: &Path, authority: &str) -> Result<(), Error> {
    let file = folder.join("ca.crt");
    let der = CertificateDer::from_pem_slice(authority.as_bytes());
    let der = der.map_err(|e| damaged_file(&file, &e))?;
    let (_, found) =
        x509_parser::parse_x509_certificate(&der).map_err(|e| damaged_file(&file, &e))?;
    let validity = found.validity();
    if validity.is_valid() {
        return Ok(());
    }
    Err(Error::Clock {
        now: jiff::Timestamp::now().to_string(),
        from: validity.not_before.to_string(),
        until: validity.not_after.to_string(),
    })
}

fn new_authority() -> Result<Credential, Error> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, "godwit-cluster-ca");
    params.distinguished_name = subject;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * 365 * YEARS.0).into();
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok(Credential { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Whether a certificate lasts, and is for all that a new one would be for.
fn still_fits(pem: &str, wanted: &CertificateParams) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return false };
    let Ok((_, found)) = x509_parser::parse_x509_certificate(&der) else { return false };
    let left = found.validity().time_to_expiration();
    let lasts = left.is_some_and(|left| left.whole_seconds() > RENEW.as_secs() as i64);
    let alternatives = found.subject_alternative_name().ok().flatten();
    let names = alternatives.map(|a| a.value.general_names.as_slice()).unwrap_or_default();
    let has = |wanted: &SanType| {
        match wanted {
        SanType::IpAddress(address) => {
            let bytes = match address {
                IpAddr::V4(a) => a.octets().to_vec(),
                IpAddr::V6(a) => a.octets().to_vec(),
            };
            names.iter().any(|n| matches!(n, x509_parser::extensions::GeneralName::IPAddress(b) if *b == bytes))
        }
        SanType::DnsName(name) => names
            .iter()
            .any(|n| matches!(n, x509_parser::extensions::GeneralName::DNSName(d) if *d == name.as_str())),
        _ => false,
    }
    };
    lasts && wanted.subject_alt_names.iter().all(has)
}

fn load(folder: &Path, name: &str) -> Result<Option<Credential>, Error> {
    let certificate = read(&folder.join(format!("{name}.crt")))?;
    let key = read(&folder.join(format!("{name}.key")))?;
    Ok(certificate.zip(key).map(|(certificate, key)| Credential { certificate, key }))
}

/// The key first: a certificate without its key is as none.
fn store(folder: &Path, name: &str, credential: &Credential) -> Result<(), Error> {
    write(&folder.join(format!("{name}.key")), &credential.key)?;
    write(&folder.join(format!("{name}.crt")), &credential.certificate)
}

fn read(file: &Path) -> Result<Option<String>, Error> {
    let fail = |e| Error::File(file.to_owned(), e);
    match std::fs::symlink_metadata(file) {
        Ok(meta) if meta.is_file() && meta.len() <= MOST => {
            std::fs::read_to_string(file).map(Some).map_err(fail)
        }
        Ok(_) => Err(damaged_file(file, &"it is no small file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(fail(error)),
    }
}

/// Whole or not at all; for its owner alone.
fn write(file: &Path, text: &str) -> Result<(), Error> {
    let draft = file.with_extension("new");
    let written = (|| {
        // One that was left half-written is of no use.
        let _ = std::fs::remove_file(&draft);
        let mut out = std::fs::OpenOptions::new();
        let mut out = out.write(true).create_new(true).mode(0o600).open(&draft)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&draft, file)
    })();
    written.map_err(|e| Error::File(file.to_owned(), e))
}
