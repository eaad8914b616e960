//! Where the operations of a model are computed.

use candle_core::Device;

/// The backend of a model's operations.
#[derive(Clone)]
pub enum Compute {
    /// All cores of the host, activations in fp32.
    Cpu,
    /// An NVIDIA GPU, activations in the type of the weights.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<super::cuda::CudaOps>),
}

impl Compute {
    /// candle's device for activations.
    pub fn device(&self) -> Device {
        match self {
            Compute::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => ops.device().clone(),
        }
    }
}
