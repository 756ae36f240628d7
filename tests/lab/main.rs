//! The lab.
use std::process::ExitCode;
fn main() -> ExitCode {
    if let Some(code) = mesh_tests::internal::dispatch() {
        return code;
    }
    ExitCode::SUCCESS
}
