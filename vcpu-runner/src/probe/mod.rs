//! `--probe` reports what this host offers to guests and to the sandbox, and what to do if
//! guests cannot run here. `host` reads the files of proc(5) and sysfs. docs/probe.md
//! documents the report.

mod host;
mod text;

use std::path::Path;

use kvm_ioctls::Kvm;
use outrigger_cli::report_error;
use outrigger_protocol::exit;
use serde::Serialize;

use crate::Error;
use crate::error::kvm_open_remedy;
use crate::options::ProbeFormat;
use crate::vm::capabilities::{
    DEVICE, KvmCapability, OPTIONAL_CAPABILITIES, REQUIRED_CAPABILITIES,
};

/// The report; in JSON, one object with these keys.
#[derive(Debug, Serialize)]
pub struct HostReport {
    /// Whether the runner can run guests here.
    runs_guests: bool,
    /// Why not, and what to do.
    problem: Option<Problem>,
    cpu: host::HostCpu,
    kvm: Option<KvmReport>,
    memory: host::HostMemory,
    sandbox: host::SandboxSupport,
}

/// Why guests cannot run here.
#[derive(Debug, Serialize)]
struct Problem {
    what: String,
    remedy: String,
}

/// What an open /dev/kvm reports.
#[derive(Debug, Serialize)]
struct KvmReport {
    api_version: i32,
    recommended_vcpus: usize,
    max_vcpus: usize,
    max_vcpu_id: usize,
    capabilities: Vec<CapabilityReport>,
}

#[derive(Debug, Serialize)]
struct CapabilityReport {
    name: &'static str,
    /// Guests cannot run without it.
    needed: bool,
    /// The value of KVM_CHECK_EXTENSION; 0: absent.
    value: i32,
    purpose: &'static str,
}

impl HostReport {
    /// Collects the report.
    fn gather() -> Self {
        let opened = Kvm::new().map_err(|e| std::io::Error::from_raw_os_error(e.errno()));
        let opened = opened.map_err(Error::KvmOpen);
        let checked = match &opened {
            Ok(kvm) => crate::vm::capabilities::check(kvm).err(),
            Err(_) => None,
        };
        let problem = opened.as_ref().err().or(checked.as_ref()).map(problem);
        HostReport {
            runs_guests: problem.is_none(),
            problem,
            cpu: host::HostCpu::read(Path::new("/")),
            kvm: opened.ok().map(|kvm| KvmReport::read(&kvm)),
            memory: host::HostMemory::read(Path::new("/")),
            sandbox: host::SandboxSupport::read(Path::new("/")),
        }
    }
}

fn problem(error: &Error) -> Problem {
    let (what, remedy) = match error {
        Error::KvmOpen(e) => (format!("{DEVICE}: {e}"), kvm_open_remedy(e).to_owned()),
        Error::KvmVersion(_) => (
            error.to_string(),
            "use a kernel from 2007 or later; or another driver provides /dev/kvm".to_owned(),
        ),
        other => (
            other.to_string(),
            "use a newer kernel, or one that is built with this capability".to_owned(),
        ),
    };
    Problem { what, remedy }
}

impl KvmReport {
    fn read(kvm: &Kvm) -> Self {
        let capability = |needed: bool| {
            move |capability: &KvmCapability| CapabilityReport {
                name: capability.name,
                needed,
                value: kvm.check_extension_int(capability.cap),
                purpose: capability.why,
            }
        };
        let required = REQUIRED_CAPABILITIES.iter().map(capability(true));
        let optional = OPTIONAL_CAPABILITIES.iter().map(capability(false));
        KvmReport {
            api_version: kvm.get_api_version(),
            recommended_vcpus: kvm.get_nr_vcpus(),
            max_vcpus: kvm.get_max_vcpus(),
            max_vcpu_id: kvm.get_max_vcpu_id(),
            capabilities: required.chain(optional).collect(),
        }
    }
}

/// Prints the report to standard output; returns the exit code.
pub fn run(format: ProbeFormat) -> u8 {
    use std::io::Write as _;
    let report = HostReport::gather();
    let text = match format {
        ProbeFormat::Text => text::render(&report),
        ProbeFormat::Json => serde_json::to_string(&report).unwrap_or_default() + "\n",
    };
    if let Err(error) = std::io::stdout().lock().write_all(text.as_bytes()) {
        report_error("vcpu-runner", format!("--probe: standard output: {error}"));
        return exit::FAILURE;
    }
    match &report.problem {
        None => exit::POWERED_OFF,
        Some(problem) => {
            report_error(
                "vcpu-runner",
                format!("{}; {}", problem.what, problem.remedy),
            );
            exit::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_has_a_remedy() {
        let need = &REQUIRED_CAPABILITIES[0];
        let missing = Error::KvmCapability {
            name: need.name,
            why: need.why,
        };
        let open = |errno| Error::KvmOpen(std::io::Error::from_raw_os_error(errno));
        for (error, what, remedy) in [
            (open(libc::ENOENT), "No such file", "module"),
            (open(libc::EACCES), "Permission denied", "group"),
            (open(libc::ENODEV), "No such device", "kernel's log"),
            (Error::KvmVersion(11), "version 11", "kernel"),
            (missing, need.name, "newer kernel"),
        ] {
            let problem = problem(&error);
            assert!(problem.what.contains(what), "{problem:?}");
            assert!(problem.remedy.contains(remedy), "{problem:?}");
        }
    }

    #[test]
    fn the_text_names_a_missing_capability() {
        let mut report = HostReport::gather();
        report.kvm = Some(KvmReport {
            api_version: 12,
            recommended_vcpus: 1,
            max_vcpus: 2,
            max_vcpu_id: 3,
            capabilities: vec![CapabilityReport {
                name: "KVM_CAP_X",
                needed: true,
                value: 0,
                purpose: "this and that",
            }],
        });
        let text = text::render(&report);
        let line = "MISSING       KVM_CAP_X: this and that";
        assert!(text.lines().any(|l| l == line), "{text}");
    }
}
