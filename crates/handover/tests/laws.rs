//! What holds for every record and every swap, and for every message.

use handover::Failure;
use handover::handler::{self, Qemu};
use handover::ledger::{Process, Request, Response};
use handover::record::{
    AttemptId, Epoch, HostId, InstanceId, Move, Record, Refused, State, Swap, VmId, apply,
};
use handover::wire::v1::{FromSource, FromTarget, decode, encode};
use handover::wire::{CURRENT, Error, Hello, OLDEST, Welcome};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::Value;

fn vm() -> VmId {
    "web".into()
}

/// Few of each, so that they meet; and epochs that no VM reaches.
fn epochs() -> impl Strategy<Value = Epoch> {
    prop_oneof![12 => 0..5u64, 1 => u64::MAX - 3..=u64::MAX, 1 => any::<u64>()]
}

fn instances() -> impl Strategy<Value = InstanceId> {
    prop_oneof![Just("s".into()), Just("t".into()), Just("x".into())]
}

fn attempts() -> impl Strategy<Value = AttemptId> {
    prop_oneof![Just("a".into()), Just("b".into())]
}

fn hosts() -> impl Strategy<Value = HostId> {
    prop_oneof![Just("east".into()), Just("west".into())]
}

prop_compose! {
    fn moves()(attempt in attempts(), heir in instances(), peer in hosts()) -> Move {
        Move { attempt, heir, peer }
    }
}

prop_compose! {
    fn records()(
        epoch in epochs(),
        owner in instances(),
        state in prop_oneof![
            Just(State::Idle),
            moves().prop_map(State::Armed),
            moves().prop_map(State::Committed),
            moves().prop_map(State::Expected),
            moves().prop_map(State::Returned),
        ],
    ) -> Record {
        Record { vm: vm(), epoch, owner, state }
    }
}

fn swaps() -> impl Strategy<Value = Swap> {
    let (e, i, a) = (epochs, instances, attempts);
    prop_oneof![
        (option::of(e()), i(), any::<bool>()).prop_map(|(seen, instance, forced)| Swap::Start {
            seen,
            instance,
            forced
        }),
        (e(), i(), moves()).prop_map(|(epoch, owner, to)| Swap::Arm { epoch, owner, to }),
        (e(), a()).prop_map(|(epoch, attempt)| Swap::Commit { epoch, attempt }),
        (e(), a()).prop_map(|(epoch, attempt)| Swap::Abort { epoch, attempt }),
        (e(), i(), moves()).prop_map(|(epoch, source, from)| Swap::Expect { epoch, source, from }),
        (e(), i()).prop_map(|(epoch, instance)| Swap::Adopt { epoch, instance }),
        (e(), i(), a(), hosts(), option::of(i()), any::<bool>()).prop_map(
            |(epoch, source, attempt, peer, adopted, has_guest)| Swap::Relinquish {
                epoch,
                source,
                attempt,
                peer,
                adopted,
                has_guest
            }
        ),
        (e(), i(), a()).prop_map(|(epoch, owner, attempt)| Swap::HandBack {
            epoch,
            owner,
            attempt
        }),
    ]
}

fn qemus() -> impl Strategy<Value = Qemu> {
    prop_oneof![Just(Qemu::Alive), Just(Qemu::Ended), Just(Qemu::Unknown)]
}

