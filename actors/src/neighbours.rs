//! Who else uses the device, and how the device is.

use std::fmt;

use crate::types::Bytes;

/// A process as the device's driver numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pid(pub u32);

/// A process with memory on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Which one.
    pub pid: Pid,
    /// What it is called, where this process may see it.
    pub name: Option<String>,
    /// What it holds, where the driver says.
    pub bytes: Option<Bytes>,
}

/// The other processes on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Neighbours {
    /// All of them, the largest first.
    Known(Vec<Neighbour>),
    /// This process is not among those that the driver lists, as in a container with process numbers of its own: any of
    /// them may be this one.
    Mixed {
        /// How many processes are listed.
        listed: usize,
    },
}

/// How the device is. What the driver does not tell is absent.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceReading {
    /// Memory that nobody holds.
    pub free: Bytes,
    /// All of its memory.
    pub total: Bytes,
    /// The other processes.
    pub neighbours: Neighbours,
    /// Of the chip.
    pub celsius: Option<f64>,
    /// Drawn now.
    pub watts: Option<f64>,
    /// Used since the driver was loaded.
    pub joules: Option<u64>,
    /// Share of the last second or so in which a kernel ran, whoever's.
    pub busy: Option<f64>,
    /// What holds its clocks back, where the driver says.
    pub throttles: Option<Vec<Throttle>>,
}

/// Why a device runs slower than it could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttle {
    /// It draws as much as it may.
    Power,
    /// It is too hot.
    Heat,
    /// Its board or power supply asked for it.
    Hardware,
    /// Somebody set its clocks.
    Setting,
}

impl Throttle {
    /// All of them.
    pub const ALL: [Throttle; 4] = [Throttle::Power, Throttle::Heat, Throttle::Hardware, Throttle::Setting];

    /// The word in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Throttle::Power => "power",
            Throttle::Heat => "heat",
            Throttle::Hardware => "hardware",
            Throttle::Setting => "setting",
        }
    }
}

impl Neighbours {
    /// Sorts out the processes that are `own`. Several lists may name a process: it is one neighbour, with the most that any
    /// of them says.
    pub fn among(listed: impl IntoIterator<Item = Neighbour>, own: Pid) -> Self {
        let mut all: Vec<Neighbour> = Vec::new();
        for process in listed {
            match all.iter_mut().find(|known| known.pid == process.pid) {
                Some(known) => known.bytes = known.bytes.max(process.bytes),
                None => all.push(process),
            }
        }
        if !all.iter().any(|process| process.pid == own) {
            return Neighbours::Mixed { listed: all.len() };
        }
        all.retain(|process| process.pid != own);
        all.sort_by_key(|process| (std::cmp::Reverse(process.bytes), process.pid));
        Neighbours::Known(all)
    }

    /// What they hold together; `None` where that is not known.
    pub fn bytes(&self) -> Option<Bytes> {
        match self {
            Neighbours::Known(all) => {
                all.iter().try_fold(Bytes(0), |sum, process| Some(Bytes(sum.0 + process.bytes?.0)))
            }
            Neighbours::Mixed { .. } => None,
        }
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid.0)?;
        if let Some(name) = &self.name {
            write!(f, " ({name})")?;
        }
        match self.bytes {
            Some(bytes) => write!(f, " holds {bytes}"),
            None => write!(f, " holds memory (the driver does not say how much)"),
        }
    }
}

impl fmt::Display for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Neighbours::Known(all) if all.is_empty() => write!(f, "no other process holds memory of the GPU"),
            Neighbours::Known(all) => {
                let words: Vec<String> = all.iter().map(Neighbour::to_string).collect();
                write!(f, "on the GPU {}", words.join(", "))
            }
            Neighbours::Mixed { listed } => write!(
                f,
                "NVML lists {listed} processes on the GPU and this one is not among them (a container numbers processes differently), so neighbours are not known"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, bytes: u64) -> Neighbour {
        Neighbour { pid: Pid(pid), name: None, bytes: Some(Bytes(bytes)) }
    }

    #[test]
    fn neighbours_are_the_others_the_largest_first() {
        let named = Neighbour { name: Some("python3".into()), ..process(7, 2 << 30) };
        let listed = [process(5, 1 << 20), process(1, 9 << 30), named, process(5, 3 << 20)];
        let neighbours = Neighbours::among(listed, Pid(1));
        assert_eq!(neighbours.bytes(), Some(Bytes((2 << 30) + (3 << 20))));
        let text = neighbours.to_string();
        assert!(
            text.starts_with("on the GPU process 7 (python3) holds 2") && text.contains(", process 5 holds 3"),
            "{text}"
        );
    }

    #[test]
    fn what_is_not_known_is_not_counted() {
        let silent = Neighbour { bytes: None, ..process(2, 0) };
        let neighbours = Neighbours::among([process(1, 5), silent], Pid(1));
        assert_eq!(neighbours.bytes(), None);
        assert!(neighbours.to_string().contains("does not say"), "{neighbours}");
        assert_eq!(Neighbours::among([process(1, 5)], Pid(1)).bytes(), Some(Bytes(0)));
    }

    #[test]
    fn without_this_process_in_the_list_nobody_is_called_a_neighbour() {
        let neighbours = Neighbours::among([process(4001, 5), process(4002, 6)], Pid(1));
        assert_eq!(neighbours, Neighbours::Mixed { listed: 2 });
        assert_eq!(neighbours.bytes(), None);
    }
}
