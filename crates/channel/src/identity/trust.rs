//! Whom to believe: the CAs of one's own and of linked clusters.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::{Error, SpiffeId, check_cluster, clipped, files};

/// CA certificates by the cluster that each vouches for. A cluster may have several,
/// as it has while its CA is rotated.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    roots: BTreeMap<String, RootCertStore>,
}

impl Trust {
    /// Trusts nobody yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads PEM files of CA certificates, one or more in each.
    pub fn load<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self, Error> {
        let mut trust = Self::new();
        for path in paths {
            trust.add_pem(&files::read_text(path.as_ref(), false)?)?;
        }
        if trust.roots.is_empty() {
            return Err(Error::EmptyTrust);
        }
        Ok(trust)
    }

    /// Adds every CA certificate of a PEM text; each vouches for the cluster it names.
    pub fn add_pem(&mut self, pem: &str) -> Result<(), Error> {
        self.add(pem, None)
    }

    /// Adds the CA of one linked cluster; refused if it names any other. What a peer
    /// cluster handed over goes through here, or it could hand over a second CA for ours.
    pub fn add_linked(&mut self, cluster: &str, pem: &str) -> Result<(), Error> {
        self.add(pem, Some(cluster))
    }

    fn add(&mut self, pem: &str, only: Option<&str>) -> Result<(), Error> {
        let mut added = Vec::new();
        for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let der = der.map_err(|e| unreadable(&e))?;
            let cluster = cluster_of_ca(&der)?;
            if let Some(only) = only.filter(|only| *only != cluster) {
                return Err(Error::ForeignCluster { ca: cluster, asked: only.into() });
            }
            added.push((cluster, der));
        }
        if added.is_empty() {
            return Err(Error::EmptyTrust);
        }
        for (cluster, der) in added {
            let roots = self.roots.entry(cluster).or_insert_with(RootCertStore::empty);
            roots.add(der).map_err(|e| unreadable(&e))?;
        }
        Ok(())
    }

    /// The clusters it knows.
    pub fn clusters(&self) -> impl Iterator<Item = &str> {
        self.roots.keys().map(String::as_str)
    }

    pub(crate) fn roots(&self, cluster: &str) -> Option<&RootCertStore> {
        self.roots.get(cluster)
    }
}

/// The certificates in a text that other clusters than `own` have of their CAs, and that have not ended;
/// each once, as it was. What else there is in it is left out: it is people's, or another program's.
pub fn linked(pem: &str, own: &str, now: SystemTime) -> Vec<String> {
    certificates(pem, now, |cluster| cluster != own)
}

/// Those that one cluster has of its CAs, in the same way.
pub fn linked_of(pem: &str, cluster: &str, now: SystemTime) -> Vec<String> {
    certificates(pem, now, |found| found == cluster)
}

/// When the first certificate of a text ends. None: there is none in it.
pub fn soonest_end(pem: &str) -> Option<SystemTime> {
    let all = CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok);
    all.filter_map(|der| Some(validity_of(&der).ok()?.1)).min()
}

fn certificates(pem: &str, now: SystemTime, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let mut found: Vec<String> = Vec::new();
    for part in pem.split(BEGIN).skip(1) {
        let Some((body, _)) = part.split_once(END) else { continue };
        let text = format!("{BEGIN}\n{}\n{END}\n", body.trim());
        let Ok(der) = CertificateDer::from_pem_slice(text.as_bytes()) else { continue };
        let is_wanted = cluster_of_ca(&der).is_ok_and(|cluster| wanted(&cluster));
        let lasts = validity_of(&der).is_ok_and(|(_, until)| now < until);
        if is_wanted && lasts && !found.contains(&text) {
            found.push(text);
        }
    }
    found
}

/// The one id that a certificate carries.
pub(crate) fn id_of(der: &CertificateDer<'_>) -> Result<SpiffeId, Error> {
    only_uri(&parse(der)?)?.parse()
}

/// The cluster that a CA's certificate names.
pub(super) fn cluster_of_ca(der: &CertificateDer<'_>) -> Result<String, Error> {
    let certificate = parse(der)?;
    if !certificate.is_ca() {
        return Err(Error::NotACa);
    }
    let uri = only_uri(&certificate)?;
    let cluster = uri.strip_prefix("spiffe://").ok_or_else(|| Error::Malformed {
        what: "CA's id",
        value: clipped(&uri),
        rule: "spiffe://<cluster>",
    })?;
    check_cluster(cluster)?;
    Ok(cluster.into())
}

/// The first and the last moment of a certificate.
pub(super) fn validity_of(der: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), Error> {
    let certificate = parse(der)?;
    let moment = |time: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
    };
    let validity = certificate.validity();
    Ok((moment(validity.not_before), moment(validity.not_after)))
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(unreadable(&"bytes follow it")),
        Err(e) => Err(unreadable(&e)),
    }
}

fn only_uri(certificate: &X509Certificate<'_>) -> Result<String, Error> {
    let names = certificate.subject_alternative_name().map_err(|e| unreadable(&e))?;
    let names = names.map(|n| n.value.general_names.as_slice()).unwrap_or_default();
    match names {
        [GeneralName::URI(uri)] => Ok((*uri).into()),
        names => Err(Error::NotOneUri { found: names.len() }),
    }
}

fn unreadable(text: &dyn std::fmt::Display) -> Error {
    Error::Encoding { what: "a certificate", text: text.to_string() }
}
