//! Tokens of service accounts: signed statements of who holds them and for how long.
//!
//! Source: Kubernetes' `pkg/serviceaccount/claims.go` and TokenRequest.

use super::{AUTHENTICATED, User};
use crate::meta;
use crate::status::Failure;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Seconds that a token is valid, if nothing else is asked for; the least and the most.
const SECONDS: (i64, i64, i64) = (3600, 600, 1 << 32);
/// Bytes of a token, at most.
const MOST: usize = 16 << 10;

/// The keys that tokens are signed and verified with.
pub struct Keys {
    signing: EncodingKey,
    verifying: DecodingKey,
    id: String,
    issuer: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("id", &self.id).field("issuer", &self.issuer).finish()
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    iss: String,
    jti: String,
    nbf: i64,
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Private,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Private {
    namespace: String,
    serviceaccount: Named,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Named>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Named>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Named>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    uid: String,
}

/// Looks an object up by resource, namespace and name.
pub type LookUp<'a> = &'a dyn Fn(&str, &str, &str) -> Option<Value>;

impl Keys {
    /// Of an ECDSA P-256 key pair in PEM (PKCS #8, and SubjectPublicKeyInfo).
    ///
    /// # Errors
    /// When they are not.
    pub fn new(private: &str, public: &str, issuer: &str) -> Result<Self, String> {
        let wrong = |e: jsonwebtoken::errors::Error| format!("no key for tokens: {e}");
        Ok(Self {
            signing: EncodingKey::from_ec_pem(private.as_bytes()).map_err(wrong)?,
            verifying: DecodingKey::from_ec_pem(public.as_bytes()).map_err(wrong)?,
            id: uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, public.as_bytes()).to_string(),
            issuer: issuer.to_owned(),
        })
    }

    /// The audience of tokens for this server.
    pub fn audience(&self) -> &str {
        &self.issuer
    }

    /// Answers a TokenRequest for an account.
    ///
    /// # Errors
    /// 422 when it is not valid, 404 or 409 when what it is bound to is not there.
    pub fn issue(
        &self,
        account: &Value,
        request: &Value,
        look_up: LookUp<'_>,
        now: Timestamp,
    ) -> Result<Value, Failure> {
        let spec = &request["spec"];
        let (default, least, most) = SECONDS;
        let seconds = spec["expirationSeconds"].as_i64().unwrap_or(default);
        if seconds < least {
            return Err(invalid(
                "spec.expirationSeconds: Invalid value: may not specify a duration less than 10 minutes",
            ));
        }
        if seconds > most {
            return Err(invalid(
                "spec.expirationSeconds: Invalid value: may not specify a duration larger than 2^32 seconds",
            ));
        }
        let audiences: Vec<String> = match spec["audiences"].as_array() {
            Some(all) if !all.is_empty() => {
                all.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            _ => vec![self.issuer.clone()],
        };
        let (namespace, name) = (meta::text(account, "namespace"), meta::text(account, "name"));
        let own = |object: &Value| Named {
            name: meta::text(object, "name").to_owned(),
            uid: meta::text(object, "uid").to_owned(),
        };
        let mut private = Private {
            namespace: namespace.to_owned(),
            serviceaccount: own(account),
            ..Private::default()
        };
        bind(&mut private, &spec["boundObjectRef"], name, look_up)?;
        let iat = now.as_second();
        let claims = Claims {
            aud: audiences.clone(),
            exp: iat.saturating_add(seconds),
            iat,
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            nbf: iat,
            sub: format!("system:serviceaccount:{namespace}:{name}"),
            kubernetes: private,
        };
        let header = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::ES256) };
        let token = jsonwebtoken::encode(&header, &claims, &self.signing)
            .map_err(|e| Failure::internal(format!("a token cannot be signed: {e}")))?;
        let expires = Timestamp::from_second(claims.exp).unwrap_or(now);
        let mut answer = request.clone();
        answer["spec"]["audiences"] = json!(audiences);
        answer["spec"]["expirationSeconds"] = seconds.into();
        answer["status"] = json!({"token": token, "expirationTimestamp": meta::moment(expires)});
        meta::set(&mut answer, "name", name.into());
        meta::set(&mut answer, "namespace", namespace.into());
        meta::set(&mut answer, "creationTimestamp", meta::moment(now).into());
        Ok(answer)
    }

    /// Who holds a token; None where it is none of ours, is over, or is for somebody who is gone.
    pub fn verify(&self, token: &str, audiences: &[&str], look_up: LookUp<'_>) -> Option<User> {
        if token.len() > MOST {
            return None;
        }
        let mut rules = Validation::new(Algorithm::ES256);
        rules.set_issuer(&[&self.issuer]);
        rules.set_audience(audiences);
        rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        rules.validate_nbf = true;
        rules.leeway = 10;
        let claims = jsonwebtoken::decode::<Claims>(token, &self.verifying, &rules).ok()?.claims;
        let Private { namespace, serviceaccount, pod, secret, node } = &claims.kubernetes;
        let is_there = |resource: &str, named: &Named| {
            let found = look_up(resource, namespace, &named.name)?;
            let alive = meta::text(&found, "uid") == named.uid && !is_long_gone(&found);
            alive.then_some(())
        };
        is_there("serviceaccounts", serviceaccount)?;
        if let Some(pod) = pod {
            is_there("pods", pod)?;
        }
        if let Some(secret) = secret {
            is_there("secrets", secret)?;
        }
        let name = &serviceaccount.name;
        let mut extra = BTreeMap::new();
        let mut note = |key: &str, value: &str| {
            if !value.is_empty() {
                extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
            }
        };
        note("credential-id", &format!("JTI={}", claims.jti));
        for (named, key, uid) in [(pod, "pod-name", "pod-uid"), (node, "node-name", "node-uid")] {
            if let Some(named) = named {
                note(key, &named.name);
                note(uid, &named.uid);
            }
        }
        Some(User {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: serviceaccount.uid.clone(),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                AUTHENTICATED.into(),
            ],
            extra,
        })
    }
}

