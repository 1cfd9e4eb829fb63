//! What the files of proc(5) and sysfs say about this host. Each function takes the root
//! directory, so that a test can pass another one.

use std::fs::File;
use std::path::Path;

use serde::Serialize;

fn read(root: &Path, path: &str) -> Option<String> {
    let text = std::fs::read_to_string(root.join(path)).ok()?;
    Some(text.trim().to_owned())
}

fn number(root: &Path, path: &str) -> Option<u64> {
    read(root, path)?.parse().ok()
}

/// The processor and how KVM runs guests on it.
#[derive(Debug, Serialize)]
pub struct HostCpu {
    /// The model name of /proc/cpuinfo.
    pub model: String,
    /// Number of logical CPUs.
    pub count: usize,
    /// `vmx`, `svm`, `pvm` (KVM-PVM, which needs neither of them), or `none`.
    pub virtualisation: &'static str,
    /// This host is itself a guest.
    pub is_guest: bool,
    /// The modules of KVM that are loaded or built in.
    pub modules: Vec<&'static str>,
}

impl HostCpu {
    pub fn read(root: &Path) -> Self {
        let info = read(root, "proc/cpuinfo").unwrap_or_default();
        let values = |key: &'static str| {
            info.lines().filter_map(move |line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == key).then(|| value.trim())
            })
        };
        let flags: Vec<&str> = values("flags")
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let module = |name: &&&'static str| root.join("sys/module").join(name).is_dir();
        let modules: Vec<&'static str> = ["kvm", "kvm_intel", "kvm_amd", "kvm_pvm"]
            .iter()
            .filter(module)
            .copied()
            .collect();
        let virtualisation = if flags.contains(&"vmx") {
            "vmx"
        } else if flags.contains(&"svm") {
            "svm"
        } else if modules.contains(&"kvm_pvm") {
            "pvm"
        } else {
            "none"
        };
        HostCpu {
            model: values("model name").next().unwrap_or_default().to_owned(),
            count: values("processor").count(),
            virtualisation,
            is_guest: flags.contains(&"hypervisor"),
            modules,
        }
    }
}

/// Memory, in bytes.
#[derive(Debug, Serialize)]
pub struct HostMemory {
    pub total: u64,
    pub available: u64,
    pub huge_pages: Vec<HugePagePool>,
    /// Transparent huge pages for anonymous memory: always, madvise or never.
    pub transparent_huge_pages: Option<String>,
    /// The same for shared memory such as guest RAM: `hugepages=thp` needs always,
    /// within_size or advise.
    pub transparent_huge_pages_shared: Option<String>,
}

/// A pool of huge pages.
#[derive(Debug, Serialize)]
pub struct HugePagePool {
    pub size: u64,
    pub total: u64,
    pub free: u64,
}

impl HostMemory {
    pub fn read(root: &Path) -> Self {
        let info = read(root, "proc/meminfo").unwrap_or_default();
        let bytes = |key: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(key));
            let kibibytes = line.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
            kibibytes.map_or(0, |value: u64| value * 1024)
        };
        let pools = [2048, 1_048_576].into_iter().filter_map(|kibibytes: u64| {
            let pool = format!("sys/kernel/mm/hugepages/hugepages-{kibibytes}kB");
            Some(HugePagePool {
                size: kibibytes * 1024,
                total: number(root, &format!("{pool}/nr_hugepages"))?,
                free: number(root, &format!("{pool}/free_hugepages"))?,
            })
        });
        let selected = |file: &str| {
            let text = read(root, &format!("sys/kernel/mm/transparent_hugepage/{file}"))?;
            let (_, rest) = text.split_once('[')?;
            Some(rest.split_once(']')?.0.to_owned())
        };
        HostMemory {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
            huge_pages: pools.collect(),
            transparent_huge_pages: selected("enabled"),
            transparent_huge_pages_shared: selected("shmem_enabled"),
        }
    }
}

/// What device processes need to confine themselves and to reach networks.
#[derive(Debug, Serialize)]
pub struct SandboxSupport {
    /// This user may create user namespaces, as far as the settings show.
    pub user_namespaces: bool,
    pub max_user_namespaces: Option<u64>,
    /// Debian's setting: 0 forbids them to unprivileged users.
    pub unprivileged_userns_clone: Option<u64>,
    /// Ubuntu's setting: 1 removes most rights in those of unprivileged users.
    pub apparmor_restrict_unprivileged_userns: Option<u64>,
    /// 0: no Landlock.
    pub landlock_abi: u32,
    /// seccomp filters can kill a process.
    pub seccomp: bool,
    /// Why /dev/net/tun cannot be opened; `null` if it can.
    pub tun_error: Option<String>,
}

