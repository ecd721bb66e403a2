//! End-to-end tests with real guests: the world they live in.

pub mod bench;
pub mod chaos;
pub mod cluster;
pub mod detour;
pub mod guest;
pub mod media;
pub mod registry;
pub mod scene;
pub mod terminal;
pub mod vms;
pub mod witness;
pub mod world;

/// How a program of these tests ends: it says what went wrong.
pub fn exit(program: &str, outcome: anyhow::Result<()>) -> std::process::ExitCode {
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program} FAILED: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
