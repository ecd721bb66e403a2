//! A request's way: who asks, what for, whether they may, and then to the handler.

mod shared;

use crate::auth::{Attributes, User, token};
use crate::body::{self, Answer};
use crate::catalog::Catalog;
use crate::derived::Derived;
use crate::discovery::{self, Served};
use crate::extension::{self, Extension};
use crate::handler::{self, Call, Handler, options};
use crate::request::{Accept, Info, Path, Verb};
use crate::resource::Resource;
use crate::selector::Selection;
use crate::status::Failure;
use crate::store::Store;
use crate::{builtin, openapi};
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, StatusCode, request};
use hyper::body::Body;
use serde_json::{Value, json};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

pub use shared::Shared;
use shared::{CRDS, RBAC};

/// Where the logs of pods are.
pub trait Logs: Send + Sync {
    /// A container's log, as its query asks for it.
    fn read<'a>(
        &'a self,
        pod: &'a Value,
        query: &'a [(String, String)],
    ) -> Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send + 'a>>;
}

/// What a server is made of.
pub struct Config {
    /// All objects.
    pub store: Store,
    /// For tokens of service accounts.
    pub keys: token::Keys,
    /// The logs of pods, if it has any.
    pub logs: Option<Box<dyn Logs>>,
    /// As clients reach it: `127.0.0.1:6443`.
    pub address: String,
    /// Turns true when the server ends.
    pub ending: watch::Receiver<bool>,
}

/// The server's API, as a service: over TLS, or in this process as one user.
#[derive(Clone)]
pub struct Api {
    shared: Arc<Shared>,
    handler: Handler,
}

impl Api {
    /// All objects, for who watches them from within.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Adds to it what others do. Once: an extension stays.
    pub fn extend(&self, extension: Arc<dyn Extension>) {
        if self.shared.extension.set(extension).is_err() {
            tracing::error!("this API has an extension already; the second has no effect");
        }
    }

