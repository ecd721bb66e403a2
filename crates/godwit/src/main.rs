//! The `godwit` binary.

fn main() -> std::process::ExitCode {
    godwit::main()
}
