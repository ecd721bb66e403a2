//! `make hosts`: a VM with its disk moves from host A to host B and back, while
//! an oracle inside it looks for lost writes and lost memory.
//!
//! With `--inject FAULT` a fault is put into the first move; then the demo must fail.
//! N.B. a dropped write is found only if the oracle does not write that block again
//! before the check: it wrote the one at 40570880 with its write 71, and comes by again
//! with its write 8264, 40 seconds later.

use anyhow::{Context, Result, bail};
use e2e::guest;
use e2e::witness::Witness;
use e2e::world::{Host, World};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const VM: &str = "web";
const SOON: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo-hosts FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let inject = inject()?;
    let program = std::env::current_exe()?.with_file_name("godwit");
    let world = World::new(&program)?;
    let (a, b) = (world.host("a", 2)?, world.host("b", 3)?);
    println!("two hosts: a at {}, b at {}", a.address(), b.address());

    let disk = world.path("a/root.raw");
    guest::disk(&disk, 64)?;
    let _on_a = a.launch(VM, &guest::spec(VM, &disk, 64)?, &[])?;
    let faults: Vec<&str> = inject.iter().flat_map(|f| ["--inject", f.as_str()]).collect();
    let _on_b = b.receive(VM, &faults)?;
    let witness = Witness::new();
    let mut oracle = witness.listen(&a.folder(VM).join("oracle.sock"))?;
    witness.wait_ready(SOON)?;
    println!("the guest runs on a; its oracle writes its disk and counts in its memory");
    oracle.command("write start dev=/dev/vda offset=32M len=8M rate=200 seed=7", SOON)?;
    oracle.command("memory start mib=4 rate=2000", SOON)?;
    oracle.command("tick start us=1000", SOON)?;
    witness.wait_written(300, SOON)?;

    let there = hop(&world, &witness, &a, &b)?;
    println!("{}", there.line("a to b"));
    let to = world.path("a/root.raw").display().to_string();
    let back_to = format!("root={to}");
    let back = hop_with(&world, &witness, &b, &a, &["--disk", &back_to])?;
    println!("{}", back.line("b to a"));

    let mut oracle = witness.listen(&a.folder(VM).join("oracle.sock"))?;
    let sums = oracle.check()?;
    let lost = sums.lost + witness.losses().len() as u64;
    println!(
        "\n{} acknowledged writes, {} memory pages: {lost} lost writes, {} lost pages, disks verified",
        witness.written(),
        sums.pages,
        sums.stale,
    );
    if lost + sums.stale > 0 {
        bail!("the oracle found losses: {:?}", witness.losses());
    }
    Ok(())
}

fn inject() -> Result<Option<String>> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(None),
        (Some("--inject"), Some(fault)) => Ok(Some(fault)),
        _ => bail!(
            "usage: demo-hosts [--inject drop-writes@OFFSET|flip-byte@OFFSET|stale-page@NUMBER]"
        ),
    }
}

struct Hop {
    pause: Duration,
    took: Duration,
    sent: u64,
}

impl Hop {
    fn line(&self, way: &str) -> String {
        format!(
            "{way}: {:.1} s in all, the guest saw a pause of {} ms, {} left the gateway's socket\n",
            self.took.as_secs_f64(),
            self.pause.as_millis(),
            godwit::view::bytes(self.sent),
        )
    }
}

fn hop(world: &World, witness: &Witness, from: &Host, to: &Host) -> Result<Hop> {
    hop_with(world, witness, from, to, &[])
}

fn hop_with(
    world: &World,
    witness: &Witness,
    from: &Host,
    to: &Host,
    more: &[&str],
) -> Result<Hop> {
    let before = world.bytes(from)?.0;
    let begun = Instant::now();
    println!("\n$ godwit move {VM} --from {} --to {} {}", name(from), name(to), more.join(" "));
    let mut command = world.move_command(VM, from, to, more);
    let mut moving = command.spawn()?;
    // The target's serial port is there once it is prepared; the guest speaks there when it runs.
    let socket = to.folder(VM).join("oracle.sock");
    let line = listen(witness, &socket);
    let moved = moving.wait()?;
    let took = begun.elapsed();
    if !moved.success() {
        bail!("the move failed");
    }
    let _line = line?;
    witness.wait_alive(SOON).context("the guest does not tick after the move")?;
    let sent = world.bytes(from)?.0 - before;
    let pause = witness.longest_pause_since(begun);
    println!("$ godwit verify {VM} --from {} --to {}", name(from), name(to));
    let verified = world.verify(VM, from, to)?;
    print!("{}", verified.out);
    if !verified.status.success() {
        bail!("the disks differ: {}{}", verified.out, verified.err);
    }
    Ok(Hop { pause, took, sent })
}

fn listen(witness: &Witness, socket: &std::path::Path) -> Result<e2e::witness::Line> {
    let until = Instant::now() + SOON;
    loop {
        match witness.listen(socket) {
            Ok(line) => return Ok(line),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn name(host: &Host) -> String {
    host.dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
