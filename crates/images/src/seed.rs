//! Small disks that configure a guest: ISO 9660 with Joliet and Rock Ridge names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use tokio::process::Command;

use crate::Error;
use crate::work::{self, publish, unblock};

/// The most that the files of one seed may have together.
pub const MAX_BYTES: u64 = 64 << 20;

const MAX_NAME: usize = 255;
const MAX_LABEL: usize = 32;

/// Programs that build ISO images, with the arguments that make them do so.
const TOOLS: [(&str, &[&str]); 2] = [("xorriso", &["-as", "mkisofs"]), ("genisoimage", &[])];
const PACKAGE: &str = "xorriso (or genisoimage)";

/// Builds a disk for cloud-init's NoCloud source.
///
/// # Errors
///
/// See [`files`].
pub async fn nocloud(
    target: &Path,
    meta_data: &[u8],
    user_data: &[u8],
    network_data: Option<&[u8]>,
) -> Result<(), Error> {
    let mut tree = tree([("meta-data", meta_data), ("user-data", user_data)]);
    tree.extend(network_data.map(|data| ("network-config".to_owned(), data.to_vec())));
    files(target, "cidata", &tree).await
}

/// Builds a disk for cloud-init's ConfigDrive source, as OpenStack has it.
///
/// # Errors
///
/// See [`files`].
pub async fn config_drive(
    target: &Path,
    meta_data: &[u8],
    user_data: &[u8],
    network_data: Option<&[u8]>,
) -> Result<(), Error> {
    let mut tree = tree([
        ("openstack/latest/meta_data.json", meta_data),
        ("openstack/latest/user_data", user_data),
    ]);
    let network = "openstack/latest/network_data.json";
    tree.extend(network_data.map(|data| (network.to_owned(), data.to_vec())));
    files(target, "config-2", &tree).await
}

/// Builds a disk with the given label and files, such as those of a secret. Names may contain
/// `/` for folders. A target that exists is replaced once the new one is complete.
///
/// # Errors
///
/// Fails if a name is absolute, has `..` or is too long, if the files are too large together,
/// if the label is not one, or if neither `xorriso` nor `genisoimage` is there or works.
pub async fn files(
    target: &Path,
    label: &str,
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<(), Error> {
    check_label(label)?;
    check_size(files)?;
    for name in files.keys() {
        check_name(name)?;
    }
    let stage = Stage::new(target);
    let (root, tree) = (stage.root(), files.clone());
    unblock(move || lay(&root, &tree)).await?;
    build(&stage, label, target).await?;
    let (image, target) = (stage.image(), target.to_owned());
    unblock(move || {
        let file = File::open(&image).map_err(Error::io("open", &image))?;
        // It may hold secrets; the caller knows who else may read it.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(Error::io("protect", &image))?;
        publish(&file, &image, &target)
    })
    .await
}

fn tree<const N: usize>(files: [(&str, &[u8]); N]) -> BTreeMap<String, Vec<u8>> {
    files.into_iter().map(|(name, data)| (name.to_owned(), data.to_vec())).collect()
}

fn check_label(label: &str) -> Result<(), Error> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    match (1..=MAX_LABEL).contains(&label.len()) && label.bytes().all(known) {
        true => Ok(()),
        false => Err(Error::SeedLabel { label: label.to_owned() }),
    }
}

fn check_size(files: &BTreeMap<String, Vec<u8>>) -> Result<(), Error> {
    let size = files.values().map(|data| data.len() as u64).sum::<u64>();
    match size > MAX_BYTES {
        true => Err(Error::TooManyBytes { what: "the seed disk".to_owned(), limit: MAX_BYTES }),
        false => Ok(()),
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let plain =
        |part: Component<'_>| matches!(part, Component::Normal(part) if part.len() <= MAX_NAME);
    let whole = !name.is_empty() && !name.contains('\0') && !name.ends_with('/');
    match whole && Path::new(name).components().all(plain) {
        true => Ok(()),
        false => Err(Error::SeedName { name: name.to_owned() }),
    }
}

/// A folder beside the target in which it is built; it goes when this does.
struct Stage(PathBuf);

impl Stage {
    fn new(target: &Path) -> Self {
        let mut name = target.as_os_str().to_owned();
        name.push(".seed");
        Self(name.into())
    }

    fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    fn image(&self) -> PathBuf {
        self.0.join("image.iso")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The next seed with this name removes what stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Lays the files out as the guest will see them: all of the same age, so that the same files make the
/// same disk wherever a guest goes that has it mounted.
fn lay(root: &Path, tree: &BTreeMap<String, Vec<u8>>) -> Result<(), Error> {
    let stage = root.parent().unwrap_or(root);
    match fs::remove_dir_all(stage) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(Error::io("remove", stage)(error));
        }
        _ => {}
    }
    for folder in [stage, root] {
        DirBuilder::new().mode(0o700).create(folder).map_err(Error::io("create", folder))?;
    }
    let mut made = BTreeSet::from([root.to_owned()]);
    for (name, data) in tree {
        let path = root.join(name);
        let folder = path.parent().unwrap_or(root);
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        work::create(&path)?.write_all(data).map_err(Error::io("write", &path))?;
        made.extend(path.ancestors().take_while(|part| part.starts_with(root)).map(Path::to_owned));
    }
    for part in made {
        let file = File::open(&part).map_err(Error::io("open", &part))?;
        file.set_modified(SystemTime::UNIX_EPOCH).map_err(Error::io("date", &part))?;
    }
    Ok(())
}

async fn build(stage: &Stage, label: &str, target: &Path) -> Result<(), Error> {
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    for (program, words) in TOOLS {
        let output = Command::new(program)
            .args(words)
            .args([
                "-quiet",
                "-joliet",
                "-joliet-long",
                "-rational-rock",
                "-volid",
                label,
                "-output",
            ])
            .args([absolute(stage.image()), absolute(stage.root())])
            .env("SOURCE_DATE_EPOCH", "0")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await;
        let output = match output {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            output => output.map_err(|source| tool(program, source))?,
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let path = target.to_owned();
        return Err(Error::ToolFailed { program, path, status: output.status, said });
    }
    Err(tool("xorriso or genisoimage", ErrorKind::NotFound.into()))
}

fn tool(program: &str, source: std::io::Error) -> Error {
    Error::Tool { program: program.to_owned(), package: PACKAGE, source }
}
