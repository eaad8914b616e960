//! Where the pages of the host tier lie on a machine with several memory nodes.
//!
//! All cores step, and wait for memory. So the pages of a mapping lie on all nodes in turns, and every memory controller
//! serves each update, whichever slots its chunks have; a slot holds another chunk later, so that no core could have its own
//! near by. Only nodes whose cores this process may use take part: one that was bound to the socket of its GPU has its memory
//! there.

#![cfg_attr(target_os = "linux", expect(unsafe_code, reason = "system calls that no library wraps"))]

use std::fs::read_to_string;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::ptr::NonNull;

use super::{Arena, MemoryError, SlotIndex};
use crate::types::{Bytes, Tier};

/// Nodes with memory and cores that this process may use. Empty where the system does not say.
fn usable_nodes() -> Vec<u32> {
    if cfg!(target_os = "linux") { usable_under(Path::new("/")) } else { Vec::new() }
}

fn usable_under(root: &Path) -> Vec<u32> {
    let read = |path: &str| read_to_string(root.join(path)).unwrap_or_default();
    let status = read("proc/self/status");
    let allowed = |key: &str| ranges(status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default());
    let (cores, memory) = (allowed("Cpus_allowed_list:"), allowed("Mems_allowed_list:"));
    let nodes = "sys/devices/system/node";
    let has_core = |node: &u32| {
        ranges(&read(&format!("{nodes}/node{node}/cpulist")))
            .iter()
            .any(|own| cores.iter().any(|allowed| own.start() <= allowed.end() && allowed.start() <= own.end()))
    };
    let with_memory = ranges(&read(&format!("{nodes}/has_memory")));
    let is_allowed = |node: &u32| memory.iter().any(|allowed| allowed.contains(node));
    with_memory.into_iter().flatten().filter(is_allowed).filter(has_core).collect()
}

/// Numbers as the kernel lists them: `0-3,8`.
fn ranges(list: &str) -> Vec<RangeInclusive<u32>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).collect()
}

/// Where pages of host memory come to lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spread {
    /// The system has one node for this process, or does not say.
    OneNode,
    /// On these nodes in turns.
    Over(Vec<u32>),
    /// Where whoever started the process said (`numactl`).
    AsChosen,
    /// Where the threads run that touch them first, for the system refuses anything else, as containers may.
    FirstTouch(String),
}

/// Where host memory of this process will lie, tried on a page.
pub fn probe() -> Result<Spread, MemoryError> {
    let page = Bytes(4096);
    Ok(spread_over(Arena::new(Tier::Host, 1, page)?.slot(SlotIndex(0)), 4096, usable_nodes()))
}

/// Pages of the mapping will lie on the nodes that this process may use, in turns, as they are touched first.
pub(super) fn spread(base: NonNull<u8>, bytes: usize) {
    match spread_over(base, bytes, usable_nodes()) {
        Spread::FirstTouch(reason) => {
            tracing::info!(reason, "memory cannot be spread over nodes: it lies where it is touched first")
        }
        other => tracing::debug!(bytes, ?other, "memory on nodes"),
    }
}

fn spread_over(base: NonNull<u8>, bytes: usize, nodes: Vec<u32>) -> Spread {
    if nodes.len() < 2 {
        return Spread::OneNode;
    }
    match has_policy()
        .and_then(|chosen| if chosen { Ok(false) } else { interleave(base, bytes, &nodes).map(|()| true) })
    {
        Ok(true) => Spread::Over(nodes),
        Ok(false) => Spread::AsChosen,
        Err(error) => Spread::FirstTouch(error.to_string()),
    }
}

/// Whether this process was given a policy for its memory.
#[cfg(target_os = "linux")]
fn has_policy() -> io::Result<bool> {
    let mut mode = libc::MPOL_DEFAULT;
    let null = std::ptr::null_mut::<libc::c_ulong>();
    // SAFETY: asks for the mode alone, which it writes to a variable of that type.
    check(unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, null, 0usize, null, 0usize) })?;
    // Balancing without nodes is what the kernel does anyway.
    Ok(mode & !libc::MPOL_F_NUMA_BALANCING != libc::MPOL_DEFAULT)
}

