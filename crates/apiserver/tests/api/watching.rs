//! Watches, by kube-rs over TLS.

use crate::world::{World, config_map};
use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use serde_json::json;
use std::time::Duration;

fn map(name: &str, label: &str) -> ConfigMap {
    let mut object = config_map(name, json!({}));
    object["metadata"]["labels"] = json!({"l": label});
    serde_json::from_value(object).unwrap()
}

#[tokio::test]
async fn a_watch_tells_every_change_once_and_in_order_and_selection_is_by_what_is() {
    let world = World::new().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client().await, &world.name);
    let from = maps.list(&Default::default()).await.unwrap().metadata.resource_version.unwrap();
    let params = WatchParams::default().labels("l=a").timeout(5);
    let stream = maps.watch(&params, &from).await.unwrap();
    maps.create(&PostParams::default(), &map("x", "a")).await.unwrap();
    maps.create(&PostParams::default(), &map("y", "b")).await.unwrap();
    let relabel = |label: &str| json!({"metadata": {"labels": {"l": label}}});
    let patch = |name: &'static str, label: &'static str| {
        let maps = maps.clone();
        async move {
            maps.patch(name, &PatchParams::default(), &Patch::Merge(relabel(label))).await.unwrap()
        }
    };
    patch("y", "a").await;
    patch("x", "b").await;
    maps.delete("y", &DeleteParams::default()).await.unwrap();
    let events: Vec<WatchEvent<ConfigMap>> = stream.try_collect().await.unwrap();
    let told: Vec<String> = events
        .iter()
        .filter_map(|event| {
            let (kind, object) = match event {
                WatchEvent::Added(object) => ("added", object),
                WatchEvent::Modified(object) => ("modified", object),
                WatchEvent::Deleted(object) => ("deleted", object),
                _ => return None,
            };
            Some(format!("{kind} {}", object.metadata.name.clone()?))
        })
        .collect();
    assert_eq!(told, ["added x", "added y", "deleted x", "deleted y"]);
}

#[tokio::test]
async fn a_watch_from_a_revision_that_is_forgotten_is_told_so() {
    let world = World::new().await;
    let Some(world) = world.restart().await else { return };
    let maps: Api<ConfigMap> = Api::namespaced(world.client().await, &world.name);
    let stream = maps.watch(&WatchParams::default().timeout(2), "1").await.unwrap();
    let events: Vec<WatchEvent<ConfigMap>> = stream.try_collect().await.unwrap();
    let expired =
        events.iter().any(|e| matches!(e, WatchEvent::Error(status) if status.code == 410));
    assert!(expired, "{events:?}");
}

/// With the list streamed, and with the list first.
#[tokio::test]
async fn reflectors_come_to_hold_what_the_server_holds() {
    let world = World::new().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client().await, &world.name);
    for streaming in [false, true] {
        if streaming && !world.has(32, "streamed lists") {
            continue;
        }
        let (reader, writer) = reflector::store();
        let config = match streaming {
            true => watcher::Config::default().streaming_lists(),
            false => watcher::Config::default(),
        };
        let stream = reflector(writer, watcher(maps.clone(), config)).applied_objects();
        let follow = tokio::spawn(async move {
            let _ = stream.try_for_each(|_| async { Ok(()) }).await;
        });
        let churn = async {
            for n in 0..100 {
                let name = format!("c{}", n % 10);
                match n % 3 {
                    0 => drop(maps.create(&PostParams::default(), &map(&name, "a")).await),
                    1 => {
                        let patch = Patch::Merge(json!({"data": {"n": n.to_string()}}));
                        drop(maps.patch(&name, &PatchParams::default(), &patch).await);
                    }
                    _ => drop(maps.delete(&name, &DeleteParams::default()).await),
                }
            }
        };
        churn.await;
        let wanted = maps.list(&Default::default()).await.unwrap().items;
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let mut held: Vec<ConfigMap> = reader.state().iter().map(|m| (**m).clone()).collect();
            held.sort_by_key(|m| m.metadata.name.clone());
            if held == wanted {
                break;
            }
            assert!(tokio::time::Instant::now() < until, "{} of {}", held.len(), wanted.len());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        follow.abort();
    }
}
