//! The report as text.

use super::HostReport;

const MIB: u64 = 1 << 20;

/// Renders `report`, one line for each fact.
pub(super) fn render(report: &HostReport) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, text: String| lines.push(format!("{name:<14}{text}"));
    let yes = |yes: bool| if yes { "yes" } else { "no" };

    line("runs guests", yes(report.runs_guests).into());
    if let Some(problem) = &report.problem {
        line("problem", problem.what.clone());
        line("remedy", problem.remedy.clone());
    }
    let cpu = &report.cpu;
    let kind = match cpu.virtualisation {
        "vmx" => "VT-x (vmx)",
        "svm" => "AMD-V (svm)",
        "pvm" => "neither vmx nor svm, but KVM-PVM: guest kernel code is emulated, and slow",
        _ => "neither vmx nor svm",
    };
    line("cpu", format!("{} x {}", cpu.count, cpu.model));
    line("", kind.into());
    if cpu.is_guest {
        line("", "this host is itself a guest".into());
    }
    line("modules", list(&cpu.modules));
    match &report.kvm {
        None => line("/dev/kvm", "cannot be opened".into()),
        Some(kvm) => {
            line("/dev/kvm", format!("API version {}", kvm.api_version));
            line(
                "vCPUs",
                format!(
                    "{} recommended, at most {}, highest id {}",
                    kvm.recommended_vcpus, kvm.max_vcpus, kvm.max_vcpu_id
                ),
            );
            for capability in &kvm.capabilities {
                let state = match (capability.value, capability.needed) {
                    (0, true) => "MISSING",
                    (0, false) => "absent",
                    _ => "there",
                };
                line(
                    state,
                    format!("{}: {}", capability.name, capability.purpose),
                );
            }
        }
    }
    let memory = &report.memory;
    let (available, total) = (memory.available / MIB, memory.total / MIB);
    line("memory", format!("{available} of {total} MiB available"));
    for pool in &memory.huge_pages {
        let size = pool.size / MIB;
        line(
            "huge pages",
            format!("{size} MiB: {} of {} free", pool.free, pool.total),
        );
    }
    let setting = |value: &Option<String>| value.clone().unwrap_or("unknown".into());
    line(
        "transparent",
        format!(
            "{}, for shared memory {}",
            setting(&memory.transparent_huge_pages),
            setting(&memory.transparent_huge_pages_shared)
        ),
    );
    let sandbox = &report.sandbox;
    line("user ns", yes(sandbox.user_namespaces).into());
    let landlock = match sandbox.landlock_abi {
        0 => "no".into(),
        abi => format!("ABI {abi}"),
    };
    line("landlock", landlock);
    line("seccomp", yes(sandbox.seccomp).into());
    let tun = sandbox.tun_error.as_deref().unwrap_or("yes");
    line("/dev/net/tun", tun.into());
    lines.join("\n") + "\n"
}

fn list(words: &[&str]) -> String {
    match words {
        [] => "none".into(),
        words => words.join(" "),
    }
}
