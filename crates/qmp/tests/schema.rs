//! What this crate sends and expects exists in the QEMU at hand.

mod common;

use common::{LONG, Qemu};
use qmp::{
    Command,
    commands::{Empty, QueryQmpSchema},
    schema::{Checker, Schema, check_all},
};
use serde::{Deserialize, Serialize};

#[tokio::test]
async fn every_command_and_event_is_what_this_qemu_says_of_itself() {
    let qemu = Qemu::start(&["-machine", "none"]);
    let client = qemu.client().await;
    let schema: Schema = client.execute(QueryQmpSchema, LONG).await.unwrap().into();

    assert_eq!(check_all(&schema), []);

    assert!(schema.has_command("query-status"));
    assert!(!schema.has_command("STOP"));
    assert!(schema.has_event("STOP"));
    assert!(schema.has_argument("block-export-add", "bitmaps"));
    assert!(!schema.has_argument("block-export-add", "bitmap"));
}

#[derive(Serialize)]
struct Misspelt {
    naem: &'static str,
    granularity: &'static str,
}

impl Command for Misspelt {
    const NAME: &'static str = "block-dirty-bitmap-add";
    type Return = Empty;
}

#[derive(Serialize)]
struct Wishful;

#[derive(Serialize, Deserialize)]
struct Wishes {
    running: bool,
    mood: Option<String>,
}

impl Command for Wishful {
    const NAME: &'static str = "query-status";
    type Return = Wishes;
}

#[derive(Serialize)]
struct Careless;

#[derive(Serialize, Deserialize)]
struct NotAlways {
    status: String,
}

impl Command for Careless {
    const NAME: &'static str = "query-migrate";
    type Return = NotAlways;
}

#[derive(Serialize)]
struct Unheard;

impl Command for Unheard {
    const NAME: &'static str = "query-weather";
    type Return = Empty;
}

#[tokio::test]
async fn what_does_not_exist_is_found() {
    let qemu = Qemu::start(&["-machine", "none"]);
    let client = qemu.client().await;
    let schema: Schema = client.execute(QueryQmpSchema, LONG).await.unwrap().into();

    let mut checker = Checker::new(&schema);
    checker.command(Misspelt { naem: "a", granularity: "b" }, &[]);
    checker.command(Wishful, &[]);
    checker.command(Careless, &[]);
    checker.command(Unheard, &[]);
    checker.event("WEATHER");
    let found: Vec<_> = checker.into_problems().iter().map(ToString::to_string).collect();

    let expected = [
        "there is no member `naem`",
        "`granularity` cannot be",
        "must have `node`",
        "must have `name`",
        "there is no member `mood`",
        "least reply does not parse: missing field `status`",
        "query-weather: this QEMU does not know it",
        "WEATHER: this QEMU does not send it",
    ];
    for expected in expected {
        assert!(found.iter().any(|one| one.contains(expected)), "{expected}: {found:#?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}
