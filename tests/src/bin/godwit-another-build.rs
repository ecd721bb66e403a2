//! The same program, linked anew: another build of it, for tests in which a cluster comes back with one.

fn main() -> std::process::ExitCode {
    godwit::main()
}
