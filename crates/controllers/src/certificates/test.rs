//! A cluster whose parts take what is offered to them late and in any order.

use super::*;
use api::kubevirt::{Certificate, SelfSigned};
use proptest::prelude::*;
use std::time::UNIX_EPOCH;

fn at(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}

/// What is offered to a part, and when it will have taken it.
#[derive(Default, Clone)]
struct Offer<T> {
    taken: T,
    under_way: Vec<(SystemTime, T)>,
}

impl<T: Clone> Offer<T> {
    fn send(&mut self, by: SystemTime, what: T) {
        self.under_way.push((by, what));
    }

    fn advance(&mut self, now: SystemTime) {
        // What is read is the newest, whatever was under way before it.
        if let Some(last) = self.under_way.iter().rposition(|(by, _)| *by <= now) {
            self.taken = self.under_way[last].1.clone();
            self.under_way.drain(..=last);
        }
    }
}

#[derive(Default, Clone)]
struct Part {
    bundle: Offer<Vec<u64>>,
    leaf: Offer<Option<Leaf>>,
}

struct World {
    now: SystemTime,
    authorities: Vec<Authority>,
    parts: Vec<Part>,
    /// The newest leaf of each part, taken or not.
    leaves: Vec<Option<Leaf>>,
    /// The bundle that was published last.
    bundle: Vec<u64>,
}

impl World {
    fn until_of(&self, number: u64) -> SystemTime {
        self.authorities.iter().find(|ca| ca.number == number).map_or(at(0), |ca| ca.held.until)
    }

    /// Does what is to be done; returns when to look again.
    fn look(&mut self, terms: &Terms, mut delay: impl FnMut() -> Duration) -> SystemTime {
        for _ in 0..10 {
            let plan = match plan(&self.authorities, &self.leaves, terms, self.now) {
                Step::Make(life) => {
                    let held = Held { made: self.now, until: self.now + life };
                    let number = self.authorities.last().map_or(1, |ca| ca.number + 1);
                    self.authorities.push(Authority { number, held, published: None });
                    continue;
                }
                Step::Go(plan) => plan,
            };
            let mut acted = false;
            self.authorities.retain(|ca| plan.trusted.contains(&ca.number));
            if self.bundle != plan.trusted {
                self.bundle.clone_from(&plan.trusted);
                for ca in &mut self.authorities {
                    ca.published.get_or_insert(self.now);
                }
                for part in &mut self.parts {
                    part.bundle.send(self.now + delay(), self.bundle.clone());
                }
                acted = true;
            }
            for place in &plan.renew {
                let held = Held { made: self.now, until: plan.until };
                let leaf = Leaf { issuer: plan.signer, held };
                self.leaves[*place] = Some(leaf);
                self.parts[*place].leaf.send(self.now + delay(), Some(leaf));
                acted = true;
            }
            if !acted {
                return plan.again;
            }
        }
        panic!("there is always more to do");
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        for part in &mut self.parts {
            part.bundle.advance(self.now);
            part.leaf.advance(self.now);
        }
        for (place, part) in self.parts.iter().enumerate() {
            let Some(leaf) = part.leaf.taken else { continue };
            prop_assert!(self.now < leaf.held.until, "the leaf of part {} has ended", place);
            prop_assert!(self.now < self.until_of(leaf.issuer), "its CA has ended");
            for other in self.parts.iter().filter(|other| !other.bundle.taken.is_empty()) {
                let believed = other.bundle.taken.contains(&leaf.issuer);
                prop_assert!(believed, "CA {} is not known to all", leaf.issuer);
            }
        }
        Ok(())
    }
}

fn terms() -> impl Strategy<Value = Terms> {
    let one = || (1_u64..2_000, 0_u64..120);
    (one(), one()).prop_map(|(ca, server)| {
        let certificate = |(life, percent): (u64, u64)| Certificate {
            duration: Some(format!("{life}s")),
            renew_before: Some(format!("{}ms", life * 10 * percent)),
        };
        let self_signed = SelfSigned { ca: certificate(ca), server: certificate(server) };
        Terms::of(&CertificateRotateStrategy { self_signed })
    })
}

proptest! {
    #[test]
    fn whatever_leaf_is_in_use_is_believed_by_all_who_have_a_bundle(
        terms in terms(), parts in 1_usize..5, seed in any::<u64>(), steps in 20_usize..300,
    ) {
        let mut random = seed | 1;
        let mut chance = move |below: u128| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u128::from(random >> 16) % below.max(1)
        };
        let half = terms.spread() / 2;
        let mut within = move |most: Duration| {
            Duration::from_millis(u64::try_from(chance(most.as_millis())).unwrap_or(0))
        };
        let mut world = World {
            now: at(1_000_000_000), authorities: Vec::new(), parts: vec![Part::default(); parts],
            leaves: vec![None; parts], bundle: Vec::new(),
        };
        for _ in 0..steps {
            let again = world.look(&terms, || within(half));
            prop_assert!(again > world.now);
            prop_assert!(world.authorities.len() <= 3, "the bundle grows");
            world.check()?;
            // It looks a little late.
            let until = again + within(half);
            while world.now < until {
                world.now = (world.now + within(terms.spread()) + Duration::from_millis(1)).min(until);
                world.check()?;
            }
        }
        let made = world.authorities.last().map_or(0, |ca| ca.number);
        let whole = world.now.duration_since(at(1_000_000_000)).unwrap_or_default();
        prop_assert!(u128::from(made) >= whole.as_millis() / terms.ca.life.as_millis(), "CAs are not renewed");
    }

    #[test]
    fn whatever_there_is_ends_in_a_plan_that_leaves_nothing_to_do(
        terms in terms(),
        lives in proptest::collection::vec((0_u64..4_000_000, 1_u64..4_000_000, any::<bool>()), 0..5),
        leaves in proptest::collection::vec(
            proptest::option::of((0_u64..6, 0_u64..2_000_000, 1_u64..2_000_000)), 0..5),
    ) {
        let held = |made: u64, life: u64| Held { made: at(made), until: at(made + life) };
        let authorities = lives.iter().zip(1..).map(|(&(made, life, published), number)| Authority {
            number, held: held(made, life), published: published.then(|| at(made)),
        });
        let leaf = |(issuer, made, life)| Leaf { issuer, held: held(made, life) };
        let mut world = World {
            now: at(2_000_000), authorities: authorities.collect(),
            parts: vec![Part::default(); leaves.len()],
            leaves: leaves.iter().map(|found| found.map(leaf)).collect(), bundle: Vec::new(),
        };
        let again = world.look(&terms, || Duration::ZERO);
        prop_assert!(again > world.now);
        for leaf in world.leaves.iter().flatten() {
            let end = leaf.held.until.min(world.until_of(leaf.issuer));
            prop_assert!(world.now < end && again <= end, "a leaf ends before it is looked at");
        }
    }
}
