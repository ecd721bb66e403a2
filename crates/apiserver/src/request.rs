//! What a request asks for, from its method, its path and its query.
//!
//! Source: k8s.io/apiserver's `RequestInfo` and the options of k8s.io/apimachinery's `meta/v1`.

use crate::status::Failure;
use http::Method;

/// A request to the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// To a resource.
    Resource(Path),
    /// To anything else, such as `/healthz` and `/apis`.
    Other(String),
}

/// Which resource a request is for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Path {
    /// Empty for the core group.
    pub group: String,
    /// Such as `v1`.
    pub version: String,
    /// Empty: in all, or the resource has none.
    pub namespace: String,
    /// The plural.
    pub resource: String,
    /// Empty: all of them.
    pub name: String,
    /// Empty: the object itself.
    pub subresource: String,
}

/// What is done with a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// As rules name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    /// Of a request to one object or to all.
    ///
    /// # Errors
    /// 405 for other methods.
    pub fn of(method: &Method, path: &Path, watch: bool) -> Result<Self, Failure> {
        let one = !path.name.is_empty();
        match *method {
            Method::GET | Method::HEAD if watch => Ok(Self::Watch),
            Method::GET | Method::HEAD if one => Ok(Self::Get),
            Method::GET | Method::HEAD => Ok(Self::List),
            // A subresource of an object is made by a POST to it.
            Method::POST => Ok(Self::Create),
            Method::PUT if one => Ok(Self::Update),
            Method::PATCH if one => Ok(Self::Patch),
            Method::DELETE if one => Ok(Self::Delete),
            Method::DELETE => Ok(Self::DeleteCollection),
            _ => Err(Failure::no_such_verb()),
        }
    }
}

impl Info {
    /// Of a path as it was sent.
    ///
    /// # Errors
    /// 400 when it is no text.
    pub fn parse(path: &str) -> Result<Self, Failure> {
        let mut parts = Vec::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            parts.push(decoded(part)?);
        }
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, version, rest) = match &parts[..] {
            ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
            ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
            _ => return Ok(Self::Other(format!("/{}", parts.join("/")))),
        };
        let mut path = Path { group: group.into(), version: version.into(), ..Path::default() };
        let rest = match rest {
            // Those of a namespace itself are its subresources.
            ["namespaces", name, sub @ ("status" | "finalize")] => {
                path.namespace = (*name).into();
                path.resource = "namespaces".into();
                path.name = (*name).into();
                path.subresource = (*sub).into();
                return Ok(Self::Resource(path));
            }
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => {
                path.namespace = (*namespace).into();
                rest
            }
            rest => rest,
        };
        path.resource = rest.first().copied().unwrap_or_default().into();
        path.name = rest.get(1).copied().unwrap_or_default().into();
        path.subresource = rest.get(2..).unwrap_or_default().join("/");
        if path.resource == "namespaces" {
            path.namespace.clone_from(&path.name);
        }
        Ok(Self::Resource(path))
    }
}

/// A query, decoded, in its order.
///
/// # Errors
/// 400 when it is no text.
pub fn query(text: &str) -> Result<Vec<(String, String)>, Failure> {
    let mut all = Vec::new();
    for part in text.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let plain = |text: &str| decoded(&text.replace('+', " "));
        all.push((plain(name)?, plain(value)?));
    }
    Ok(all)
}

/// Without percent signs (RFC 3986).
///
/// # Errors
/// 400 when it is no text.
pub fn decoded(text: &str) -> Result<String, Failure> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let wrong = || Failure::bad_request(format!("{text:?} is not encoded as a URL is"));
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|d| std::str::from_utf8(d).ok()).ok_or_else(wrong)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| wrong())?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// What the client takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accept {
    /// Of the answer.
    pub media: Media,
    /// Of what is in it.
    pub shape: Shape,
    /// How much of the objects is in a table.
    pub include: Include,
}

/// Media types of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Media {
    /// `application/json`.
    #[default]
    Json,
    /// `application/yaml`.
    Yaml,
}

/// Forms of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shape {
    /// Objects as they are.
    #[default]
    Object,
    /// `meta.k8s.io/v1` Table.
    Table,
    /// `meta.k8s.io/v1` PartialObjectMetadata and its list.
    Metadata,
}

/// `includeObject` of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Include {
    /// Not at all.
    None,
    /// Their metadata.
    #[default]
    Metadata,
    /// All of them.
    Object,
}

/// Whether a client takes all that is served in one document
/// (`apidiscovery.k8s.io/v2` APIGroupDiscoveryList).
pub fn takes_aggregated_discovery(header: Option<&str>) -> bool {
    let fits = |part: &str| {
        ["as=APIGroupDiscoveryList", "g=apidiscovery.k8s.io", "v=v2"]
            .iter()
            .all(|wanted| part.split(';').any(|p| p.trim() == *wanted))
    };
    header.is_some_and(|header| header.split(',').any(fits))
}

impl Accept {
    /// The first of what a client takes that there is.
    ///
    /// # Errors
    /// 406 when there is none.
    pub fn parse(header: Option<&str>) -> Result<Self, Failure> {
        let Some(header) = header.filter(|h| !h.trim().is_empty()) else {
            return Ok(Self::default());
        };
        header.split(',').find_map(Self::one).ok_or_else(|| {
            Failure::not_acceptable(
                "only the following media types are accepted: application/json, application/yaml",
            )
        })
    }

    fn one(part: &str) -> Option<Self> {
        let mut parameters = part.split(';').map(str::trim);
        let media = match parameters.next()? {
            "application/json" | "*/*" | "application/*" => Media::Json,
            "application/yaml" => Media::Yaml,
            _ => return None,
        };
        let (mut shape, mut group, mut version) = (None, "", "");
        for parameter in parameters {
            match parameter.split_once('=') {
                Some(("as", value)) => shape = Some(value),
                Some(("g", value)) => group = value,
                Some(("v", value)) => version = value,
                _ => {}
            }
        }
        let shape = match (shape, group, version) {
            (None, ..) => Shape::Object,
            (Some("Table"), "meta.k8s.io", "v1") => Shape::Table,
            (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), "meta.k8s.io", "v1") => {
                Shape::Metadata
            }
            _ => return None,
        };
        Some(Self { media, shape, include: Include::default() })
    }
}
