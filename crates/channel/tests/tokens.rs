//! A token leads to one connection, and a cut locks nobody out.

use channel::preface::{Stream, code};
use channel::tokens::{Token, Tokens};
use proptest::prelude::*;

const STREAM: Stream = Stream::Disk(3);

/// What the network does with one attempt to connect.
#[derive(Debug, Clone, Copy)]
enum Attempt {
    /// The preface is lost.
    Lost,
    /// The answer is lost: the source does not get the successor.
    AnswerLost,
    /// The source has the successor, its confirmation is lost.
    ConfirmLost,
    /// Its confirmation comes after the source has connected again.
    ConfirmLate,
    /// A preface that was sent before arrives (again); nobody waits for its answer.
    Delayed(prop::sample::Index),
    /// All arrives.
    Good,
}

fn attempts() -> impl Strategy<Value = Vec<Attempt>> {
    use Attempt::{AnswerLost, ConfirmLate, ConfirmLost, Delayed, Good, Lost};
    let delayed = any::<prop::sample::Index>().prop_map(Delayed);
    let rest = vec![Lost, AnswerLost, ConfirmLost, ConfirmLate, Good];
    let one = prop_oneof![1 => delayed, 4 => prop::sample::select(rest)];
    proptest::collection::vec(one, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn each_token_stands_for_one_connection_and_the_source_is_never_locked_out(
        attempts in attempts(),
    ) {
        let mut tokens = Tokens::new();
        let mut held = tokens.issue(STREAM);
        let mut presented: Vec<Token> = Vec::new();
        let mut stood: Vec<Token> = Vec::new();
        let mut late = None;
        for attempt in attempts {
            match attempt {
                Attempt::Lost => continue,
                Attempt::Delayed(which) if !presented.is_empty() => {
                    let old = which.get(&presented);
                    let answer = tokens.offer(STREAM, old);
                    prop_assert!(answer.is_err() || !stood.contains(old), "a used token was taken");
                    continue;
                }
                _ => {}
            }
            let successor = tokens.offer(STREAM, &held);
            prop_assert!(successor.is_ok(), "locked out: {successor:?}");
            let successor = successor.expect("just checked");
            presented.push(held.clone());
            // The confirmation of an older connection arrives only now.
            if let Some(late) = late.take() {
                prop_assert!(!tokens.confirm(STREAM, &late), "two connections stand");
            }
            match attempt {
                Attempt::ConfirmLost => held = successor,
                Attempt::ConfirmLate => {
                    late = Some(successor.clone());
                    held = successor;
                }
                Attempt::Good => {
                    prop_assert!(!stood.contains(&held), "a token stands for two connections");
                    prop_assert!(tokens.confirm(STREAM, &successor));
                    prop_assert!(!tokens.confirm(STREAM, &successor), "confirmed twice");
                    stood.push(held);
                    held = successor;
                }
                Attempt::Lost | Attempt::AnswerLost | Attempt::Delayed(_) => {}
            }
        }
        prop_assert!(tokens.offer(Stream::Control, &held).is_err(), "good for another stream");
        prop_assert!(tokens.offer(STREAM, &held).is_ok());
    }
}

#[test]
fn a_used_a_foreign_and_a_revoked_token_are_told_apart() {
    let mut tokens = Tokens::new();
    let first = tokens.issue(STREAM);
    let guessed = Token::random();
    let second = tokens.offer(STREAM, &first).expect("it is good");
    assert!(tokens.confirm(STREAM, &second));
    let code = |tokens: &mut Tokens, token| tokens.offer(STREAM, token).expect_err("refused").code;
    assert_eq!(code(&mut tokens, &first), code::TOKEN_USED);
    assert_eq!(code(&mut tokens, &guessed), code::TOKEN_UNKNOWN);
    tokens.revoke(STREAM);
    assert_eq!(code(&mut tokens, &second), code::STREAM_UNKNOWN);
}

#[test]
fn a_token_is_hex_on_the_wire_and_nothing_in_a_log() {
    let token = Token::random();
    let text = serde_json::to_string(&token).expect("it is text");
    assert_eq!(text.len(), 64 + 2);
    assert_eq!(serde_json::from_str::<Token>(&text).expect("it is a token"), token);
    assert!(serde_json::from_str::<Token>("\"+1\"").is_err());
    assert!(serde_json::from_str::<Token>(&format!("\"{}\"", "+1".repeat(32))).is_err());
    assert_eq!(format!("{token:?}"), "Token(..)");
}
