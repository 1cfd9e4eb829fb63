//! The program `outrigger`. Its code is in the library, which the manual also uses.

fn main() -> std::process::ExitCode {
    outrigger::main()
}