    /// All that is served now.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.shared.catalog()
    }

    /// Of a store.
    pub fn new(config: Config) -> Self {
        let Config { store, keys, logs, address, ending } = config;
        let shared = Arc::new(Shared {
            store: store.clone(),
            keys,
            logs,
            address,
            builtin: builtin::resources(),
            catalog: Derived::new(&[CRDS]),
            rules: Derived::new(&RBAC),
            extension: OnceLock::new(),
            requests: AtomicU64::new(0),
            began: std::time::Instant::now(),
        });
        Self { handler: Handler { store, shared: shared.clone(), ending }, shared }
    }

    /// Answers a request. `certified` is who its client's certificate says it is.
    pub async fn answer<B>(&self, request: Request<B>, certified: Option<Arc<User>>) -> Answer
    where
        B: Body<Data = Bytes>,
        B::Error: std::fmt::Display,
    {
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let mut answer = match self.try_answer(request, certified).await {
            Ok(answer) => answer,
            Err(failure) => body::failure(&failure),
        };
        let headers = answer.headers_mut();
        headers.insert("Cache-Control", HeaderValue::from_static("no-cache, private"));
        if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
            headers.insert("Audit-Id", id);
        }
        answer
    }

    async fn try_answer<B>(
        &self,
        request: Request<B>,
        certified: Option<Arc<User>>,
    ) -> Result<Answer, Failure>
    where
        B: Body<Data = Bytes>,
        B::Error: std::fmt::Display,
    {
        let (head, sent) = request.into_parts();
        let user = self.authenticate(&head.headers, certified)?;
        let user = self.impersonate(&head.headers, user)?;
        let query = crate::request::query(head.uri.query().unwrap_or_default())?;
        match Info::parse(head.uri.path())? {
            Info::Other(path) => {
                self.permit_page(&head, &path, &user)?;
                match &*path {
                    "/metrics" => self.metrics().await,
                    _ => self.page(&head, &path),
                }
            }
            Info::Resource(path) if self.shared.extends(&path) => {
                self.pass_on(head, path, query, user, sent).await
            }
            Info::Resource(path) => {
                let call = self.call(&head, path, query, user, sent).await?;
                let deprecated = call.resource.deprecated.clone();
                let mut answer = self.handler.serve(call).await?;
                if let Some(warning) = deprecated {
                    handler::warn(&mut answer, &[warning.into()]);
                }
                Ok(answer)
            }
        }
    }

    /// The server's own metrics, and the extension's.
    async fn metrics(&self) -> Result<Answer, Failure> {
        let mut text = self.shared.metrics();
        if let Some(extension) = self.shared.extension.get() {
            text.push_str(&extension.metrics().await?);
        }
        Ok(body::answer(StatusCode::OK, "text/plain; version=0.0.4", text))
    }

    /// Has the extension answer.
    async fn pass_on<B>(
        &self,
        head: request::Parts,
        path: Path,
        query: Vec<(String, String)>,
        user: Arc<User>,
        sent: B,
    ) -> Result<Answer, Failure>
    where
        B: Body<Data = Bytes>,
        B::Error: std::fmt::Display,
    {
        let verb = Verb::of(&head.method, &path, false)?;
        self.shared.permit(&user, &Attributes::of(verb, &path, &query))?;
        let extension = self.shared.extension.get().ok_or_else(Failure::no_such_path)?;
        let body = body::read(sent).await?;
        extension.serve(extension::Request { path, user, query, head, body }).await
    }

    async fn call<B>(
        &self,
        head: &request::Parts,
        path: Path,
        query: Vec<(String, String)>,
        user: Arc<User>,
        sent: B,
    ) -> Result<Call, Failure>
    where
        B: Body<Data = Bytes>,
        B::Error: std::fmt::Display,
    {
        let watches = query.iter().any(|(n, v)| n == "watch" && matches!(&**v, "true" | "1"));
        let verb = Verb::of(&head.method, &path, watches)?;
        let found = self.shared.catalog().find(&path.group, &path.version, &path.resource).cloned();
        // Who may not ask is not told what there is.
        self.shared.permit(&user, &Attributes::of(verb, &path, &query))?;
        let resource = found.ok_or_else(Failure::no_such_path)?;
        check_place(&resource, &path, verb)?;
        let (options, mut selection) = options::parse(query, &resource)?;
        let name = by_name(verb, &path, &mut selection);
        let header = |name| head.headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
        let body = match verb {
            Verb::Get | Verb::List | Verb::Watch => Bytes::new(),
            _ => body::read(sent).await?,
        };
        let include = options.query.iter().find(|(n, _)| n == "includeObject").map(|(_, v)| &**v);
        let mut accept = Accept::parse(header(ACCEPT))?;
        accept.include = match include {
            Some("None") => crate::request::Include::None,
            Some("Object") => crate::request::Include::Object,
            _ => crate::request::Include::Metadata,
        };
        Ok(Call {
            verb,
            namespace: if resource.namespaced { path.namespace.into() } else { "".into() },
            resource,
            name: name.into(),
            subresource: path.subresource.into(),
            selection,
            options,
            user,
            accept,
            media: header(CONTENT_TYPE).map(str::to_owned),
            user_agent: header(USER_AGENT).unwrap_or_default().to_owned(),
            body,
        })
    }

    fn authenticate(
        &self,
        headers: &HeaderMap,
        certified: Option<Arc<User>>,
    ) -> Result<Arc<User>, Failure> {
        if let Some(user) = certified {
            return Ok(user);
        }
        let Some(header) = headers.get(AUTHORIZATION) else {
            return Ok(Arc::new(User::anonymous()));
        };
        let text = header.to_str().unwrap_or_default();
        let token = text.split_once(' ').filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
        let token = token.map(|(_, token)| token.trim()).ok_or_else(Failure::unauthorized)?;
        let audience = self.shared.keys.audience();
        let user =
            self.shared.keys.verify(token, &[audience], &|r, ns, n| self.shared.look_up(r, ns, n));
        user.map(Arc::new).ok_or_else(Failure::unauthorized)
    }

    /// Acts as another, who was named in headers, if that is allowed.
    fn impersonate(&self, headers: &HeaderMap, user: Arc<User>) -> Result<Arc<User>, Failure> {
        let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let name = headers.get("Impersonate-User").map(text).unwrap_or_default();
        let groups: Vec<String> = headers.get_all("Impersonate-Group").iter().map(text).collect();
        if name.is_empty() {
            return match groups.is_empty() {
                true => Ok(user),
                false => Err(Failure::bad_request("requested groups without impersonating a user")),
            };
        }
        let account =
            name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
        let may = |resource: &str, namespace: &str, name: &str| {
            let what = Attributes {
                verb: "impersonate".into(),
                resource: resource.into(),
                namespace: namespace.into(),
                name: name.into(),
                ..Attributes::default()
            };
            self.shared.permit(&user, &what)
        };
        match account {
            Some((namespace, account)) => may("serviceaccounts", namespace, account)?,
            None => may("users", "", &name)?,
        }
        for group in &groups {
            may("groups", "", group)?;
        }
        let mut other = User { name: name.clone(), groups, ..User::default() };
        match account {
            Some((namespace, _)) if other.groups.is_empty() => {
                other.groups = vec![
                    "system:serviceaccounts".into(),
                    format!("system:serviceaccounts:{namespace}"),
                ];
            }
            _ => {}
        }
        let known = if name == "system:anonymous" {
            "system:unauthenticated"
        } else {
            "system:authenticated"
        };
        if !other.is_in(known) {
            other.groups.push(known.into());
        }
        Ok(Arc::new(other))
    }

    /// Whether a user may see what is no resource.
    fn permit_page(&self, head: &request::Parts, path: &str, user: &User) -> Result<(), Failure> {
        let verb = head.method.as_str().to_lowercase();
        self.shared
            .permit(user, &Attributes { verb, path: path.into(), ..Attributes::default() })?;
        if head.method != http::Method::GET && head.method != http::Method::HEAD {
            return Err(Failure::no_such_verb());
        }
        Ok(())
    }

    /// What is no resource, but for the metrics.
    fn page(&self, head: &request::Parts, path: &str) -> Result<Answer, Failure> {
        let accept = head.headers.get(ACCEPT).and_then(|v| v.to_str().ok());
        let aggregated = crate::request::takes_aggregated_discovery(accept);
        let catalog = self.shared.catalog();
        let extension = self.shared.extension().map(|extension| &**extension);
        let served = Served { catalog: &catalog, extension };
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        let found = match &parts[..] {
            ["api"] if aggregated => return Ok(served.aggregated(true)),
            ["apis"] if aggregated => return Ok(served.aggregated(false)),
            ["api"] => Some(discovery::core_versions(&self.shared.address)),
            ["apis"] => Some(served.groups()),
            ["apis", group] => served.group(group),
            ["api", version] => served.resources("", version),
            ["apis", group, version] => served.resources(group, version),
            ["openapi", "v3"] => Some(openapi::index(&catalog)),
            ["openapi", "v3", "api", version] => openapi::document(&catalog, "", version),
            ["openapi", "v3", "apis", group, version] => {
                openapi::document(&catalog, group, version)
            }
            ["version"] => Some(version()),
            ["healthz" | "livez" | "readyz", ..] => {
                return Ok(body::answer(StatusCode::OK, "text/plain; charset=utf-8", "ok"));
            }
            [] => Some(
                json!({"paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/metrics", "/openapi/v3", "/readyz", "/version"]}),
            ),
            _ => None,
        };
        found.map(|page| body::json(StatusCode::OK, &page)).ok_or_else(Failure::no_such_path)
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "33", "gitVersion": format!("v1.33.0+godwit-{}", crate::VERSION),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": format!("linux/{}", crate::ARCHITECTURE),
    })
}

/// A watch of one object is one of its name.
fn by_name(verb: Verb, path: &Path, selection: &mut Selection) -> String {
    if verb == Verb::Watch && !path.name.is_empty() {
        selection.fields.0.push(("metadata.name".into(), path.name.clone(), true));
        return String::new();
    }
    path.name.clone()
}

fn check_place(resource: &Resource, path: &Path, verb: Verb) -> Result<(), Failure> {
    let one = !path.name.is_empty() || verb == Verb::Create;
    let own = &*resource.plural == "namespaces";
    match (resource.namespaced, path.namespace.is_empty()) {
        (true, true) if one && resource.stored => Err(Failure::no_such_path()),
        (false, false) if !own => Err(Failure::no_such_path()),
        _ if verb == Verb::Create && !path.name.is_empty() && path.subresource.is_empty() => {
            Err(Failure::no_such_verb())
        }
        _ => Ok(()),
    }
}
