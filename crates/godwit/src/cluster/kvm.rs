//! Whether guests run on KVM here. A `/dev/kvm` that opens is no proof of it, nor is one on which a
//! boot sector runs: where KVM is itself emulated, that takes ten times as long as under QEMU's own
//! emulation, and an operating system does not come up at all.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// A boot sector that ends QEMU with [`ENDED`]: `mov al, 0x10; out 0xf4, al; hlt`.
const PROGRAM: [u8; 5] = [0xb0, 0x10, 0xe6, 0xf4, 0xf4];
/// What `isa-debug-exit` makes of it: `(0x10 << 1) | 1`.
const ENDED: i32 = 33;
/// A boot sector ends within this time under emulation, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);
/// KVM that takes longer than emulation, by more than what is chance, is none.
const SLOWER: u32 = 2;

/// Boots a guest of one sector by emulation and on KVM, one after the other.
pub async fn works() -> bool {
    let access = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if access.is_err() {
        return false;
    }
    let Ok(Some(emulated)) = boots("tcg", PATIENCE).await else { return false };
    matches!(boots("kvm", emulated * SLOWER).await, Ok(Some(_)))
}

/// How long a guest took from QEMU's start to its own end; None: longer than it may.
async fn boots(accelerator: &str, patience: Duration) -> std::io::Result<Option<Duration>> {
    let mut sector = [0; 512];
    sector[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    // What firmware knows a boot sector by.
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let path = std::env::temp_dir().join(format!("godwit-kvm-{}", uuid::Uuid::new_v4()));
    std::fs::File::create_new(&path)?.write_all(&sector)?;
    let drive = format!("file={},format=raw,if=floppy,readonly=on", path.display());
    let began = Instant::now();
    let ended = Command::new("qemu-system-x86_64")
        .args(["-accel", accelerator, "-machine", "pc", "-nodefaults", "-display", "none"])
        .args(["-m", "16", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .args(["-drive", &drive, "-boot", "a"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let ended = tokio::time::timeout(patience, ended).await;
    let _ = std::fs::remove_file(&path);
    let took = began.elapsed();
    Ok(matches!(ended, Ok(Ok(status)) if status.code() == Some(ENDED)).then_some(took))
}
