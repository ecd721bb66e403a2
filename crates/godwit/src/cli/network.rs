//! Networks, as they are named on the command line.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A network in which each node of an embedded cluster has an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Its name, by which the cluster's settings mean it.
    pub name: String,
    range: Ipv4Addr,
    prefix: u8,
}

impl Network {
    /// The synchronizer's address: no node's, of which there are fewer.
    pub fn synchronizer(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.range.to_bits() | 254)
    }

    /// The address of a node, by its number from 1 on.
    pub fn address(&self, node: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.range.to_bits() | u32::from(node))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}/{}", self.name, self.range, self.prefix)
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("'{text}' is not NAME=RANGE, like moves=127.80.0.0/24");
        let (name, range) = text.split_once('=').ok_or_else(wrong)?;
        let (range, prefix) = range.split_once('/').ok_or_else(wrong)?;
        let range: Ipv4Addr = range.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        if name.is_empty() || !(8..=24).contains(&prefix) {
            return Err(format!("{}: a range has 256 addresses or more, /8 to /24", wrong()));
        }
        let rest = u32::MAX >> prefix;
        if !range.is_loopback() || range.to_bits() & rest != 0 {
            return Err(format!(
                "{range}/{prefix} is no range of this machine alone: take one in 127.0.0.0/8"
            ));
        }
        Ok(Self { name: name.into(), range, prefix })
    }
}

/// What is said by an option in pairs, by its first halves.
///
/// # Errors
/// What is no pair.
pub fn pairs(said: &[String], option: &str, form: &str) -> Result<BTreeMap<String, String>> {
    let one = |text: &String| {
        let (name, value) = text.split_once('=').filter(|(a, b)| !a.is_empty() && !b.is_empty())?;
        Some((name.to_owned(), value.to_owned()))
    };
    let all =
        said.iter().map(|text| one(text).with_context(|| format!("{option} {text} is not {form}")));
    all.collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn each_node_has_an_address_of_its_own_and_what_is_no_range_is_refused() {
        let network: Network = "moves=127.80.0.0/16".parse().unwrap();
        assert_eq!(network.address(1), Ipv4Addr::new(127, 80, 0, 1));
        assert_eq!(network.address(255), Ipv4Addr::new(127, 80, 0, 255));
        assert_eq!(network.to_string().parse(), Ok(network));
        for wrong in [
            "",
            "a",
            "a=127.0.0.0",
            "=127.0.0.0/24",
            "a=127.0.0.1/24",
            "a=10.0.0.0/24",
            "a=127.0.0.0/30",
        ] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
