//! Whether a guest boots on KVM here. A `/dev/kvm` that opens is no proof of it.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// A boot sector that ends QEMU with [`ENDED`]: `mov al, 0x10; out 0xf4, al; hlt`.
const PROGRAM: [u8; 5] = [0xb0, 0x10, 0xe6, 0xf4, 0xf4];
/// What `isa-debug-exit` makes of it: `(0x10 << 1) | 1`.
const ENDED: i32 = 33;
/// A guest that boots does so within this time.
const PATIENCE: Duration = Duration::from_secs(3);

/// Boots a guest of one sector.
pub async fn works() -> bool {
    let access = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    access.is_ok() && boots().await.unwrap_or(false)
}

async fn boots() -> std::io::Result<bool> {
    let mut sector = [0; 512];
    sector[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    // What firmware knows a boot sector by.
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let path = std::env::temp_dir().join(format!("godwit-kvm-{}", uuid::Uuid::new_v4()));
    std::fs::File::create_new(&path)?.write_all(&sector)?;
    let drive = format!("file={},format=raw,if=floppy,readonly=on", path.display());
    let ended = Command::new("qemu-system-x86_64")
        .args(["-accel", "kvm", "-machine", "pc", "-nodefaults", "-display", "none", "-m", "16"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-drive", &drive, "-boot", "a"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let ended = tokio::time::timeout(PATIENCE, ended).await;
    let _ = std::fs::remove_file(&path);
    Ok(matches!(ended, Ok(Ok(status)) if status.code() == Some(ENDED)))
}