/// What is being deleted may use its tokens for a minute more.
fn is_long_gone(object: &Value) -> bool {
    let at = meta::text(object, "deletionTimestamp").parse::<Timestamp>();
    at.is_ok_and(|at| Timestamp::now().duration_since(at).as_secs() > 60)
}

fn bind(
    private: &mut Private,
    reference: &Value,
    account: &str,
    look_up: LookUp<'_>,
) -> Result<(), Failure> {
    if reference.is_null() {
        return Ok(());
    }
    let name = reference["name"].as_str().unwrap_or_default();
    let (resource, slot) = match reference["kind"].as_str().unwrap_or_default() {
        "Pod" => ("pods", &mut private.pod),
        "Secret" => ("secrets", &mut private.secret),
        other => {
            return Err(Failure::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to type {other:?}"
            )));
        }
    };
    let what = crate::status::Subject { group: "", kind: resource, name };
    let found =
        look_up(resource, &private.namespace, name).ok_or_else(|| Failure::not_found(what))?;
    let uid = meta::text(&found, "uid").to_owned();
    let asked = reference["uid"].as_str().unwrap_or_default();
    if !asked.is_empty() && asked != uid {
        let why = format!(
            "the UID in the bound object reference ({asked}) does not match the UID in record. \
             The object might have been deleted and then recreated"
        );
        return Err(Failure::conflict(what, &why));
    }
    if resource == "pods" {
        let of = found["spec"]["serviceAccountName"].as_str().unwrap_or_default();
        if of != account {
            return Err(Failure::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
            )));
        }
        let node = found["spec"]["nodeName"].as_str().filter(|n| !n.is_empty());
        private.node = node.map(|node| Named {
            name: node.to_owned(),
            uid: look_up("nodes", "", node)
                .map(|n| meta::text(&n, "uid").to_owned())
                .unwrap_or_default(),
        });
    }
    *slot = Some(Named { name: name.to_owned(), uid });
    Ok(())
}

fn invalid(why: &str) -> Failure {
    Failure {
        code: 422,
        reason: "Invalid",
        message: format!("TokenRequest.authentication.k8s.io \"\" is invalid: {why}"),
        details: Value::Null,
    }
}