#[cfg(target_os = "linux")]
fn interleave(base: NonNull<u8>, bytes: usize, nodes: &[u32]) -> io::Result<()> {
    /// More than the kernel can have.
    const MAX_NODES: usize = 1024;
    const WORD: usize = libc::c_ulong::BITS as usize;
    let mode = libc::MPOL_INTERLEAVE as libc::c_ulong;
    let mut mask = [0 as libc::c_ulong; MAX_NODES / WORD];
    for &node in nodes {
        if let Some(word) = mask.get_mut(node as usize / WORD) {
            *word |= 1 << (node as usize % WORD);
        }
    }
    // SAFETY: changes where pages of a mapping of ours will lie and no byte in it; the mask has as many bits as it says.
    check(unsafe { libc::syscall(libc::SYS_mbind, base.as_ptr(), bytes, mode, mask.as_ptr(), MAX_NODES, 0usize) })
}

#[cfg(target_os = "linux")]
fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn has_policy() -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn interleave(_: NonNull<u8>, _: usize, _: &[u32]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of two sockets with 4 cores each, a node of memory alone and one that is empty.
    fn usable(cores: &str, memory: &str) -> Vec<u32> {
        let root = tempfile::tempdir().unwrap();
        let status = format!("Name:\tx\nCpus_allowed_list:\t{cores}\nMems_allowed:\t1\nMems_allowed_list:\t{memory}\n");
        for (path, text) in [
            ("proc/self/status", status.as_str()),
            ("sys/devices/system/node/has_memory", "0-2\n"),
            ("sys/devices/system/node/node0/cpulist", "0-1,4-5\n"),
            ("sys/devices/system/node/node1/cpulist", "2-3,6-7\n"),
            ("sys/devices/system/node/node2/cpulist", "\n"),
            ("sys/devices/system/node/node3/cpulist", "\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        usable_under(root.path())
    }

    #[test]
    fn nodes_count_whose_cores_and_memory_may_be_used() {
        assert_eq!(usable("0-7", "0-3"), [0, 1]);
        assert_eq!(usable("2-3", "0-3"), [1], "bound to the cores of a socket");
        assert_eq!(usable("0-7", "0"), [0], "confined to the memory of a socket");
        assert_eq!(usable("5,6", "0-1"), [0, 1]);
        assert_eq!(usable_under(Path::new("/nowhere")), Vec::<u32>::new());
    }

    /// Needs a system that lets a process set the policy of its memory: no container that forbids it.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_kernel_puts_pages_on_all_nodes_and_refuses_one_that_is_not_there() {
        const HUGE_PAGE: usize = 2 << 20;
        let nodes = usable_nodes();
        assert!(!nodes.is_empty());
        assert!(!has_policy().expect("the system tells the policy"), "run the tests without numactl");
        let bytes = 4 * HUGE_PAGE * nodes.len();
        let arena = Arena::new(Tier::Host, 1, Bytes(bytes as u64)).unwrap();
        let base = arena.slot(SlotIndex(0));
        interleave(base, bytes, &nodes).unwrap();
        // SAFETY: a fresh arena that nobody else has.
        unsafe { arena.prefault(0..1) };
        // The last mapping that begins at the address or below: neighbours with the same policy may be one with it.
        let maps = read_to_string("/proc/self/numa_maps").unwrap();
        let begin = |line: &str| usize::from_str_radix(line.split(' ').next()?, 16).ok();
        let at = |line: &&str| begin(line).is_some_and(|address| address <= base.as_ptr() as usize);
        let line = maps.lines().filter(at).max_by_key(|line| begin(line)).expect("it is mapped");
        assert!(line.contains(" interleave:"), "{line}");
        for node in &nodes {
            assert!(line.contains(&format!(" N{node}=")), "{line}");
        }
        assert!(interleave(base, bytes, &[1000]).is_err());
    }

    #[test]
    fn one_node_is_left_alone() {
        let arena = Arena::new(Tier::Host, 1, Bytes(4096)).unwrap();
        assert_eq!(spread_over(arena.slot(SlotIndex(0)), 4096, vec![0]), Spread::OneNode);
        // As the machine is: whatever it says, it says.
        probe().unwrap();
    }
}
