//! System calls that nothing wraps: parts of `bpf(2)` that aya keeps to itself, a procfs of our own, and
//! `getsockopt` as iptables uses it.
#![expect(unsafe_code, reason = "raw system calls, each with its proof")]

use std::{
    ffi::CString,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const OBJ_GET: i32 = 7;
#[cfg(test)]
const PROG_TEST_RUN: i32 = 10;
const PROG_GET_FD_BY_ID: i32 = 13;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const LINK_DETACH: i32 = 34;

/// `BPF_LINK_TYPE_NETNS`.
const LINK_NETNS: u32 = 5;
/// `BPF_SK_LOOKUP`.
const SK_LOOKUP: u32 = 36;
/// More than the program has.
const MAX_MAPS: usize = 64;

fn last<T>() -> io::Result<T> {
    Err(io::Error::last_os_error())
}

/// Two words of four bytes, as they stand in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The reverse.
fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// Calls `bpf(2)`.
///
/// # Safety
///
/// Pointers in `attr` must fit what the command does.
unsafe fn bpf(command: i32, attr: &mut [u64]) -> io::Result<i32> {
    // SAFETY: the attributes are ours and of this length; the caller answers for pointers in them.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if result < 0 { last() } else { i32::try_from(result).map_err(io::Error::other) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: only called with what a system call has just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// What is pinned at `path`.
pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: the path is terminated and outlives the call.
    unsafe { bpf(OBJ_GET, &mut [path.as_ptr() as u64, 0]) }.map(owned)
}

fn info<const N: usize>(fd: &OwnedFd, words: &mut [u64; N]) -> io::Result<()> {
    let length = u32::try_from(size_of_val(words)).map_err(io::Error::other)?;
    let attr = &mut [pair(number(fd), length), words.as_mut_ptr() as u64];
    // SAFETY: the kernel writes at most `length` bytes, which are `words`'. What it reads there as pointers
    // is zero or, in `maps_of`, a live array.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, attr) }.map(drop)
}

/// Where an `sk_lookup` program is attached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    /// The program's id.
    pub(super) program: u32,
    /// The namespace's inode, 0 when it is gone.
    pub(super) netns: u32,
}

/// Tells of a link; none if it is a link of another kind.
pub(super) fn attached(link: &OwnedFd) -> io::Result<Option<Attached>> {
    let mut words = [0_u64; 8];
    info(link, &mut words)?;
    let [kind, program, place, ..] = words;
    let ((kind, _), (program, _), (netns, attach)) = (halves(kind), halves(program), halves(place));
    Ok((kind == LINK_NETNS && attach == SK_LOOKUP).then_some(Attached { program, netns }))
}

/// The ids of the maps that a program uses.
pub(super) fn maps_of(program: u32) -> io::Result<Vec<u32>> {
    // SAFETY: no pointers.
    let program = unsafe { bpf(PROG_GET_FD_BY_ID, &mut [pair(program, 0), 0]) };
    let program = program.map(owned)?;
    let mut ids = vec![0_u32; MAX_MAPS];
    let room = u32::try_from(MAX_MAPS).map_err(io::Error::other)?;
    // Of `bpf_prog_info`: the last words here are the number of ids there is room for, and where.
    let mut words = [0, 0, 0, 0, 0, 0, pair(0, room), ids.as_mut_ptr() as u64];
    info(&program, &mut words)?;
    ids.retain(|id| *id != 0);
    Ok(ids)
}

/// Runs a program on a context, which it may change. Returns its verdict.
#[cfg(test)]
pub(super) fn test_run(program: u32, context: &mut [u8]) -> io::Result<u32> {
    test_run_on(program, context, &[])
}

/// The same with a packet.
#[cfg(test)]
pub(super) fn test_run_on(program: u32, context: &mut [u8], packet: &[u8]) -> io::Result<u32> {
    // SAFETY: no pointers.
    let program = unsafe { bpf(PROG_GET_FD_BY_ID, &mut [pair(program, 0), 0]) }.map(owned)?;
    let length = u32::try_from(context.len()).map_err(io::Error::other)?;
    let size = u32::try_from(packet.len()).map_err(io::Error::other)?;
    let data = if packet.is_empty() { 0 } else { packet.as_ptr() as u64 };
    let place = context.as_mut_ptr() as u64;
    // prog_fd, retval; data_size_in, data_size_out; data_in; data_out; repeat, duration; ctx_size_in and
    // _out; ctx_in; ctx_out; flags, cpu; batch_size.
    let mut attr = [
        pair(number(&program), 0),
        pair(size, 0),
        data,
        0,
        pair(1, 0),
        pair(length, length),
        place,
        place,
        0,
        0,
    ];
    // SAFETY: the kernel reads and writes `length` bytes of the context, and reads `size` of the packet.
    unsafe { bpf(PROG_TEST_RUN, &mut attr) }?;
    let [first, ..] = attr;
    Ok(halves(first).1)
}

/// Detaches a link, whoever holds it.
pub(super) fn detach(link: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { bpf(LINK_DETACH, &mut [pair(number(link), 0)]) }.map(drop)
}

/// Reads a sysctl of this namespace.
pub(super) fn read_sysctl(key: &str) -> io::Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/sys/{key}"))?.trim().to_owned())
}

/// Writes a sysctl of this namespace. In a container `/proc/sys` is read-only as a rule: then through a
/// procfs that is mounted nowhere.
pub(super) fn sysctl(key: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{key}");
    match read_sysctl(key) {
        Ok(now) if now == value => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
        Ok(_) | Err(_) => (),
    }
    if std::fs::write(&path, value).is_ok() {
        return Ok(());
    }
    let relative = CString::new(format!("sys/{key}"))?;
    // SAFETY: a terminated string, and FSOPEN_CLOEXEC.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 1) };
    let context = owned(i32::try_from(context).ok().filter(|fd| *fd >= 0).map_or_else(last, Ok)?);
    // SAFETY: FSCONFIG_CMD_CREATE takes no arguments.
    if unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 6, 0, 0, 0) } != 0 {
        return last();
    }
    // SAFETY: no pointers; FSMOUNT_CLOEXEC.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) };
    let mount = owned(i32::try_from(mount).ok().filter(|fd| *fd >= 0).map_or_else(last, Ok)?);
    // SAFETY: a terminated string.
    let file = unsafe {
        libc::openat(mount.as_raw_fd(), relative.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC)
    };
    if file < 0 {
        return last();
    }
    File::from(owned(file)).write_all(value.as_bytes())
}

/// `getsockopt` into `value`, all of it.
pub(super) fn socket_option(
    socket: &impl AsRawFd,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, which are `value`'s.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(()) } else { last() }
}

/// The index of the device that a tcx link is on, 0 when it is gone; none if it is a link of another kind.
pub(super) fn entrance(link: &OwnedFd) -> io::Result<Option<u32>> {
    /// `BPF_LINK_TYPE_TCX`.
    const TCX: u32 = 11;
    let mut words = [0_u64; 8];
    info(link, &mut words)?;
    let [kind, _, place, ..] = words;
    Ok((halves(kind).0 == TCX).then_some(halves(place).0))
}
