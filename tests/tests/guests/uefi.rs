//! A guest with UEFI firmware, whose variables move as a small disk.

use crate::PROGRAM;
use anyhow::Result;
use e2e::world::{Host, World};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const VM: &str = "efi";
/// Of Debian's and Ubuntu's package `ovmf`.
const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// The firmware looks for something to boot for half a minute under TCG, longer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// The firmware's shell, on the first serial port.
struct Shell(UnixStream);

impl Shell {
    /// Waits until it can be typed to.
    fn open(host: &Host) -> Result<Self> {
        let stream = UnixStream::connect(host.folder(VM).join("console.sock"))?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut shell = Self(stream);
        shell.hear(b"Shell>");
        Ok(shell)
    }

    /// Carries out one command; returns all that was said.
    fn run(&mut self, command: &str) -> Result<String> {
        self.0.write_all(command.as_bytes())?;
        self.0.write_all(b"\r")?;
        Ok(String::from_utf8_lossy(&self.hear(b"Shell>")).into_owned())
    }

    fn hear(&mut self, text: &[u8]) -> Vec<u8> {
        let until = Instant::now() + PATIENCE;
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        while !heard.windows(text.len()).any(|window| window == text) {
            let said = String::from_utf8_lossy(&heard);
            assert!(Instant::now() < until, "only this was said: {said}");
            match self.0.read(&mut buffer) {
                Ok(0) => panic!("the port was closed after: {said}"),
                Ok(n) => heard.extend_from_slice(&buffer[..n]),
                // Nothing was said for a while.
                Err(_) => {}
            }
        }
        heard
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        self.run(&format!("setvar {name} -guid {GUID} -nv -bs ={value}")).map(drop)
    }

    fn shows(&mut self, name: &str, value: &str) -> Result<()> {
        let said = self.run(&format!("setvar {name} -guid {GUID}"))?;
        // N.B. what is typed is echoed, with the cursor moved between: only the answer is whole.
        assert!(said.contains("0001 Bytes") && said.contains(value), "{said}");
        Ok(())
    }
}

const GUID: &str = "11111111-2222-3333-4444-555555555555";

#[test]
fn what_the_firmware_keeps_is_there_after_a_move_and_a_restart() -> Result<()> {
    assert!(Path::new(CODE).exists(), "there is no {CODE}; run `make setup`");
    let world = World::new(Path::new(PROGRAM))?;
    let (a, b) = (world.host("a", 2)?, world.host("b", 3)?);
    let variables = world.path("a/vars.fd");
    std::fs::copy(VARIABLES, &variables)?;
    let spec = |path: &Path| {
        serde_json::json!({
            "name": VM, "memoryMiB": 128, "accelerator": "tcg", "machine": "q35",
            "uefi": {"code": CODE},
            "disks": [{"name": "vars", "path": path, "bus": "flash"}],
        })
        .to_string()
    };
    let _on_a = a.launch(VM, &spec(&variables), &[])?;
    let on_b = b.receive(VM, &[])?;
    world.wait_running(&a, VM)?;
    Shell::open(&a)?.set("source", "0x2a")?;

    let ended = world.move_vm(VM, &a, &b, &[])?;
    assert!(ended.status.success(), "{}", ended.err);
    world.wait_running(&b, VM)?;
    let verified = world.verify(VM, &a, &b)?;
    assert!(verified.status.success(), "{verified:?}");
    // Its prompt was said before it came here.
    let mut shell = Shell(UnixStream::connect(b.folder(VM).join("console.sock"))?);
    shell.0.set_read_timeout(Some(Duration::from_millis(100)))?;
    shell.set("target", "0x2b")?;

    on_b.kill();
    let there = b.folder(VM).join("vars.raw");
    assert_eq!(std::fs::metadata(&there)?.len(), std::fs::metadata(VARIABLES)?.len());
    let _on_b = b.launch(VM, &spec(&there), &[])?;
    // N.B. the console of the launcher that was killed is still there for a moment.
    world.wait_running(&b, VM)?;
    let mut shell = Shell::open(&b)?;
    shell.shows("source", "2A")?;
    shell.shows("target", "2B")
}
