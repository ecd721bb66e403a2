//! The very binary, where cargo lets the end-to-end tests find it.

fn main() -> std::process::ExitCode {
    godwit::main()
}
