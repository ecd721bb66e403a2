//! A folder of files that changes as a whole, as the kubelet's atomic writer makes it.
//!
//! ```text
//! VOLUME/..1764273721/NAME     the files
//!        ..data -> ..1764273721
//!        NAME -> ..data/NAME
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path};

/// Files by their relative path: what they hold, and their mode.
pub type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// Whether a path leads to below where it begins.
pub fn stays_below(path: &str) -> bool {
    let path = Path::new(path);
    path.components().next().is_some()
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// Makes a folder hold these files and no others. One that does is let be.
///
/// # Errors
/// When it cannot be written, or a path leads out of it.
pub fn write(folder: &Path, files: &Files) -> io::Result<()> {
    if let Some(path) = files.keys().find(|path| !stays_below(path) || path.starts_with("..")) {
        let text = format!("{path:?} is no path inside a volume");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    fs::create_dir_all(folder)?;
    let data = folder.join("..data");
    let before = fs::read_link(&data).ok();
    if before.is_some() && holds(&data, files) {
        return Ok(());
    }
    let version = format!("..{}", jiff::Timestamp::now().as_nanosecond());
    let fresh = folder.join(&version);
    fs::create_dir(&fresh)?;
    for (path, (bytes, mode)) in files {
        let file = fresh.join(path);
        fs::create_dir_all(file.parent().unwrap_or(&fresh))?;
        let mut options = fs::OpenOptions::new();
        let mut opened = options.write(true).create_new(true).mode(0o600).open(&file)?;
        io::Write::write_all(&mut opened, bytes)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode & 0o777))?;
    }
    let draft = folder.join("..data_tmp");
    let _ = fs::remove_file(&draft);
    symlink(&version, &draft)?;
    fs::rename(&draft, &data)?;
    link(folder, files)?;
    if let Some(before) = before {
        fs::remove_dir_all(folder.join(before))?;
    }
    Ok(())
}

fn holds(data: &Path, files: &Files) -> bool {
    let same = |(path, (bytes, _)): (&String, &(Vec<u8>, u32))| {
        fs::read(data.join(path)).is_ok_and(|found| found == *bytes)
    };
    files.iter().all(same) && count(data) == files.len()
}

fn count(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
}

/// Makes what is seen of the folder lead to its data.
fn link(folder: &Path, files: &Files) -> io::Result<()> {
    let names: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &names {
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), &link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let stale = name.to_str().is_some_and(|n| !n.starts_with("..") && !names.contains(n));
        if stale {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
