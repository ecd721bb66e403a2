//! When certificates are made and renewed, and who is believed meanwhile. Pure: who acts on it
//! holds the keys.
//!
//! ```text
//!  CA 1  |--------- signs ---------|-- believed --|
//!  CA 2                      |-out-|--------- signs ---------|-- believed --|
//!                            ^made ^after SPREAD
//! ```
//!
//! A new CA is believed by all before it signs anything, and an old one is believed until its end,
//! long after its last leaf was replaced. So parts may be renewed in any order.

use api::kubevirt::CertificateRotateStrategy;
use std::time::{Duration, SystemTime};

/// A CA's life, as KubeVirt has it.
const CA_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// A leaf's life, as KubeVirt has it.
const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);
/// No shorter life can be kept up: certificates count whole seconds, and files are read now and
/// then. What is shorter is raised to this.
const SHORTEST_CA: Duration = Duration::from_secs(20);
const SHORTEST_LEAF: Duration = Duration::from_secs(10);
/// No more than this is waited until a bundle has reached everybody.
const SPREAD: Duration = Duration::from_secs(60);
/// Certificates count whole seconds.
const ROUNDING: Duration = Duration::from_secs(2);

/// How long a certificate lives, and how much of that is left when it is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// From its making to its end.
    pub life: Duration,
    /// Before its end.
    pub renew_before: Duration,
}

impl Term {
    fn new(life: Duration, renew_before: Option<Duration>) -> Self {
        // N.B. at most half: else CAs would follow each other so fast that bundles grow. At least
        // 20 %, as KubeVirt has it: less may be too little for what is to be done meanwhile.
        let renew_before = renew_before.unwrap_or_default().clamp(life / 5, life / 2);
        Self { life, renew_before }
    }

    /// When a certificate of this term is to be replaced.
    fn due(self, held: Held) -> SystemTime {
        let life = held.until.duration_since(held.made).unwrap_or_default();
        if life > self.life + ROUNDING {
            // It was made for longer than is wanted now.
            return held.made;
        }
        held.until - self.renew_before.min(life / 2)
    }
}

/// The terms of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Of its CA.
    pub ca: Term,
    /// Of what the CA vouches for.
    pub leaf: Term,
}

impl Terms {
    /// As settings say.
    pub fn of(strategy: &CertificateRotateStrategy) -> Self {
        let asked = &strategy.self_signed;
        let ca = asked.ca.duration().unwrap_or(CA_LIFE).max(SHORTEST_CA);
        // What a CA vouches for ends with it.
        let leaf = asked.server.duration().unwrap_or(LEAF_LIFE).clamp(SHORTEST_LEAF, ca);
        Self {
            ca: Term::new(ca, asked.ca.renew_before()),
            leaf: Term::new(leaf, asked.server.renew_before()),
        }
    }

    /// How long a bundle is out before what it is for is used: everybody has it by half of that.
    pub fn spread(&self) -> Duration {
        SPREAD.min(self.ca.renew_before / 4).min(self.leaf.renew_before / 2)
    }
}

/// A certificate's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// When it was made.
    pub made: SystemTime,
    /// Its end.
    pub until: SystemTime,
}

/// A CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authority {
    /// Its number: each new one has a higher one.
    pub number: u64,
    /// Its time.
    pub held: Held,
    /// Since when the bundle that everybody can have has it.
    pub published: Option<SystemTime>,
}

/// What a part uses, or is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// The number of the CA that vouches for it.
    pub issuer: u64,
    /// Its time.
    pub held: Held,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make a CA that lives so long, then look again.
    Make(Duration),
    /// Let everybody have the CAs in [`Plan::trusted`] before anything else.
    Go(Plan),
}

/// How things are to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The CAs that are believed; others are to be forgotten.
    pub trusted: Vec<u64>,
    /// The CA that vouches for new leaves.
    pub signer: u64,
    /// The end of a leaf that is made now.
    pub until: SystemTime,
    /// Which of the leaves are to be made anew, by their place.
    pub renew: Vec<usize>,
    /// When to look again, at the latest.
    pub again: SystemTime,
}

/// What is to be done with CAs, oldest first, and parts' leaves. A part without one needs one.
pub fn plan(
    authorities: &[Authority],
    leaves: &[Option<Leaf>],
    terms: &Terms,
    now: SystemTime,
) -> Step {
    let valid: Vec<&Authority> = authorities.iter().filter(|ca| now < ca.held.until).collect();
    let Some(newest) = valid.last().filter(|newest| now < terms.ca.due(newest.held)) else {
        return Step::Make(terms.ca.life);
    };
    let signs_from = |ca: &Authority| ca.published.map(|at| at + terms.spread());
    let known = valid.iter().rev().find(|ca| signs_from(ca).is_some_and(|from| from <= now));
    // Where none is known to everybody, the oldest is the one that most know.
    let signer = known.unwrap_or(&valid[0]);
    let due = |leaf: &Leaf| match leaf.issuer == signer.number {
        // N.B. nothing is believed longer than what vouches for it.
        true => terms.leaf.due(Held { until: leaf.held.until.min(signer.held.until), ..leaf.held }),
        false => now,
    };
    let is_due = |leaf: &Option<Leaf>| leaf.is_none_or(|leaf| due(&leaf) <= now);
    let until = (now + terms.leaf.life).min(signer.held.until);
    let after_renewal = |leaf: &Option<Leaf>| match leaf.filter(|leaf| due(leaf) > now) {
        Some(leaf) => due(&leaf),
        None => terms.leaf.due(Held { made: now, until }),
    };
    let moments = leaves
        .iter()
        .map(after_renewal)
        .chain(valid.iter().map(|ca| ca.held.until))
        .chain(valid.iter().filter_map(|ca| signs_from(ca)))
        .chain([terms.ca.due(newest.held)]);
    Step::Go(Plan {
        trusted: valid.iter().map(|ca| ca.number).collect(),
        signer: signer.number,
        until,
        renew: (0..leaves.len()).filter(|place| is_due(&leaves[*place])).collect(),
        again: moments.filter(|at| *at > now).min().unwrap_or(now + terms.leaf.renew_before),
    })
}

#[cfg(test)]
mod test;
