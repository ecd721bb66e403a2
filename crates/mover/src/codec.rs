//! Compression of extents, switched by measurement.
//!
//! Compressing pays when the link is what limits a move and a core is idle:
//! with codec c the guest's bytes flow at `min(wire rate x ratio, speed x idle cores)`,
//! without at the wire rate. The chooser knows each codec's ratio and speed
//! from a chunk that it tries now and then, and takes the larger.

use crate::wire::Codec;
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// Whether disks are compressed on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// When it makes the move faster, by measurement.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always LZ4.
    Lz4,
    /// Always Zstandard.
    Zstd,
}

/// Compresses `raw` into `out`; says which codec `out` is in: `None` (and
/// `out` empty) when the data does not shrink.
pub fn encode(codec: Codec, raw: &[u8], out: &mut Vec<u8>) -> Codec {
    out.clear();
    let len = match codec {
        Codec::None => return Codec::None,
        Codec::Lz4 => {
            out.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
            lz4_flex::block::compress_into(raw, out).ok()
        }
        Codec::Zstd => {
            out.resize(zstd::zstd_safe::compress_bound(raw.len()), 0);
            zstd::bulk::compress_to_buffer(raw, out.as_mut_slice(), 1).ok()
        }
    };
    match len {
        Some(len) if len < raw.len() => {
            out.truncate(len);
            codec
        }
        _ => {
            out.clear();
            Codec::None
        }
    }
}

/// Decompresses `payload` into `raw`, which it must fill exactly.
///
/// # Errors
/// `InvalidData` when it does not.
pub fn decode(codec: Codec, payload: &[u8], raw: &mut [u8]) -> io::Result<()> {
    let len = match codec {
        Codec::None => {
            if payload.len() == raw.len() {
                raw.copy_from_slice(payload);
            }
            payload.len()
        }
        Codec::Lz4 => lz4_flex::block::decompress_into(payload, raw).map_err(io::Error::other)?,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(payload, raw)?,
    };
    if len == raw.len() {
        return Ok(());
    }
    let what = format!("disk stream: an extent of {} bytes unpacked to {len}", raw.len());
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// What the move meets at this moment.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Whether the link is what limits the move.
    pub wire_limited: bool,
    /// What the link carries, bytes per second.
    pub wire_rate: f64,
    /// Cores that nobody uses.
    pub idle_cores: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Trial {
    /// Raw bytes per encoded byte; 0 until tried.
    ratio: f64,
    /// Raw bytes per second of one core.
    speed: f64,
}

/// Chooses the codec for the next chunks. Pure.
#[derive(Debug, Clone)]
pub struct Chooser {
    policy: Compression,
    current: Codec,
    lz4: Trial,
    zstd: Trial,
    chunks: u32,
}

/// One chunk in this many is a trial of a codec that is not in use.
const TRIAL_EVERY: u32 = 32;
/// A change must promise this much, or the choice flutters.
const GAIN: f64 = 1.1;

impl Chooser {
    /// A chooser that follows `policy`.
    pub fn new(policy: Compression) -> Self {
        let current = match policy {
            Compression::Auto | Compression::Off => Codec::None,
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
        };
        Self { policy, current, lz4: Trial::default(), zstd: Trial::default(), chunks: 0 }
    }

    /// The codec for the next chunk: the one in use, or one on trial.
    pub fn next(&mut self, load: &Load) -> Codec {
        if self.policy != Compression::Auto {
            return self.current;
        }
        self.chunks = self.chunks.wrapping_add(1);
        if load.wire_limited && load.idle_cores > 0.1 {
            match self.chunks % TRIAL_EVERY {
                1 => return Codec::Lz4,
                2 => return Codec::Zstd,
                _ => {}
            }
        }
        self.decide(load);
        self.current
    }

    fn decide(&mut self, load: &Load) {
        // Once compression is on, the link may have stopped being the limit because of it.
        if !load.wire_limited && self.current == Codec::None {
            return;
        }
        let promise = |trial: &Trial| match trial.ratio {
            0.0 => 0.0,
            ratio => (load.wire_rate * ratio).min(trial.speed * load.idle_cores.max(0.1)),
        };
        let rates = [
            (Codec::None, load.wire_rate),
            (Codec::Lz4, promise(&self.lz4)),
            (Codec::Zstd, promise(&self.zstd)),
        ];
        let of = |codec| rates.iter().find(|(c, _)| *c == codec).map_or(0.0, |(_, r)| *r);
        let best = rates.iter().fold(rates[0], |a, b| if b.1 > a.1 { *b } else { a });
        if best.1 > of(self.current) * GAIN {
            self.current = best.0;
        }
    }

    /// Tells what a codec did with a chunk.
    pub fn observe(&mut self, codec: Codec, raw: usize, encoded: usize, took: Duration) {
        let trial = match codec {
            Codec::None => return,
            Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
        };
        let ratio = raw as f64 / encoded.max(1) as f64;
        let speed = raw as f64 / took.as_secs_f64().max(1e-9);
        let first = trial.ratio == 0.0;
        let mix = |old: f64, new: f64| if first { new } else { 0.75 * old + 0.25 * new };
        *trial = Trial { ratio: mix(trial.ratio, ratio), speed: mix(trial.speed, speed) };
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn settled(load: Load, ratio: f64, speed: f64) -> Codec {
        let mut chooser = Chooser::new(Compression::Auto);
        for _ in 0..100 {
            let codec = chooser.next(&load);
            let encoded = (1e6 / ratio) as usize;
            chooser.observe(codec, 1_000_000, encoded, Duration::from_secs_f64(1e6 / speed));
        }
        (0..4).map(|_| chooser.next(&load)).next_back().unwrap_or(Codec::None)
    }

    #[test]
    fn compression_is_on_only_when_the_link_limits_and_cores_are_idle() {
        let slow = Load { wire_limited: true, wire_rate: 50e6, idle_cores: 1.0 };
        assert_ne!(settled(slow, 3.0, 400e6), Codec::None);
        assert_eq!(settled(Load { wire_limited: false, ..slow }, 3.0, 400e6), Codec::None);
        assert_eq!(settled(Load { idle_cores: 0.0, ..slow }, 3.0, 400e6), Codec::None);
        assert_eq!(settled(slow, 1.0, 400e6), Codec::None, "data that does not shrink");
        let fast = Load { wire_limited: true, wire_rate: 5e9, idle_cores: 1.0 };
        assert_eq!(settled(fast, 3.0, 400e6), Codec::None, "a link faster than the codec");
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(
            raw in proptest::collection::vec(0u8..4, 1..100_000),
            codec in prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::Zstd)],
        ) {
            let mut out = Vec::new();
            let used = encode(codec, &raw, &mut out);
            let mut back = vec![0; raw.len()];
            let payload = if used == Codec::None { &raw } else { &out };
            decode(used, payload, &mut back).unwrap();
            prop_assert_eq!(raw, back);
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(
            payload in proptest::collection::vec(any::<u8>(), 0..4096),
            codec in prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::Zstd)],
            len in 1usize..8192,
        ) {
            let _ = decode(codec, &payload, &mut vec![0; len]);
        }
    }
}
