//! Seeds are what guests look for.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::Bench;
use images::{Error, seed};

/// The files on an ISO image, as another tool reads them.
fn read_back(image: &Path, folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let _ = std::fs::remove_dir_all(folder);
    let output = Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(image)
        .args(["-extract", "/"])
        .arg(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut files = BTreeMap::new();
    collect(folder, folder, &mut files);
    files
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
}

/// The label, which is at a fixed place of ISO 9660.
fn label(image: &Path) -> String {
    let bytes = std::fs::read(image).unwrap();
    String::from_utf8_lossy(&bytes[32768 + 40..][..32]).trim_end().to_owned()
}

fn tree(files: &[(&str, &[u8])]) -> BTreeMap<String, Vec<u8>> {
    files.iter().map(|(name, data)| ((*name).to_owned(), data.to_vec())).collect()
}

#[tokio::test]
async fn seeds_hold_what_was_given() {
    let bench = Bench::new();
    let (iso, folder) = (bench.path("seed.iso"), bench.path("back"));

    seed::nocloud(&iso, b"instance-id: a", b"#cloud-config", Some(b"version: 2")).await.unwrap();
    assert_eq!(label(&iso), "cidata");
    let expected: &[(&str, &[u8])] = &[
        ("meta-data", b"instance-id: a"),
        ("network-config", b"version: 2"),
        ("user-data", b"#cloud-config"),
    ];
    assert_eq!(read_back(&iso, &folder), tree(expected));

    seed::config_drive(&iso, b"{}", b"#!/bin/sh", None).await.unwrap();
    assert_eq!(label(&iso), "config-2");
    let expected: &[(&str, &[u8])] =
        &[("openstack/latest/meta_data.json", b"{}"), ("openstack/latest/user_data", b"#!/bin/sh")];
    assert_eq!(read_back(&iso, &folder), tree(expected));

    let long = format!("{}.Conf", "Long-name_".repeat(9));
    let files = tree(&[("tls.key", &[0, 255, 10]), (&long, b""), ("a/b/c=d", b"deep")]);
    seed::files(&iso, "secret", &files).await.unwrap();
    assert_eq!(label(&iso), "secret");
    assert_eq!(read_back(&iso, &folder), files);
    assert_eq!(images::detect(&iso).unwrap(), images::Format::Raw);
    assert!(!bench.path("seed.iso.seed").exists(), "the stage is gone");
}

#[tokio::test]
async fn names_that_lead_out_are_refused() {
    let bench = Bench::new();
    let long = "x".repeat(256);
    for name in ["../x", "a/../../x", "/etc/x", "", "a/", "./a", "a\0b", &long] {
        let error = seed::files(&bench.path("iso"), "x", &tree(&[(name, b"")])).await;
        assert!(matches!(error, Err(Error::SeedName { .. })), "{name:?}: {error:?}");
    }
    let large = vec![0; seed::MAX_BYTES as usize + 1];
    let error = seed::files(&bench.path("iso"), "x", &tree(&[("large", &large)])).await;
    assert!(matches!(error, Err(Error::TooManyBytes { .. })), "{error:?}");
    let error = seed::files(&bench.path("iso"), "-o /etc/x", &tree(&[("a", b"")])).await;
    assert!(matches!(error, Err(Error::SeedLabel { .. })), "{error:?}");
    assert!(!bench.path("iso").exists());
}
