//! The `godwit` command: CLI, roles, wiring. It decides nothing.

pub mod cli;
mod cluster;
mod deploy;
mod ground;
mod host;
mod importing;
mod linking;
mod migrating;
mod moving;
mod preflight;
mod relocating;
mod rights;
mod roles;
mod serving;
mod trust;
mod uploading;
pub mod view;
mod vms;

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    // N.B. before any thread: the child that becomes QEMU must be of this very thread.
    if let cli::Command::Exec { parent, command } = &arguments.command {
        let error = launcher::qemu::shim(*parent, command);
        eprintln!("godwit: cannot run {}: {error}", command[0].display());
        return ExitCode::from(127);
    }
    if let cli::Command::Confine { command } = &arguments.command {
        let error = images::confine(command.iter().cloned());
        eprintln!("godwit: cannot run {}: {error}", command[0].display());
        return ExitCode::from(127);
    }
    if let cli::Command::PodProcess { folder, attempt } = &arguments.command {
        // It writes down itself how its container ends; who started it may be gone.
        return match node::supervise::supervise(folder, *attempt) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("godwit: {}", launcher::chain(&error));
                ExitCode::FAILURE
            }
        };
    }
    roles::log();
    #[expect(clippy::disallowed_methods, reason = "reqwest and oci-client take no other")]
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match &arguments.command {
        cli::Command::Up(_)
        | cli::Command::Api(_)
        | cli::Command::Controller(_)
        | cli::Command::Handler(_) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()
        }
        // One thread: QEMU dies with the thread that started it, and a launcher stays small.
        _ => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    };
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(cli::run(arguments.command));
            // A read of the terminal cannot be cancelled: it is not waited for.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            // It may have nowhere to say it: then the exit code has to do.
            let _ = writeln!(std::io::stderr(), "godwit: {}", launcher::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
