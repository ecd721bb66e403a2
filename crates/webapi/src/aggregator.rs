//! Who speaks for others: the API server passes requests on and says in headers whose they are. It
//! is known by a certificate of a CA that the cluster names for this alone.
//!
//! Source: k8s.io/apiserver's `authentication/request/headerrequest`.

use crate::failure;
use apiserver::auth::{AUTHENTICATED, User};
use apiserver::request::decoded;
use apiserver::status::Failure;
use http::{HeaderMap, HeaderValue};
use kube::Client;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

const CONFIG: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
const UNAUTHENTICATED: &str = "system:unauthenticated";

/// What a cluster says of its aggregators.
#[derive(Debug, Clone, Default)]
pub struct Aggregator {
    /// Its CA; PEM. Empty: there are none.
    authority: String,
    /// The certificates' names; empty: any.
    names: Vec<String>,
    user: Vec<String>,
    uid: Vec<String>,
    groups: Vec<String>,
    /// Prefixes.
    extra: Vec<String>,
}

impl Aggregator {
    /// As the cluster says it now.
    ///
    /// # Errors
    /// The API's, and 500 when it cannot be understood.
    pub async fn read(client: &Client) -> Result<Self, Failure> {
        let request = http::Request::get(CONFIG).body(Vec::new());
        let request = request.map_err(|error| Failure::internal(error.to_string()))?;
        let found: Value = client.request(request).await.map_err(failure)?;
        Self::parse(&found["data"])
    }

    /// From the ConfigMap's data.
    fn parse(data: &Value) -> Result<Self, Failure> {
        let list = |key: &str| -> Result<Vec<String>, Failure> {
            let text = data[key].as_str().unwrap_or("[]");
            serde_json::from_str(text).map_err(|error| {
                Failure::internal(format!(
                    "{key} of the ConfigMap kube-system/extension-apiserver-authentication is no \
                     list of texts: {error}"
                ))
            })
        };
        Ok(Self {
            authority: data["requestheader-client-ca-file"].as_str().unwrap_or_default().into(),
            names: list("requestheader-allowed-names")?,
            user: list("requestheader-username-headers")?,
            uid: list("requestheader-uid-headers")?,
            groups: list("requestheader-group-headers")?,
            extra: list("requestheader-extra-headers-prefix")?,
        })
    }

    /// Who vouches for aggregators; None: nobody does.
    ///
    /// # Errors
    /// 500 when that is no certificate.
    pub fn roots(&self) -> Result<Option<RootCertStore>, Failure> {
        let wrong = |why: String| {
            Failure::internal(format!("the cluster's CA of aggregators cannot be used: {why}"))
        };
        let mut roots = RootCertStore::empty();
        for der in CertificateDer::pem_slice_iter(self.authority.as_bytes()) {
            let der = der.map_err(|error| wrong(error.to_string()))?;
            roots.add(der).map_err(|error| wrong(error.to_string()))?;
        }
        Ok((!roots.is_empty()).then_some(roots))
    }

    /// Whether a certificate that its CA vouches for may speak for others.
    pub fn is(&self, certificate: &CertificateDer<'_>) -> bool {
        let name = User::of_certificate(certificate).map(|user| user.name);
        self.names.is_empty() || name.is_some_and(|name| self.names.contains(&name))
    }

    /// Whose a request is, in the word of an aggregator.
    pub fn user(&self, headers: &HeaderMap) -> Option<User> {
        let all = |name: &String| -> Vec<String> {
            headers.get_all(name.as_str()).iter().filter_map(text).collect()
        };
        let first = |names: &[String]| {
            names.iter().flat_map(all).find(|value| !value.is_empty()).unwrap_or_default()
        };
        let name = first(&self.user);
        if name.is_empty() {
            return None;
        }
        let mut groups: Vec<String> = self.groups.iter().flat_map(all).collect();
        if !groups.iter().any(|group| group == AUTHENTICATED || group == UNAUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        let mut user = User { name, uid: first(&self.uid), groups, ..User::default() };
        for (header, value) in headers {
            let Some(key) = self
                .extra
                .iter()
                .find_map(|prefix| header.as_str().strip_prefix(&*prefix.to_ascii_lowercase()))
            else {
                continue;
            };
            let key = decoded(key).unwrap_or_else(|_| key.to_owned());
            user.extra.entry(key).or_default().extend(text(value));
        }
        Some(user)
    }
}

/// A header's value; None: none that could be somebody's name.
fn text(value: &HeaderValue) -> Option<String> {
    std::str::from_utf8(value.as_bytes()).ok().map(str::to_owned)
}
