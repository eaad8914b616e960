//! NVIDIA's management library, for what CUDA does not tell: who else uses the GPU, and how it is.
//!
//! The library comes with the driver and is loaded when it is first asked. Its calls take up to milliseconds, so nothing
//! asks on the way of a step: a thread that watches does, and whoever makes an error message.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::CudaContext;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};

use crate::memory::MemoryError;
use crate::neighbours::{DeviceReading, Neighbour, Neighbours, Pid, Throttle};
use crate::types::Bytes;

/// The driver's package installs the first name; the second comes with development packages.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// The GPU of a context as the management library sees it.
pub(super) struct Inspector {
    context: Arc<CudaContext>,
    /// Opened when first asked; why it is not there is kept too.
    opened: OnceLock<Result<Opened, Unavailable>>,
    latest: Mutex<Option<DeviceReading>>,
}

/// What could not be done, and why.
#[derive(Clone, Debug)]
struct Unavailable(&'static str, String);

struct Opened {
    nvml: Nvml,
    uuid: String,
}

impl Inspector {
    pub fn new(context: Arc<CudaContext>) -> Self {
        Inspector { context, opened: OnceLock::new(), latest: Mutex::new(None) }
    }

    /// Asks the library.
    pub fn read(&self) -> Result<DeviceReading, MemoryError> {
        let opened = self.opened.get_or_init(|| {
            let uuid =
                self.context.uuid().map_err(|error| Unavailable("learn which GPU CUDA uses", error.to_string()))?;
            Opened::load(&LIBRARIES, uuid.bytes.map(|byte| byte as u8))
        });
        let reading = opened.as_ref().map_err(Clone::clone)?.read(Pid(std::process::id()))?;
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading.clone());
        Ok(reading)
    }

    /// What the library said last.
    pub fn latest(&self) -> Option<DeviceReading> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn failed(action: &'static str, error: &NvmlError) -> Unavailable {
    Unavailable(action, error.to_string())
}

impl From<Unavailable> for MemoryError {
    fn from(Unavailable(action, reason): Unavailable) -> Self {
        MemoryError::Inspection { action, reason }
    }
}

impl Opened {
    /// Loads the first of `libraries` that is there. A GPU is found by the identity that CUDA gives it, because CUDA's
    /// numbers follow `CUDA_VISIBLE_DEVICES` and those of this library do not.
    fn load(libraries: &[&str], identity: [u8; 16]) -> Result<Self, Unavailable> {
        let mut found = Err(NvmlError::LibraryNotFound);
        for name in libraries {
            found = Nvml::builder().lib_path(OsStr::new(name)).init();
            if !matches!(found, Err(NvmlError::LibloadingError(_))) {
                break;
            }
        }
        let nvml = found.map_err(|error| failed("be loaded", &error))?;
        // A part of a GPU (MIG) has an identity of its own.
        let mut last = NvmlError::NotFound;
        for kind in ["GPU", "MIG"] {
            let uuid = format!("{kind}-{}", hyphenated(identity));
            match nvml.device_by_uuid(uuid.as_str()) {
                Ok(_) => return Ok(Opened { uuid, nvml }),
                Err(error) => last = error,
            }
        }
        Err(failed("find the GPU that CUDA uses", &last))
    }

    fn read(&self, own: Pid) -> Result<DeviceReading, Unavailable> {
        let device =
            self.nvml.device_by_uuid(self.uuid.as_str()).map_err(|error| failed("find the GPU again", &error))?;
        let memory = device.memory_info().map_err(|error| failed("measure the GPU's memory", &error))?;
        let mut listed = device.running_compute_processes().map_err(|error| failed("list processes", &error))?;
        // A screen's server holds memory too. Data-centre GPUs and parts of one have none, and may say so by an error.
        listed.extend(device.running_graphics_processes().unwrap_or_default());
        Ok(DeviceReading {
            free: Bytes(memory.free),
            total: Bytes(memory.total),
            neighbours: Neighbours::among(listed.into_iter().map(neighbour), own),
            celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
            watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
            joules: device.total_energy_consumption().ok().map(|millijoules| millijoules / 1000),
            busy: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            throttles: throttles(&device),
        })
    }
}

/// As the library writes identities: 8-4-4-4-12 digits.
fn hyphenated(identity: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in identity.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn neighbour(process: ProcessInfo) -> Neighbour {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid)).ok();
    let bytes = match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
        UsedGpuMemory::Unavailable => None,
    };
    Neighbour { pid: Pid(process.pid), name: name.map(|name| name.trim().to_owned()), bytes }
}

fn throttles(device: &Device<'_>) -> Option<Vec<Throttle>> {
    let reasons = device.current_throttle_reasons().ok()?;
    let heat = ThrottleReasons::SW_THERMAL_SLOWDOWN | ThrottleReasons::HW_THERMAL_SLOWDOWN;
    let setting = ThrottleReasons::APPLICATIONS_CLOCKS_SETTING | ThrottleReasons::DISPLAY_CLOCK_SETTING;
    let of = |throttle| match throttle {
        Throttle::Power => ThrottleReasons::SW_POWER_CAP,
        Throttle::Heat => heat,
        Throttle::Hardware => ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN | ThrottleReasons::HW_SLOWDOWN,
        Throttle::Setting => setting,
    };
    Some(Throttle::ALL.into_iter().filter(|&throttle| reasons.intersects(of(throttle))).collect())
}

#[cfg(test)]
#[path = "nvml_tests.rs"]
mod tests;
