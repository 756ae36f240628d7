//! What this machine lacks, said before anything fails for want of it.

use crate::netns::Netns;
use nix::sys::utsname::uname;
use socket2::{Domain, Socket, Type};
use std::{
    ffi::OsStr,
    fmt, io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::Path,
};

/// Something that is missing, and what to do about it.
#[derive(Debug)]
pub struct Lack {
    what: &'static str,
    remedy: &'static str,
    error: Option<io::Error>,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if let Some(error) = &self.error {
            write!(f, " ({error})")?;
        }
        write!(f, ": {}", self.remedy)
    }
}

/// Tries what serving pods needs, and what capturing them by eBPF needs besides.
#[must_use]
pub fn lacking(ebpf: bool) -> Vec<Lack> {
    let mut found = Vec::new();
    let mut lack = |what, remedy, outcome: io::Result<()>| {
        if let Err(error) = outcome {
            found.push(Lack { what, remedy, error: Some(error) });
        }
    };
    lack(
        "network namespaces cannot be entered",
        "run as root with CAP_SYS_ADMIN, and with /proc mounted",
        enter_own(),
    );
    lack(
        "packets cannot be marked (SO_MARK)",
        "run as root with CAP_NET_ADMIN (on some kernels CAP_NET_RAW)",
        mark(),
    );
    if ebpf {
        lack(
            "the kernel is too old for capture by eBPF",
            "use 5.15 or newer, or CAPTURE=external",
            uname().map_err(io::Error::from).and_then(|name| release(name.release())),
        );
        lack(
            "eBPF programs cannot be loaded",
            "run as root with CAP_SYS_ADMIN (or CAP_BPF) on a kernel with CONFIG_BPF_SYSCALL",
            bpf(),
        );
        lack(
            "rules and routes cannot be written in pods",
            "run as root with CAP_NET_ADMIN",
            net_admin(),
        );
        if !Path::new("/sys/kernel/btf/vmlinux").exists() {
            found.push(Lack {
                what: "the kernel has no BTF (/sys/kernel/btf/vmlinux)",
                remedy: "use a kernel of 5.15 or newer with CONFIG_DEBUG_INFO_BTF, or CAPTURE=external",
                error: None,
            });
        }
    }
    found
}

/// `sk_lookup` is of 5.9, setting a mark from an iterator over sockets of 5.15.
fn release(release: &OsStr) -> io::Result<()> {
    let text = release.to_string_lossy();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    // What cannot be read is left to the attempts that follow.
    if ((1, 0)..(5, 15)).contains(&version) {
        return Err(io::Error::other(format!("this is {text}")));
    }
    Ok(())
}

/// Not by an attempt: one that has the capability would change something.
fn net_admin() -> io::Result<()> {
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    // Where it is not told, the first pod will.
    if effective.is_some_and(|set| set & (1 << CAP_NET_ADMIN) == 0) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(())
}

fn enter_own() -> io::Result<()> {
    let own = Netns::current()?;
    // Not from within, which would be no attempt at all.
    nix::sched::setns(own.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

fn mark() -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::STREAM, None)?.set_mark(mesh_ebpf_common::MARK)
}

/// An array of one number is the least that can be asked for.
#[expect(unsafe_code, reason = "bpf(2) has no wrapper that takes so little")]
fn bpf() -> io::Result<()> {
    const MAP_CREATE: libc::c_int = 0;
    const ARRAY: u32 = 2;
    // map_type, key_size, value_size, max_entries.
    let mut attributes: [u32; 4] = [ARRAY, 4, 4, 1];
    // SAFETY: the kernel reads as many bytes as it is told, which are there, and makes a descriptor.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, MAP_CREATE, attributes.as_mut_ptr(), size_of_val(&attributes))
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_their_release() {
        for (text, is_enough) in [
            ("6.18.44", true),
            ("5.15.0-91-generic", true),
            ("10.0", true),
            ("5.14.21", false),
            ("5.4.0", false),
            ("2.6.78+", false),
            ("", true),
            ("strange", true),
        ] {
            assert_eq!(release(OsStr::new(text)).is_ok(), is_enough, "{text}");
        }
    }
}
