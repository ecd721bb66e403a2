//! What the client makes of servers that do not keep to the protocol.

mod common;

use common::{LONG, PLENTY, fake::*};
use nbd::{Client, Closed, Error, Extent, Violation, connect};

const READ: usize = 8192;

async fn read(reply: Vec<u8>) -> Result<nbd::Filled, Error> {
    negotiated(vec![reply]).await.read(4096, vec![0xff; READ], LONG).await
}

async fn violation(reply: Vec<u8>) -> Violation {
    match read(reply).await {
        Err(Error::Closed { reason: Closed::Violation(violation), .. }) => violation,
        other => panic!("{other:?}"),
    }
}

async fn extents(client: &Client) -> Result<Vec<Extent>, Error> {
    client.extents("test:context", 0..SIZE, PLENTY, LONG).await
}

#[tokio::test]
async fn chunks_come_in_any_order() {
    let reply = [
        data(0, 1, 10240, &[3; 2048]),
        hole(0, 1, 6144, 4096),
        data(0, 1, 4096, &[1; 2048]),
        chunk(DONE, 0, 1, &[]),
    ];
    let filled = read(reply.concat()).await.unwrap();
    let expected = [vec![1; 2048], vec![0; 4096], vec![3; 2048]].concat();
    assert!(filled.buffer == expected);
    let [hole] = &filled.holes[..] else { panic!("{filled:?}") };
    assert_eq!(*hole, 6144..10240);
}

#[tokio::test]
async fn a_reply_covers_each_byte_that_was_asked_once() {
    let whole = data(0, 1, 4096, &[1; READ]);
    let (after, before) = (4096 + READ as u64, 4095);

    let overlap = [whole.clone(), data(DONE, 1, 4096, &[1])].concat();
    assert_eq!(violation(overlap).await, Violation::Overlap { offset: 4096, len: 1 });
    let overlap = [whole.clone(), hole(DONE, 1, after - 1, 1)].concat();
    assert_eq!(violation(overlap).await, Violation::Overlap { offset: after - 1, len: 1 });
    for (offset, len) in [(before, 1), (after, 1), (4096, READ as u32 + 1), (u64::MAX, 1)] {
        let outside = hole(DONE, 1, offset, len);
        let len = len.into();
        assert_eq!(violation(outside).await, Violation::Outside { offset, len });
    }
    let half = data(DONE, 1, 4096, &[1; READ / 2]);
    assert_eq!(violation(half).await, Violation::Incomplete("bytes"));
    let nothing = chunk(DONE, 0, 1, &[]);
    assert_eq!(violation(nothing).await, Violation::Incomplete("bytes"));
    let empty = data(DONE, 1, 4096, &[]);
    assert_eq!(violation(empty).await, Violation::Outside { offset: 4096, len: 0 });
}

#[tokio::test]
async fn a_reply_in_dust_is_refused() {
    let dust = (0..READ as u64 / 2).map(|index| data(0, 1, 4096 + index * 2, &[1]));
    assert_eq!(violation(dust.collect::<Vec<_>>().concat()).await, Violation::Pieces);
}

#[tokio::test]
async fn a_reply_is_of_the_kind_that_was_asked() {
    let length = |what, len| Violation::Length { what, len };
    assert_eq!(violation(status(DONE, 1, CONTEXT, &[(1, 0)])).await, Violation::Chunk(5));
    assert_eq!(violation(chunk(DONE, 99, 1, &[])).await, Violation::Chunk(99));
    assert_eq!(violation(chunk(0, 0, 1, &[])).await, Violation::Chunk(0));
    assert_eq!(violation(data(DONE, 2, 0, &[1])).await, Violation::Cookie(2));
    assert_eq!(violation(simple_reply(5, 2)).await, Violation::Cookie(2));
    assert_eq!(violation(simple_reply(0, 1)).await, Violation::Incomplete("its payload"));
    assert_eq!(violation(chunk(DONE, 1, 1, &[0; 7])).await, length("a data chunk", 7));
    assert_eq!(violation(chunk(DONE, 2, 1, &[0; 13])).await, length("a hole chunk", 13));
    let long = chunk(DONE, 0x8001, 1, &[0; 5000]);
    assert_eq!(violation(long).await, length("an error chunk", 5000));
    assert!(matches!(violation(vec![0x42; 64]).await, Violation::Magic { .. }));
}

