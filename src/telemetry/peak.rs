//! What a GPU can do at best: the number that the use of it is a share of.

use patrickstar_actors::types::Precision;

use crate::config::Config;
use crate::model::compute::Compute;

/// One model of GPU, in 10^12 operations a second, for products of dense matrices.
struct Peak {
    /// As drivers call it, exactly: a part of a GPU has a longer name, and less.
    names: &'static [&'static str],
    /// fp16 and bf16 on tensor cores, summed in fp32.
    half: f64,
    /// fp32 on the cores beside them: products of fp32 are not rounded to TF32 here.
    single: f64,
}

/// From NVIDIA's data sheets of each, which give twice the dense number where they speak of sparsity.
const PEAKS: [Peak; 8] = [
    Peak {
        names: &["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"],
        half: 989.5,
        single: 67.0,
    },
    Peak { names: &["NVIDIA H100 NVL", "NVIDIA H200 NVL"], half: 835.5, single: 60.0 },
    Peak { names: &["NVIDIA H100 PCIe"], half: 756.5, single: 51.0 },
    Peak {
        names: &[
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA A100-PCIE-80GB",
            "NVIDIA A100 80GB PCIe",
        ],
        half: 312.0,
        single: 19.5,
    },
    Peak { names: &["NVIDIA L40S"], half: 362.05, single: 91.6 },
    Peak { names: &["NVIDIA L4"], half: 121.0, single: 30.3 },
    Peak { names: &["NVIDIA A30"], half: 165.0, single: 10.3 },
    Peak { names: &["NVIDIA A10"], half: 125.0, single: 31.2 },
];

/// Operations a second that the device of a training can do at best: what the configuration says, else what its data sheet
/// does; `None` where neither is known.
pub fn device_peak_flops(config: &Config, compute: &Compute, precision: Precision) -> Option<f64> {
    let given = Some(config.telemetry.device_peak_flops).filter(|&given| given > 0.0);
    given.or_else(|| of_data_sheet(&compute.device_name()?, precision))
}

fn of_data_sheet(name: &str, precision: Precision) -> Option<f64> {
    let peak = PEAKS.iter().find(|peak| peak.names.contains(&name))?;
    Some(1e12 * if precision == Precision::Fp32 { peak.single } else { peak.half })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_gpus_that_are_known_have_a_peak_and_no_name_has_two() {
        assert_eq!(of_data_sheet("NVIDIA H100 80GB HBM3", Precision::Bf16), Some(989.5e12));
        assert_eq!(of_data_sheet("NVIDIA H100 80GB HBM3", Precision::Fp32), Some(67e12));
        assert_eq!(of_data_sheet("NVIDIA H100 PCIe", Precision::Fp16), Some(756.5e12));
        assert_eq!(of_data_sheet("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Precision::Bf16), None);
        assert_eq!(of_data_sheet("NVIDIA H900", Precision::Bf16), None);
        let mut names: Vec<_> = PEAKS.iter().flat_map(|peak| peak.names).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn a_host_has_the_peak_that_it_is_given() {
        let mut config = Config::default();
        assert_eq!(device_peak_flops(&config, &Compute::Cpu, Precision::Fp32), None);
        config.telemetry.device_peak_flops = 2e12;
        assert_eq!(device_peak_flops(&config, &Compute::Cpu, Precision::Fp32), Some(2e12));
    }
}