impl SandboxSupport {
    pub fn read(root: &Path) -> Self {
        let sysctl = |name: &str| number(root, &format!("proc/sys/{name}"));
        let max = sysctl("user/max_user_namespaces");
        let clone = sysctl("kernel/unprivileged_userns_clone");
        let apparmor = sysctl("kernel/apparmor_restrict_unprivileged_userns");
        let allowed = rustix::process::geteuid().is_root()
            || (clone != Some(0) && apparmor.is_none_or(|value| value == 0));
        let actions = read(root, "proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
        let tun = File::options()
            .read(true)
            .write(true)
            .open(root.join("dev/net/tun"));
        SandboxSupport {
            user_namespaces: max.is_some_and(|max| max > 0) && allowed,
            max_user_namespaces: max,
            unprivileged_userns_clone: clone,
            apparmor_restrict_unprivileged_userns: apparmor,
            landlock_abi: landlock_abi(),
            seccomp: actions.split_whitespace().any(|a| a == "kill_process"),
            tun_error: tun.err().map(|e| e.to_string()),
        }
    }
}

/// LANDLOCK_CREATE_RULESET_VERSION of linux/landlock.h.
const VERSION_QUERY: libc::c_uint = 1;

/// landlock_create_ruleset(2) returns the ABI version if it is called with this flag.
fn landlock_abi() -> u32 {
    let no_attributes = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call reads no memory and creates no descriptor.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            no_attributes,
            0,
            VERSION_QUERY,
        )
    };
    u32::try_from(abi).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn the_kind_of_virtualisation_is_detected() {
        for (flags, module, expected) in [
            ("fpu vmx sse", "kvm_intel", "vmx"),
            ("fpu svm", "kvm_amd", "svm"),
            ("fpu hypervisor", "kvm_pvm", "pvm"),
            ("fpu hypervisor", "loop", "none"),
        ] {
            let info = format!(
                "processor\t: 0\nmodel name\t: A: B\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n"
            );
            let parameter = format!("sys/module/{module}/parameters/x");
            let root = host(&[("proc/cpuinfo", &info), (&parameter, "")]);
            let cpu = HostCpu::read(root.path());
            assert_eq!((cpu.virtualisation, cpu.count), (expected, 2));
            assert_eq!(cpu.is_guest, flags.contains("hypervisor"));
            assert_eq!(cpu.model, "A: B");
        }
    }

    #[test]
    fn memory_and_huge_pages_are_read() {
        let pool = "sys/kernel/mm/hugepages/hugepages-2048kB";
        let thp = "sys/kernel/mm/transparent_hugepage";
        let root = host(&[
            (
                "proc/meminfo",
                "MemTotal:  1000 kB\nMemAvailable:   500 kB\n",
            ),
            (&format!("{pool}/nr_hugepages"), "64\n"),
            (&format!("{pool}/free_hugepages"), "32\n"),
            (&format!("{thp}/enabled"), "always [madvise] never\n"),
        ]);
        let memory = HostMemory::read(root.path());
        assert_eq!((memory.total, memory.available), (1_024_000, 512_000));
        let pools: Vec<_> = memory
            .huge_pages
            .iter()
            .map(|p| (p.size, p.total, p.free))
            .collect();
        assert_eq!(pools, [(2 << 20, 64, 32)]);
        assert_eq!(memory.transparent_huge_pages.as_deref(), Some("madvise"));
        assert_eq!(memory.transparent_huge_pages_shared, None);
    }

    #[test]
    fn sandbox_support_is_read() {
        let root = host(&[
            ("proc/sys/user/max_user_namespaces", "0"),
            (
                "proc/sys/kernel/seccomp/actions_avail",
                "kill_process trap allow",
            ),
        ]);
        let sandbox = SandboxSupport::read(root.path());
        assert!(sandbox.seccomp && !sandbox.user_namespaces);
        assert!(sandbox.tun_error.unwrap().contains("No such file"));
    }
}
