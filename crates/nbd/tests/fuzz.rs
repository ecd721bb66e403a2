//! Whatever a server sends: no panic, no hang, and no result that was not all there.

mod common;

use std::time::Duration;

use common::{PLENTY, fake::*};
use nbd::{Client, Error, connect};
use proptest::{collection::vec, prelude::*, sample::Index};

const READ: u64 = 8192;
/// Nothing here waits for anything but itself.
const LONG: Duration = Duration::from_secs(10);

/// A conversation without a flaw: the handshake, a read in pieces, a block status in two answers,
/// a read that fails.
fn flawless() -> Script {
    let read = [
        data(0, 1, 4096, &[1; 2048]),
        hole(0, 1, 6144, 4096),
        data(0, 1, 10240, &[3; 2048]),
        chunk(DONE, 0, 1, &[]),
    ];
    let mut script = handshake();
    script.push(read.concat());
    script.push(status(DONE, 2, CONTEXT, &[(65536, 0), (4096, 1), (65536, 0)]));
    script.push(status(DONE, 3, CONTEXT, &[(4096, 1), (u32::MAX, 3)]));
    script.push(error(DONE, 4, 5, "burnt"));
    script
}

/// Runs a client through a script to whatever end. The server hangs up after its last word, so a
/// deadline that passes means that something hangs or panicked here.
fn converse(script: Script) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        match connect(script).await {
            Ok(client) => use_up(&client).await,
            Err(connect::Error::Deadline { .. }) => panic!("the handshake hangs"),
            Err(_) => {}
        }
    });
}

async fn use_up(client: &Client) {
    let size = client.export().size;
    match client.read(4096, vec![0xff; READ as usize], LONG).await {
        Ok(filled) => {
            assert_eq!(filled.buffer.len() as u64, READ);
            for hole in filled.holes {
                assert!(4096 <= hole.start && hole.start < hole.end && hole.end <= 4096 + READ);
                let hole = (hole.start - 4096) as usize..(hole.end - 4096) as usize;
                assert!(filled.buffer[hole].iter().all(|byte| *byte == 0));
            }
        }
        Err(Error::Deadline { .. }) => panic!("a read hangs"),
        Err(_) => {}
    }
    match client.extents("test:context", 0..size, PLENTY, LONG).await {
        Ok(extents) => {
            assert!(extents.windows(2).all(|two| two[0].end() == two[1].offset));
            assert!(extents.windows(2).all(|two| two[0].flags != two[1].flags));
            assert_eq!(extents.first().map_or(0, |first| first.offset), 0);
            assert_eq!(extents.last().map_or(0, |last| last.end()), size);
        }
        Err(Error::Deadline { .. }) => panic!("a block status hangs"),
        Err(_) => {}
    }
    if let Err(Error::Deadline { .. }) = client.read(0, vec![0; 512], LONG).await {
        panic!("a failing read hangs");
    }
    // What panics in the connection's own task cannot tell its end any more.
    tokio::time::timeout(LONG, client.closed()).await.expect("the server has hung up");
}

/// One change to a message.
#[derive(Debug, Clone)]
enum Mutation {
    Set(Index, u8),
    Flip(Index, u8),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    Repeat(Index, usize),
    Truncate(Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        (any::<Index>(), 1..40usize).prop_map(|(at, len)| Mutation::Remove(at, len)),
        (any::<Index>(), vec(any::<u8>(), 1..40)).prop_map(|(at, b)| Mutation::Insert(at, b)),
        (any::<Index>(), 1..64usize).prop_map(|(at, len)| Mutation::Repeat(at, len)),
        any::<Index>().prop_map(Mutation::Truncate),
    ]
}

fn mutate(message: &mut Vec<u8>, mutation: &Mutation) {
    if message.is_empty() {
        return;
    }
    let size = message.len();
    let stretch = |at: &Index, len: usize| {
        let at = at.index(size);
        at..(at + len).min(size)
    };
    match mutation {
        Mutation::Set(at, byte) => message[at.index(size)] = *byte,
        Mutation::Flip(at, bit) => message[at.index(size)] ^= 1 << bit,
        Mutation::Remove(at, len) => drop(message.drain(stretch(at, *len))),
        Mutation::Insert(at, bytes) => {
            let at = at.index(size);
            message.splice(at..at, bytes.iter().copied());
        }
        Mutation::Repeat(at, len) => {
            let again = message[stretch(at, *len)].to_vec();
            let at = at.index(size);
            message.splice(at..at, again);
        }
        Mutation::Truncate(at) => message.truncate(at.index(size)),
    }
}

#[test]
fn a_conversation_without_a_flaw_succeeds() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let client = connect(flawless()).await.unwrap();
        client.read(4096, vec![0; READ as usize], LONG).await.unwrap();
        let extents = client.extents("test:context", 0..SIZE, PLENTY, LONG).await.unwrap();
        assert_eq!(extents.len(), 5);
        let failed = client.read(0, vec![0; 512], LONG).await;
        assert!(matches!(failed, Err(Error::Server { .. })), "{failed:?}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, max_shrink_time: 60_000, ..Default::default() })]

    /// The server says some valid things, then a changed one, and hangs up.
    #[test]
    fn a_changed_message_harms_nobody(
        valid in 0..flawless().len(),
        mutations in vec(mutation(), 1..4),
    ) {
        let mut script = flawless();
        script.truncate(valid + 1);
        for mutation in &mutations {
            mutate(&mut script[valid], mutation);
        }
        converse(script);
    }

    /// The server says some valid things, then anything at all, and hangs up.
    #[test]
    fn noise_harms_nobody(
        valid in 0..flawless().len(),
        noise in vec(any::<u8>(), 0..512),
    ) {
        let mut script = flawless();
        script.truncate(valid);
        script.push(noise);
        converse(script);
    }

    /// The server replies with well-formed chunks that make no sense together.
    #[test]
    fn nonsense_harms_nobody(chunks in vec(nonsense(), 0..12)) {
        let mut script = handshake();
        script.push(chunks.concat());
        converse(script);
    }
}

fn nonsense() -> impl Strategy<Value = Vec<u8>> {
    let near = || prop_oneof![4000..13000u64, any::<u64>()];
    let flags = || prop_oneof![3 => Just(0), 1 => Just(DONE)];
    prop_oneof![
        (flags(), 1..3u64, near(), 0..5000usize).prop_map(|(f, cookie, at, len)| data(
            f,
            cookie,
            at,
            &vec![9; len]
        )),
        (flags(), 1..3u64, near(), 0..5000u32).prop_map(|(f, c, at, len)| hole(f, c, at, len)),
        (flags(), 1..3u64, 6..9u32, vec((any::<u32>(), 0..4u32), 0..9))
            .prop_map(|(f, cookie, context, runs)| status(f, cookie, context, &runs)),
        (flags(), 1..3u64, any::<u32>()).prop_map(|(f, c, errno)| error(f, c, errno, "why not")),
        (flags(), any::<u16>(), 1..3u64, vec(any::<u8>(), 0..64))
            .prop_map(|(f, kind, cookie, payload)| chunk(f, kind, cookie, &payload)),
        (any::<u32>(), 1..3u64).prop_map(|(errno, cookie)| simple_reply(errno, cookie)),
    ]
}
