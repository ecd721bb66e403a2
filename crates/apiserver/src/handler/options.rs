//! The query of a request, as typed options.

use super::prepare::Unknown;
use super::read::Match;
use super::{Options, delete, is_dry_run};
use crate::resource::Resource;
use crate::selector::{Fields, Labels, Selection};
use crate::status::Failure;
use serde_json::Value;
use std::time::Duration;

/// Bytes of a manager's name.
const MANAGER: usize = 128;

/// Reads the options that every verb may have.
///
/// # Errors
/// 400 or 422 for what is none.
pub fn parse(
    query: Vec<(String, String)>,
    resource: &Resource,
) -> Result<(Options, Selection), Failure> {
    let mut options = Options::default();
    let mut selection = Selection::default();
    for (name, value) in query.iter().filter(|(_, value)| !value.is_empty()) {
        let number = || value.parse::<u64>().map_err(|_| wrong(name, value, "a whole number"));
        let flag = || match &**value {
            "true" | "1" | "True" => Ok(true),
            "false" | "0" | "False" => Ok(false),
            _ => Err(wrong(name, value, "true or false")),
        };
        match &**name {
            "labelSelector" => selection.labels = Labels::parse(value)?,
            "fieldSelector" => selection.fields = Fields::parse(value, &resource.selectable)?,
            "resourceVersion" => {
                let why = || {
                    Failure::bad_request(format!(
                        "resourceVersion: Invalid value: {value:?}: strconv.ParseUint: parsing {value:?}: invalid syntax"
                    ))
                };
                options.revision = Some(value.parse().map_err(|_| why())?);
            }
            "resourceVersionMatch" => {
                options.matching = Some(match &**value {
                    "Exact" => Match::Exact,
                    "NotOlderThan" => Match::NotOlderThan,
                    _ => return Err(wrong(name, value, "Exact or NotOlderThan")),
                });
            }
            "limit" => options.limit = usize::try_from(number()?).ok().filter(|n| *n > 0),
            "continue" => options.next = Some(value.clone()),
            "watch" => {}
            "allowWatchBookmarks" => options.bookmarks = flag()?,
            "sendInitialEvents" => options.initial_events = Some(flag()?),
            "timeoutSeconds" => {
                options.timeout = Some(Duration::from_secs(number()?)).filter(|t| !t.is_zero())
            }
            "dryRun" => options.dry_run |= is_dry_run(std::iter::once(&Value::from(&**value)))?,
            "fieldManager" => options.manager = Some(manager(value)?),
            "force" => options.force = flag()?,
            "fieldValidation" => {
                options.unknown = match &**value {
                    "Ignore" => Unknown::Ignore,
                    "Warn" => Unknown::Warn,
                    "Strict" => Unknown::Strict,
                    _ => return Err(wrong(name, value, "Ignore, Warn or Strict")),
                };
            }
            "gracePeriodSeconds" => {
                let why = |_| wrong(name, value, "a whole number");
                options.deletion.grace = Some(value.parse().map_err(why)?);
            }
            "propagationPolicy" => options.deletion.propagation = Some(delete::propagation(value)?),
            "orphanDependents" => {
                options.deletion.propagation = Some(match flag()? {
                    true => crate::deletion::Propagation::Orphan,
                    false => crate::deletion::Propagation::Background,
                });
            }
            _ => {}
        }
    }
    if options.matching.is_some() && options.revision.is_none() && options.initial_events.is_none()
    {
        return Err(Failure::bad_request(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
        ));
    }
    if options.matching == Some(Match::Exact) && options.revision == Some(0) {
        return Err(Failure::bad_request(
            "resourceVersionMatch: Forbidden: resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
        ));
    }
    options.query = query;
    Ok((options, selection))
}

fn manager(name: &str) -> Result<String, Failure> {
    match name.len() > MANAGER || name.chars().any(char::is_control) {
        true => Err(Failure::bad_request(format!(
            "fieldManager: Invalid value: {name:?}: may not be longer than {MANAGER} printable characters"
        ))),
        false => Ok(name.to_owned()),
    }
}

fn wrong(name: &str, value: &str, must: &str) -> Failure {
    Failure::bad_request(format!("{name}: Invalid value: {value:?}: must be {must}"))
}
