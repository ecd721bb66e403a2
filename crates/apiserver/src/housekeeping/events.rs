//! Events are forgotten after an hour.

use super::{all, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

const LIFE: SignedDuration = SignedDuration::from_hours(1);
/// Deleted in one go: others want to write too.
const BATCH: usize = 200;

fn is_over(event: &Value, now: Timestamp) -> bool {
    let last = [event["lastTimestamp"].as_str(), event["eventTime"].as_str()];
    let last = last.into_iter().flatten().max().unwrap_or(meta::text(event, "creationTimestamp"));
    last.parse::<Timestamp>().is_ok_and(|at| now.duration_since(at) > LIFE)
}

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        let now = Timestamp::now();
        let old = all(&api, "events").into_iter().filter(|event| is_over(event, now)).take(BATCH);
        for event in old {
            let (namespace, name) = (meta::text(&event, "namespace"), meta::text(&event, "name"));
            account
                .delete(&format!("/api/v1/namespaces/{namespace}/events/{name}"), &json!({}))
                .await?;
        }
        Ok(())
    };
    whenever(&api, "events", &[], act).await;
}
