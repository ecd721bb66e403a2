//! Hosts, and what is asked of one launcher.

use crate::cli;
use crate::view::{self, Output};
use anyhow::{Context, Result};
use channel::identity::{Ca, Role, SpiffeId};
use launcher::client::Client;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Folder of a host's certificate, key and trust, in the host's folder.
pub const IDENTITY: &str = "identity";
/// Certificates of this stage are renewed by hand, with `godwit host`.
const VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);

/// The CA of a folder; made if there is none.
///
/// # Errors
/// When it cannot be used.
pub fn authority(folder: &Path, cluster: &str) -> Result<Ca> {
    match Ca::load(folder) {
        Ok(ca) => Ok(ca),
        Err(_) if !folder.exists() => {
            let ca = Ca::create(cluster)?;
            ca.save(folder)?;
            Ok(ca)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes a folder a host.
///
/// # Errors
/// When the CA or the folder cannot be used.
pub fn init(arguments: &cli::Host) -> Result<ExitCode> {
    let ca = authority(&arguments.ca, &arguments.cluster)?;
    let role = if arguments.synchronizer { Role::Synchronizer } else { Role::Handler };
    let id = SpiffeId::new(ca.cluster(), role, &arguments.name)?;
    let folder = arguments.dir.join(IDENTITY);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    ca.issue(&id, VALIDITY)?.save(&folder)?;
    std::fs::write(folder.join("trust.pem"), ca.certificate_pem())?;
    println!("{id}");
    Ok(ExitCode::SUCCESS)
}

/// The client of a VM's launcher.
///
/// # Errors
/// When the host's folder does not exist.
pub fn client(host: &Path, vm: &str) -> Result<Client> {
    let host = std::path::absolute(host)?;
    Ok(Client::new(&host, vm))
}

/// Shows what a VM does.
///
/// # Errors
/// When its launcher cannot be reached.
pub async fn status(host: &Path, vm: &str, output: Output) -> Result<ExitCode> {
    let status = client(host, vm)?.status().await?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Output::Text => {
            let reason = status.reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
            println!("{} is {}{reason}", status.vm, status.phase);
            if let Some(epoch) = status.epoch {
                println!("epoch {epoch}");
            }
            if let Some(migration) = &status.migration {
                println!("last move: {}", view::line(migration));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets a VM shut itself down.
///
/// # Errors
/// When its launcher cannot be reached or refuses.
pub async fn shutdown(arguments: &cli::Shutdown) -> Result<ExitCode> {
    let client = client(&arguments.host, &arguments.vm)?;
    client.shut_down(Duration::from_secs(arguments.grace)).await?;
    Ok(ExitCode::SUCCESS)
}

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Connects this terminal to a serial port.
///
/// # Errors
/// When its launcher cannot be reached.
pub async fn console(host: &Path, vm: &str, serial: &str) -> Result<ExitCode> {
    let folder = std::path::absolute(host)?.join("vms").join(vm);
    let name = format!("{serial}.sock");
    let stream = channel::socket::connect_beneath(&folder, &name).await?;
    let _raw = Raw::enter()?;
    let (mut from, mut to) = stream.into_split();
    let mut shown = tokio::io::stdout();
    let show = async {
        let mut buffer = vec![0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            shown.write_all(&buffer[..n]).await?;
            shown.flush().await?;
        }
        anyhow::Ok(())
    };
    let mut typed = tokio::io::stdin();
    let send = async {
        let mut buffer = vec![0; 1024];
        loop {
            let n = typed.read(&mut buffer).await?;
            let end = buffer[..n].iter().position(|b| *b == ESCAPE);
            to.write_all(&buffer[..end.unwrap_or(n)]).await?;
            if n == 0 || end.is_some() {
                return anyhow::Ok(());
            }
        }
    };
    tokio::select! { done = show => done?, done = send => done? }
    Ok(ExitCode::SUCCESS)
}

/// The terminal without line editing, until dropped.
pub struct Raw(Option<rustix::termios::Termios>);

impl Raw {
    /// Enters it, if it is a terminal.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = rustix::termios::tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let now = rustix::termios::OptionalActions::Now;
            // A terminal that is gone needs no mending.
            let _ = rustix::termios::tcsetattr(std::io::stdin(), now, before);
        }
    }
}
