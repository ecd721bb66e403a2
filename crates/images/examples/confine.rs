//! A shim: runs the command of its arguments with bounds. See `images::confine`.

fn main() -> std::process::ExitCode {
    let error = images::confine(std::env::args_os().skip(1));
    eprintln!("cannot run the confined command: {error}");
    std::process::ExitCode::from(127)
}
