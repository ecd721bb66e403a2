//! Tokens: each admits one connection of one stream, and is succeeded by the next.
//!
//! The target's launcher issues a token for each stream; the source presents it in its
//! preface. Every accepted connection is offered a successor, with which the source
//! reconnects after a cut:
//!
//! ```text
//! source                                   target
//!   preface(t0)      ------------------->  offer(t0) = t1       t0 and t1 are good now
//!                    <-- Accepted(t1) ---
//!   confirm byte     ------------------->  confirm(t1)          t0 is used, only t1 is good
//! ```
//!
//! A cut before the source has `t1` leaves it `t0`; a cut after leaves it `t1`: it is
//! never locked out. And yet `t0` leads to one confirmed connection at most. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::preface::{Refusal, Stream, code};

/// Used tokens that are remembered for each stream, to name the reason of a refusal.
const REMEMBERED: usize = 16;

/// A secret of 244 random bits; on the wire 64 hex digits.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token([u8; 32]);

impl Token {
    /// A new one that nobody can guess.
    pub fn random() -> Self {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(Uuid::new_v4().as_bytes());
        bytes[16..].copy_from_slice(Uuid::new_v4().as_bytes());
        Self(bytes)
    }
}

impl PartialEq for Token {
    /// Takes as long for a wrong first byte as for a wrong last one.
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl TryFrom<String> for Token {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const MALFORMED: &str = "a token is 64 hex digits";
        let digits = text.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 64 {
            return Err(MALFORMED);
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16).ok_or(MALFORMED);
            *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).map_err(|_| MALFORMED)?;
        }
        Ok(Self(bytes))
    }
}

/// The tokens of one migration, kept by the target's launcher.
#[derive(Debug, Default)]
pub struct Tokens {
    streams: BTreeMap<Stream, Chain>,
}

/// One stream's tokens, oldest first: `used.., current, offered`.
#[derive(Debug)]
struct Chain {
    used: VecDeque<Token>,
    current: Token,
    offered: Option<Token>,
}

impl Chain {
    fn step(&mut self, to: Token) {
        if self.used.len() == REMEMBERED {
            self.used.pop_front();
        }
        self.used.push_back(std::mem::replace(&mut self.current, to));
        self.offered = None;
    }
}

impl Tokens {
    /// No stream may connect yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Admits a stream; returns its first token. What was good for it before is not.
    pub fn issue(&mut self, stream: Stream) -> Token {
        let current = Token::random();
        let chain = Chain { used: VecDeque::new(), current: current.clone(), offered: None };
        self.streams.insert(stream, chain);
        current
    }

    /// Judges a token that was presented; returns the successor to answer with.
    ///
    /// Presenting a successor proves that it was received: the token before is used then.
    /// Presenting the current token again is answered with the same successor: a preface
    /// that was delayed on its way must not void what the source was given meanwhile.
    pub fn offer(&mut self, stream: Stream, presented: &Token) -> Result<Token, Refusal> {
        let Some(chain) = self.streams.get_mut(&stream) else {
            return Err(Refusal::new(code::STREAM_UNKNOWN, format!("no {stream} is expected")));
        };
        if chain.offered.as_ref() == Some(presented) {
            chain.step(presented.clone());
        } else if chain.used.contains(presented) {
            let text = format!("this token of {stream} was used; use the one that succeeded it");
            return Err(Refusal::new(code::TOKEN_USED, text));
        } else if chain.current != *presented {
            let text = format!("this token was not issued for {stream}");
            return Err(Refusal::new(code::TOKEN_UNKNOWN, text));
        }
        Ok(chain.offered.get_or_insert_with(Token::random).clone())
    }

    /// Notes that the source has `successor`. Only when this returns true does the
    /// connection on which it was confirmed stand; otherwise another has taken its place,
    /// and it must be dropped.
    #[must_use = "a connection whose successor is void must be dropped"]
    pub fn confirm(&mut self, stream: Stream, successor: &Token) -> bool {
        match self.streams.get_mut(&stream) {
            Some(chain) if chain.offered.as_ref() == Some(successor) => {
                chain.step(successor.clone());
                true
            }
            _ => false,
        }
    }

    /// Admits the stream no more.
    pub fn revoke(&mut self, stream: Stream) {
        self.streams.remove(&stream);
    }
}
