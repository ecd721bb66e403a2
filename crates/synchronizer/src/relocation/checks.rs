//! What may stand in a move's way and no object of either cluster tells by itself. Pure.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

/// The version of what synchronizers and launchers of two clusters say to each other: the one before is
/// understood, too.
pub const PROTOCOL: u32 = 1;
/// Clocks may differ by this: with more, new certificates are not believed yet, and times of events say
/// nothing.
const CLOCKS: SignedDuration = SignedDuration::from_secs(60);
/// A CA that ends so soon is warned of.
const SOON: SignedDuration = SignedDuration::from_hours(24);

/// Whether two clusters understand each other.
pub fn protocol(cluster: &str, theirs: u32) -> Option<String> {
    (theirs.abs_diff(PROTOCOL) > 1).then(|| {
        format!(
            "cluster {cluster} speaks version {theirs} of Godwit's protocol and this one {PROTOCOL}: they must \
             not be more than one apart; bring the older one up to date"
        )
    })
}

/// Whether the other cluster's clock is right: it said that it was `there`, between `asked` and
/// `answered` of the own clock.
pub fn clocks(
    cluster: &str,
    there: Timestamp,
    (asked, answered): (Timestamp, Timestamp),
) -> Option<String> {
    let (behind, ahead) = (asked.duration_since(there), there.duration_since(answered));
    let off = behind.max(ahead);
    (off > CLOCKS).then(|| {
        let way = if behind > ahead { "behind" } else { "ahead of" };
        let seconds = off.as_secs();
        format!(
            "the clock of cluster {cluster} is {seconds} s {way} this one's: set both by the same source"
        )
    })
}

/// What was found, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The move cannot be made.
    Fault(String),
    /// It can.
    Warning(String),
}

/// Whether a cluster's CAs, of which the first ends then, will be believed for a while.
pub fn certificates(cluster: &str, ends: Option<Timestamp>, now: Timestamp) -> Option<Finding> {
    let Some(left) = ends.map(|ends| ends.duration_since(now)) else {
        return Some(Finding::Fault(format!("no CA of cluster {cluster} is known: link it anew")));
    };
    if left <= SignedDuration::ZERO {
        return Some(Finding::Fault(format!(
            "the CA of cluster {cluster} has ended: link it anew"
        )));
    }
    let hours = left.as_hours();
    (left < SOON).then(|| {
        Finding::Warning(format!("a CA of cluster {cluster} ends in {hours} h: is it renewed?"))
    })
}

/// What becomes of a guest's addresses and connections in another cluster, by its VMI's spec there.
pub fn networks(cluster: &str, spec: &Value) -> Vec<String> {
    let told = |network: &Value| {
        let name = network["name"].as_str().unwrap_or_default();
        match network["multus"]["networkName"].as_str() {
            Some(bridge) => format!(
                "network {name}: its address stays, and works if {bridge} of cluster {cluster} is the same segment"
            ),
            None => format!(
                "network {name}: its address among pods will be another in cluster {cluster}, and connections by it end"
            ),
        }
    };
    spec["networks"].as_array().into_iter().flatten().map(told).collect()
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).expect("a time")
    }

    #[test]
    fn clusters_understand_the_version_before_and_the_next_one_and_no_other() {
        assert_eq!(protocol("west", PROTOCOL), None);
        assert_eq!(protocol("west", PROTOCOL + 1), None);
        assert_eq!(protocol("west", PROTOCOL - 1), None);
        let told = protocol("west", PROTOCOL + 2).expect("too new");
        assert!(told.contains("version 3"), "{told}");
    }

    #[test]
    fn a_clock_is_wrong_if_it_is_whatever_the_way_took() {
        let slow = (at(0), at(30));
        for right in [at(-59), at(0), at(30), at(89)] {
            assert_eq!(clocks("west", right, slow), None, "{right}");
        }
        assert!(clocks("west", at(-61), slow).expect("late").contains("61 s behind"));
        assert!(clocks("west", at(100), slow).expect("early").contains("70 s ahead of"));
    }

    #[test]
    fn a_ca_that_has_ended_is_a_fault_and_one_that_ends_soon_a_warning() {
        let now = at(0);
        let found = |ends| certificates("west", ends, now);
        assert_eq!(found(Some(at(30 * 24 * 3600))), None);
        let Some(Finding::Warning(soon)) = found(Some(at(3 * 3600))) else { panic!("not warned") };
        assert!(soon.contains("3 h"), "{soon}");
        assert!(matches!(found(Some(at(-1))), Some(Finding::Fault(_))));
        assert!(matches!(found(None), Some(Finding::Fault(_))));
    }

    #[test]
    fn each_network_is_told_of_as_what_it_is() {
        let spec = json!({"networks": [
            {"name": "default", "pod": {}}, {"name": "lan", "multus": {"networkName": "br0"}},
        ]});
        let told = networks("west", &spec);
        assert!(told[0].starts_with("network default") && told[0].contains("another"), "{told:?}");
        assert!(told[1].starts_with("network lan") && told[1].contains("br0"), "{told:?}");
    }
}
