//! What the client makes of servers that no QEMU is today.

mod common;

use common::{Fake, LONG};
use qmp::{
    Client, Closed, Error, Options, Typed,
    commands::{QueryStatus, QueryVersion, RunState, Stop},
    connect, event,
};
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::UnixStream};

const RUNNING: &str = r#"{"return": {"running": true, "status": "running"}, "id": 2}"#;

/// The connection's end as a waiting command, a handle and a subscriber see it.
async fn ends(client: &Client, mischief: impl Future<Output = ()>) -> Closed {
    let mut events = client.events();
    let (reply, ()) = tokio::join!(client.execute(QueryStatus, LONG), mischief);
    let Err(Error::Closed { reason, .. }) = reply else { panic!("{reply:?}") };
    assert_eq!(client.closed().await.to_string(), reason.to_string());
    assert!(matches!(events.next().await, Err(event::Error::Closed(_))));
    reason
}

#[tokio::test]
async fn what_nobody_knows_harms_nobody() {
    let (client, mut fake) = Fake::connect(Options::default()).await;
    let mut events = client.events();

    let (status, ()) = tokio::join!(client.execute(QueryStatus, LONG), async {
        fake.hear().await;
        fake.say(r#"{"event": "DREAM", "data": {"of": ["sheep"]}}"#).await;
        fake.say(r#"{"event": "MIGRATION", "data": {"status": "levitating"}}"#).await;
        fake.say(r#"{"event": "SHUTDOWN", "data": {"guest": "perhaps"}, "timestamp": "now"}"#)
            .await;
        fake.say(r#"{"return": {}, "id": 77}"#).await;
        fake.say(r#"{"return": {}, "id": "two"}"#).await;
        fake.say(r#"{"return": {}}"#).await;
        fake.say(r#"{"error": {"class": "GenericError", "desc": "to whom?"}}"#).await;
        fake.say(r#"{"prophecy": 42}"#).await;
        fake.say("").await;
        fake.say(r#"{"return": {"running": true, "status": "dreaming", "depth": 3}, "id": 2}"#)
            .await;
    });

    assert_eq!(status.unwrap().status, RunState::Unknown("dreaming".into()));
    let dream = events.next().await.unwrap();
    assert_eq!(dream.typed().unwrap(), Typed::Other);
    assert_eq!((&*dream.name, &dream.data), ("DREAM", &json!({"of": ["sheep"]})));
    let Typed::Migration(migration) = events.next().await.unwrap().typed().unwrap() else {
        panic!("a migration event is a migration event")
    };
    assert_eq!(migration.status.as_str(), "levitating");
    assert!(events.next().await.unwrap().typed().is_err());
}

#[tokio::test]
async fn a_reply_that_is_not_understood_concerns_only_its_command() {
    let (client, mut fake) = Fake::connect(Options::default()).await;

    let (strange, ()) = tokio::join!(client.execute(QueryVersion, LONG), async {
        fake.hear().await;
        fake.say(r#"{"return": ["seven"], "id": 2}"#).await;
    });
    assert!(matches!(strange, Err(Error::Reply { command: "query-version", .. })), "{strange:?}");

    let (status, ()) = tokio::join!(client.execute(QueryStatus, LONG), async {
        fake.hear().await;
        fake.say(&RUNNING.replace('2', "3")).await;
    });
    assert!(status.unwrap().running);
}

#[tokio::test]
async fn replies_find_their_commands_in_any_order() {
    let (client, mut fake) = Fake::connect(Options::default()).await;
    let (first, second, ()) =
        tokio::join!(client.execute(QueryStatus, LONG), client.execute(QueryStatus, LONG), async {
            fake.hear().await;
            fake.hear().await;
            fake.say(r#"{"return": {"running": false, "status": "paused"}, "id": 3}"#).await;
            fake.say(RUNNING).await;
        });
    assert!(first.unwrap().running);
    assert!(!second.unwrap().running);
}

#[tokio::test]
async fn a_command_given_up_before_it_was_sent_is_never_sent() {
    let (client, mut fake) = Fake::connect(Options::default()).await;
    // On this one thread the socket's task has no chance to run before the future is dropped.
    tokio::select! {
        biased;
        reply = client.execute(Stop, LONG) => panic!("{reply:?}"),
        () = std::future::ready(()) => {}
    }

    let (status, ()) = tokio::join!(client.execute(QueryStatus, LONG), async {
        let heard = fake.hear().await;
        assert!(heard.contains("query-status"), "{heard}");
        fake.say(&RUNNING.replace('2', "3")).await;
    });
    assert!(status.unwrap().running);
}

#[tokio::test]
async fn an_oversized_line_ends_the_connection() {
    let options = Options { line_limit: 4096, ..Options::default() };
    let (client, mut fake) = Fake::connect(options).await;
    let reason = ends(&client, async {
        fake.hear().await;
        fake.say_bytes(&vec![b'['; 1 << 20]).await;
    })
    .await;
    assert!(matches!(reason, Closed::LineTooLong { limit: 4096 }), "{reason:?}");
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    for garbage in ["{\"return\": ", "[]", "\u{0}\u{1}\u{2}", "[[[[", "{\"a\":\"\u{1}\"}"] {
        let (client, mut fake) = Fake::connect(Options::default()).await;
        let reason = ends(&client, async {
            fake.hear().await;
            fake.say(garbage).await;
        })
        .await;
        assert!(matches!(reason, Closed::NotJson(_)), "{garbage:?}: {reason:?}");
    }
}

#[tokio::test]
async fn half_a_line_is_no_reply() {
    let (client, mut fake) = Fake::connect(Options::default()).await;
    let reason = ends(&client, async {
        fake.hear().await;
        fake.say_bytes(RUNNING.as_bytes()).await;
        fake.hang_up();
    })
    .await;
    assert!(matches!(reason, Closed::MidLine), "{reason:?}");
}

#[tokio::test]
async fn a_slow_subscriber_is_told_what_it_missed() {
    let options = Options { event_queue: 4, ..Options::default() };
    let (client, mut fake) = Fake::connect(options).await;
    let mut slow = client.events();

    let (status, ()) = tokio::join!(client.execute(QueryStatus, LONG), async {
        fake.hear().await;
        for number in 1..=10 {
            let event = json!({"event": "MIGRATION_PASS", "data": {"pass": number}});
            fake.say(&event.to_string()).await;
        }
        fake.say(RUNNING).await;
    });
    status.unwrap();

    assert!(matches!(slow.next().await, Err(event::Error::Lagged { missed: 6 })));
    assert_eq!(slow.next().await.unwrap().data["pass"], 7);
}

#[tokio::test]
async fn the_last_handle_ends_the_connection() {
    let (client, mut fake) = Fake::connect(Options::default()).await;
    let mut events = client.events();
    let clone = client.clone();
    drop(client);
    drop(clone);
    let end = events.next().await.unwrap_err();
    assert!(matches!(end, event::Error::Closed(Closed::Dropped)), "{end:?}");
    assert_eq!(fake.hear().await, "");
}

#[tokio::test]
async fn a_server_that_is_no_qmp_server_is_refused() {
    let over = |stream| Client::over(stream, "fake", Options::default(), LONG);

    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"SSH-2.0-godwit\r\n").await.unwrap();
    let error = over(ours).await.unwrap_err();
    assert!(matches!(error, connect::Error::NotQmp { .. }), "{error:?}");

    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = over(ours).await.unwrap_err();
    assert!(matches!(error, connect::Error::Closed { reason: Closed::Eof, .. }), "{error:?}");
}