/// A swap as the handler is asked it: by its own host, or by another.
fn asked(
    current: Option<&Record>,
    asker: Option<&HostId>,
    qemu: Qemu,
    swap: &Swap,
) -> Result<Record, Refused> {
    match asker {
        None => handler::local(&vm(), current, |_| qemu, swap),
        Some(asker) => handler::peer(&vm(), current, asker, |_| qemu, swap),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_epoch_never_decreases(
        current in option::of(records()),
        asker in option::of(hosts()),
        qemu in qemus(),
        swap in swaps(),
    ) {
        if let Ok(next) = asked(current.as_ref(), asker.as_ref(), qemu, &swap) {
            prop_assert!(next.epoch >= current.map_or(0, |now| now.epoch));
            prop_assert_eq!(next.vm, vm());
        }
    }

    #[test]
    fn whoever_takes_the_vm_takes_it_in_a_later_epoch(current in records(), swap in swaps()) {
        let may_run = |r: &Record| matches!(r.state, State::Idle | State::Armed(_));
        if let Ok(next) = apply(&vm(), Some(&current), &swap)
            && may_run(&next)
            && !(may_run(&current) && next.owner == current.owner)
            && current.epoch < handover::record::MAX_EPOCH
        {
            prop_assert!(next.epoch > current.epoch, "{current} became {next}");
        }
    }

    #[test]
    fn a_swap_done_twice_succeeds_twice(current in option::of(records()), swap in swaps()) {
        if let Ok(next) = apply(&vm(), current.as_ref(), &swap) {
            prop_assert_eq!(apply(&vm(), Some(&next), &swap), Ok(next.clone()));
        }
    }

    #[test]
    fn another_host_that_asks_twice_learns_the_same(
        current in option::of(records()),
        asker in hosts(),
        qemu in qemus(),
        swap in swaps(),
    ) {
        if let Ok(next) = asked(current.as_ref(), Some(&asker), qemu, &swap) {
            let again = match asked(Some(&next), Some(&asker), qemu, &swap) {
                Ok(record) => Some(record),
                Err(refused) => refused.current,
            };
            prop_assert_eq!(again.as_ref().map(|r| r.epoch), Some(next.epoch));
            let left = matches!(next.state, State::Committed(_));
            prop_assert_eq!(again.is_some_and(|r| matches!(r.state, State::Committed(_))), left);
        }
    }

    #[test]
    fn a_refusal_says_what_is_written(current in option::of(records()), swap in swaps()) {
        if let Err(refused) = apply(&vm(), current.as_ref(), &swap) {
            prop_assert_eq!(refused.current, current);
            prop_assert!(!refused.why.is_empty());
        }
    }

    #[test]
    fn an_aborted_attempt_is_never_committed(first in records(), swaps in vec(swaps(), 1..24)) {
        let mut now = first;
        let mut aborted = Vec::new();
        for swap in swaps {
            let Ok(next) = apply(&vm(), Some(&now), &swap) else { continue };
            if let Swap::Abort { epoch, attempt } = &swap {
                aborted.push((*epoch, attempt.clone()));
            }
            if let Swap::Commit { epoch, attempt } = swap {
                prop_assert!(!aborted.contains(&(epoch, attempt)), "{now} became {next}");
            }
            now = next;
        }
    }

    #[test]
    fn a_committed_attempt_is_aborted_only_after_somebody_took_the_vm(
        first in records(),
        swaps in vec(swaps(), 1..24),
    ) {
        let mut now = first;
        let mut committed = None;
        for swap in swaps {
            let Ok(next) = apply(&vm(), Some(&now), &swap) else { continue };
            match swap {
                Swap::Commit { epoch, attempt } => committed = Some((epoch, attempt)),
                Swap::Abort { epoch, attempt } => {
                    prop_assert_ne!(committed.clone(), Some((epoch, attempt)));
                }
                // Forced, or by the heir, or handed back.
                _ if next.epoch > now.epoch => committed = None,
                _ => {}
            }
            now = next;
        }
    }

    #[test]
    fn another_host_changes_only_an_attempt_of_its_own(
        current in option::of(records()),
        asker in hosts(),
        qemu in qemus(),
        swap in swaps(),
    ) {
        let concerns = current.as_ref().is_some_and(|now| match &now.state {
            State::Idle => false,
            State::Armed(of)
            | State::Committed(of)
            | State::Expected(of)
            | State::Returned(of) => of.peer == asker,
        });
        match asked(current.as_ref(), Some(&asker), qemu, &swap) {
            Ok(next) => prop_assert!(concerns || Some(&next) == current.as_ref()),
            // It is told no names but those that it named itself.
            Err(Refused { current: Some(told), .. }) if !concerns => {
                prop_assert_eq!(told.state, State::Idle);
                if let Swap::Relinquish { source, .. } = swap {
                    let known = told.owner == source || told.owner.0.contains("not told");
                    prop_assert!(known);
                } else {
                    prop_assert!(told.owner.0.contains("not told"));
                }
            }
            Err(_) => {}
        }
    }

    #[test]
    fn an_heir_gives_nothing_back_of_which_another_host_was_told(
        current in records(),
        asker in hosts(),
        qemu in qemus(),
        attempt in attempts(),
        has_guest in any::<bool>(),
    ) {
        let source: InstanceId = "another".into();
        let epoch = current.epoch.saturating_sub(1);
        let relinquish = |adopted| Swap::Relinquish {
            epoch,
            source: source.clone(),
            attempt: attempt.clone(),
            peer: asker.clone(),
            adopted,
            has_guest,
        };
        let (asks, back) = (relinquish(None), relinquish(Some(current.owner.clone())));
        if let Err(Refused { current: Some(_), .. }) =
            asked(Some(&current), Some(&asker), qemu, &asks)
            && apply(&vm(), Some(&current), &back).is_ok_and(|next| next != current)
        {
            prop_assert!(handler::is_too_late(handler::told_of(Some(&current), &asks), &back));
        }
    }

    #[test]
    fn no_start_beside_a_qemu_that_lives(
        current in records(),
        instance in instances(),
        forced in any::<bool>(),
    ) {
        let start = Swap::Start { seen: Some(current.epoch), instance: instance.clone(), forced };
        if current.owner != instance {
            prop_assert!(asked(Some(&current), None, Qemu::Alive, &start).is_err());
        }
    }
}

fn failures() -> impl Strategy<Value = Failure> {
    prop_oneof![
        Just(Failure::Cancelled),
        Just(Failure::PeerLost),
        Just(Failure::QemuEnded),
        ".*".prop_map(Failure::Other),
    ]
}

fn bodies() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".*", inner, 0..4)
                .prop_map(|map| map.into_iter().collect()),
        ]
    })
}