#[tokio::test]
async fn half_a_reply_is_none() {
    let whole = data(DONE, 1, 4096, &[1; READ]);
    for kept in [1, 4, 19, 27, 28, 100] {
        match read(whole[..kept].to_vec()).await {
            Err(Error::Closed { reason: Closed::MidMessage, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    let nothing = read(Vec::new()).await;
    assert!(matches!(nothing, Err(Error::Closed { reason: Closed::Eof, .. })), "{nothing:?}");
}

#[tokio::test]
async fn an_error_fails_its_request_and_the_connection_lives_on() {
    let refused = error(DONE, 1, 5, "the disk \u{1b}[31mburns");
    let late = [data(0, 2, 4096, &[1; 512]), error(0, 2, 28, "full"), chunk(DONE, 0, 2, &[])];
    let replies =
        vec![refused, late.concat(), simple_reply(95, 3), data(DONE, 4, 4096, &[7; READ])];
    let client = negotiated(replies).await;

    let expected = [("EIO", "the disk \u{fffd}[31mburns"), ("ENOSPC", "full"), ("ENOTSUP", "")];
    for (name, text) in expected {
        let error = client.read(4096, vec![0; READ], LONG).await.unwrap_err();
        let Error::Server { errno, message, .. } = &error else { panic!("{error:?}") };
        assert_eq!((errno.name(), &**message), (Some(name), text));
    }
    assert!(client.read(4096, vec![0; READ], LONG).await.unwrap().buffer == [7; READ]);
}

#[tokio::test]
async fn short_answers_are_followed_and_long_ones_cut() {
    let client = negotiated(vec![
        status(DONE, 1, CONTEXT, &[(4096, 0)]),
        status(DONE, 2, CONTEXT, &[(4096, 0), (512, 1)]),
        status(DONE, 3, CONTEXT, &[(1024, 1), (u32::MAX, 0), (u32::MAX, 1)]),
    ])
    .await;
    let extent = |offset, end: u64, flags| Extent { offset, len: end - offset, flags };
    let expected = [extent(0, 8192, 0), extent(8192, 9728, 1), extent(9728, SIZE, 0)];
    assert_eq!(extents(&client).await.unwrap(), expected);
}

#[tokio::test]
async fn a_block_status_always_leads_on() {
    let cases = [
        (status(DONE, 1, CONTEXT, &[(4096, 0), (0, 1)]), Violation::EmptyRun),
        (status(DONE, 1, CONTEXT, &[]), Violation::Incomplete("runs")),
        (status(DONE, 1, 8, &[(4096, 0)]), Violation::Context(8)),
        (chunk(DONE, 0, 1, &[]), Violation::Incomplete("the context that was asked")),
        (
            [status(0, 1, CONTEXT, &[(1, 0)]), status(DONE, 1, CONTEXT, &[(1, 0)])].concat(),
            Violation::Context(CONTEXT),
        ),
        (chunk(DONE, 5, 1, &[0; 9]), Violation::Length { what: "a block status chunk", len: 9 }),
        (
            chunk(DONE, 5, 1, &vec![0; (1 << 20) + 12]),
            Violation::Length { what: "a block status chunk", len: (1 << 20) + 12 },
        ),
    ];
    for (reply, expected) in cases {
        let client = negotiated(vec![reply]).await;
        match extents(&client).await {
            Err(Error::Closed { reason: Closed::Violation(found), .. }) => {
                assert_eq!(found, expected);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_handshake_is_held_to_the_protocol() {
    let spoilt = |step: usize, piece: Vec<u8>| {
        let mut script = handshake();
        script[step] = piece;
        connect(script)
    };
    let export = |size: u64, flags: u16| {
        [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
    };
    let blocks = |minimum: u32, preferred: u32, maximum: u32| {
        let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
        [&3u16.to_be_bytes()[..], &sizes].concat()
    };
    let go = |infos: &[Vec<u8>]| {
        let infos = infos.iter().map(|info| option_reply(7, 3, info));
        infos.chain([option_reply(7, 1, &[])]).collect::<Vec<_>>().concat()
    };
    let long = [&option_reply(8, 1, &[])[..16], &u32::MAX.to_be_bytes()].concat();
    let twice = [&CONTEXT.to_be_bytes()[..], b"test:context"].concat();
    let endless = option_reply(10, 4, &twice).repeat(300);

    let violations = [
        spoilt(0, b"SSH-2.0-godwit-and-more\r\n".to_vec()).await,
        spoilt(0, b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53and-then-some".to_vec()).await,
        spoilt(0, b"NBDMAGICIHAVEOPT\x00\x00".to_vec()).await,
        spoilt(1, long).await,
        spoilt(1, option_reply(7, 1, &[])).await,
        spoilt(1, option_reply(8, 3, &[])).await,
        spoilt(1, vec![0; 20]).await,
        spoilt(2, option_reply(10, 4, &[1, 2])).await,
        spoilt(2, endless).await,
        spoilt(3, go(&[])).await,
        spoilt(3, go(&[export(SIZE, 0)])).await,
        spoilt(3, go(&[export(u64::MAX, 1)])).await,
        spoilt(3, go(&[export(SIZE, 1), blocks(0, 4096, 65536)])).await,
        spoilt(3, go(&[export(SIZE, 1), blocks(512, 500, 65536)])).await,
        spoilt(3, go(&[export(SIZE, 1), vec![0, 3, 0]])).await,
    ];
    for (index, result) in violations.into_iter().enumerate() {
        match result {
            Err(connect::Error::Closed { reason: Closed::Violation(_), .. }) => {}
            other => panic!("case {index}: {other:?}"),
        }
    }

    let tls = spoilt(1, option_reply(8, (1 << 31) + 5, b"no secrets here")).await.unwrap_err();
    assert!(tls.to_string().contains("TLS") && tls.to_string().contains("no secrets"), "{tls}");
    let silent = spoilt(2, option_reply(10, 1, &[])).await.unwrap_err();
    assert!(matches!(silent, connect::Error::NoContext { .. }), "{silent:?}");
    let mute = connect(vec![]).await.unwrap_err();
    let connect::Error::Closed { reason: Closed::MidMessage, .. } = mute else {
        panic!("{mute:?}")
    };
}

#[tokio::test]
async fn the_last_handle_says_goodbye() {
    use tokio::io::AsyncReadExt;

    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (mut reader, mut writer) = tokio::io::split(theirs);
    let server = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        writer.write_all(&handshake().concat()).await.unwrap();
        let mut heard = Vec::new();
        reader.read_to_end(&mut heard).await.unwrap();
        heard
    });
    let client = Client::over(ours, "fake", options(), LONG).await.unwrap();
    drop(client);
    let heard = server.await.unwrap();
    let goodbye = &heard[heard.len() - 28..];
    assert_eq!(goodbye[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2]);
}
