//! The kernel's accounts of a process.

use std::{fs, io, iter::Sum, ops::Sub, path::Path};

/// What a process has used since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor seconds in user mode and in the kernel on its behalf.
    pub cpu: f64,
    /// Context switches of all its living threads.
    pub switches: u64,
}

impl Usage {
    /// Of the process with this id.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut switches = 0;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
            switches += field(&status, "voluntary_ctxt_switches:")
                + field(&status, "nonvoluntary_ctxt_switches:");
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(Self { cpu: cpu(&stat), switches })
    }
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu - earlier.cpu,
            switches: self.switches.saturating_sub(earlier.switches),
        }
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |sum, part| Self {
            cpu: sum.cpu + part.cpu,
            switches: sum.switches + part.switches,
        })
    }
}

/// The memory of a process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident now.
    pub rss: u64,
    /// Of this what is no file's: heap, stacks, and what the process has written to.
    pub anonymous: u64,
    /// The most that was ever resident.
    pub peak: u64,
}

impl Memory {
    /// Of the process with this id.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))?;
        let of = |name| field(&status, name);
        Ok(Self { rss: of("VmRSS:"), anonymous: of("RssAnon:"), peak: of("VmHWM:") })
    }
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// Seconds of `utime` and `stime` in `/proc/<pid>/stat`. The name before them may hold anything, so count from its
/// end. The kernel scales the two so that their sum is exact; the tick is 1/100 s whatever the kernel's own is.
fn cpu(stat: &str) -> f64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u32 = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|number| number.parse::<u32>().ok())
        .sum();
    f64::from(ticks) / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accounts_of_this_process_are_read() {
        let mut usage = Usage::of(std::process::id()).unwrap();
        while usage.cpu < 0.02 {
            usage = Usage::of(std::process::id()).unwrap();
        }
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.rss > 100 && memory.peak >= memory.rss, "{memory:?}");
    }

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_mislead() {
        assert!((cpu("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0") - 3.0).abs() < f64::EPSILON);
    }
}