fn from_source() -> impl Strategy<Value = FromSource> {
    prop_oneof![
        bodies().prop_map(FromSource::Offer),
        bodies().prop_map(FromSource::MemoryStarts),
        Just(FromSource::Commit),
        failures().prop_map(FromSource::Aborted),
        bodies().prop_map(FromSource::History),
    ]
}

fn from_target() -> impl Strategy<Value = FromTarget> {
    prop_oneof![
        bodies().prop_map(FromTarget::Prepared),
        Just(FromTarget::Loaded),
        Just(FromTarget::Running),
        failures().prop_map(FromTarget::Failed),
        failures().prop_map(FromTarget::GaveBack),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Read { vm: vm() }),
        swaps().prop_map(|change| Request::Swap { vm: vm(), change }),
        (instances(), processes())
            .prop_map(|(instance, process)| Request::Watch { instance, process }),
    ]
}

fn processes() -> impl Strategy<Value = Process> {
    (any::<u32>(), any::<u64>(), option::of(any::<u64>()))
        .prop_map(|(pid, start_time, namespace)| Process { pid, start_time, namespace })
}

fn responses() -> impl Strategy<Value = Response> {
    prop_oneof![
        option::of(records()).prop_map(|record| Response::Record { record }),
        records().prop_map(|record| Response::Done { record }),
        (option::of(records()), ".*")
            .prop_map(|(current, why)| Response::Refused { refused: Refused { current, why } }),
        Just(Response::Watching),
        ".*".prop_map(|why| Response::Failed { why }),
    ]
}

/// Bytes as a broken or hostile peer would send them: anything, or almost a message.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let messages = prop_oneof![
        from_source().prop_map(|m| encode(&m).unwrap()),
        from_target().prop_map(|m| encode(&m).unwrap()),
        requests().prop_map(|m| encode(&m).unwrap()),
        responses().prop_map(|m| encode(&m).unwrap()),
    ];
    let bent = (messages, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()).prop_map(
        |(mut bytes, at, byte, cut)| {
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = byte;
            }
            bytes
        },
    );
    prop_oneof![vec(any::<u8>(), 0..200), bent]
}

/// What was understood says the same when it is told again.
fn understood<M>(bytes: &[u8]) -> Result<(), TestCaseError>
where
    M: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    match decode::<M>(bytes) {
        Ok(message) => prop_assert_eq!(decode::<M>(&encode(&message).unwrap()), Ok(message)),
        Err(error) => prop_assert!(matches!(error, Error::Message(_))),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_arrive_as_they_were_sent(
        source in from_source(),
        target in from_target(),
        request in requests(),
        response in responses(),
    ) {
        prop_assert_eq!(decode::<FromSource>(&encode(&source).unwrap()), Ok(source));
        prop_assert_eq!(decode::<FromTarget>(&encode(&target).unwrap()), Ok(target));
        prop_assert_eq!(decode::<Request>(&encode(&request).unwrap()), Ok(request));
        prop_assert_eq!(decode::<Response>(&encode(&response).unwrap()), Ok(response));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in bytes()) {
        understood::<Hello>(&bytes)?;
        understood::<Welcome>(&bytes)?;
        understood::<FromSource>(&bytes)?;
        understood::<FromTarget>(&bytes)?;
        understood::<Request>(&bytes)?;
        understood::<Response>(&bytes)?;
    }

    #[test]
    fn the_newest_version_that_both_speak_is_chosen(oldest in 0..4u32, newest in 0..4u32) {
        let theirs = Hello { protocol: "godwit".into(), oldest, newest };
        let common = (oldest..=newest).filter(|v| (OLDEST..=CURRENT).contains(v)).max();
        match theirs.negotiate() {
            Ok(version) => prop_assert_eq!(Some(version), common),
            Err(Error::NoVersion { .. }) => prop_assert!(common.is_none() && oldest <= newest),
            Err(_) => prop_assert!(oldest > newest),
        }
    }
}

#[test]
fn a_message_that_is_too_long_is_not_sent() {
    let long = FromSource::Offer(Value::from("x".repeat(handover::wire::MAX_MESSAGE)));
    assert!(matches!(encode(&long), Err(Error::Message(_))));
}

#[test]
fn only_the_current_and_the_previous_version_are_spoken() {
    const { assert!(CURRENT == OLDEST || CURRENT == OLDEST + 1) };
    assert_eq!(Hello::ours().negotiate(), Ok(CURRENT));
    let other = Hello { protocol: "ssh".into(), ..Hello::ours() };
    assert_eq!(other.negotiate(), Err(Error::Stranger));
}
