//! A model begins with the same bits wherever its chunks stay: the GPU draws those of its own memory there. An engine gets a
//! pool of its own, so this runs alone: `gpu --ignored --test-threads=1 draws::`.

use candle_core::Result;
use patrickstar::config::{DeviceKind, Size};
use patrickstar::model::block::{Block, Context, Init, ParameterSpec};
use patrickstar::model::param::Params;
use patrickstar::model::tape::Activation;
use patrickstar::{Config, Engine};
use patrickstar_actors::stats::Direction;
use patrickstar_actors::types::{Bytes, Kind, Precision};

use crate::PRECISIONS;
use crate::memory::Capped;

const CHUNK: Bytes = Bytes(1 << 20);

/// Parameters of every kind, in sizes that are multiples of nothing, and one that lies in several chunks.
struct Drawn;

impl Block for Drawn {
    fn name(&self) -> &str {
        "drawn"
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        let spec = |name: &str, shape: &[usize], init: Init, tile_rows: Option<usize>| ParameterSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            init,
            decay: true,
            tile_rows,
        };
        vec![
            spec("normal", &[37, 131], Init::Normal { std: 0.02 }, None),
            spec("ones", &[5], Init::Ones, None),
            spec("uniform", &[1001], Init::Uniform { bound: 0.3 }, None),
            spec("zeros", &[3], Init::Zeros, None),
            spec("tiled", &[3000, 515], Init::Normal { std: 1.0 }, Some(8)),
            spec("one", &[1, 1], Init::Normal { std: 7.5 }, None),
            spec("tiled.uniform", &[2001, 301], Init::Uniform { bound: 1.0 }, Some(1)),
        ]
    }

    fn forward(&self, input: &Activation, _params: &Params, _ctx: &Context) -> Result<Activation> {
        Ok(input.clone())
    }
}

fn engine(precision: Precision, device: DeviceKind) -> Engine {
    let mut config = Config::default();
    config.model.precision = precision;
    config.compute.device = device;
    config.memory.chunk = Size::Bytes(CHUNK);
    config.memory.device = Bytes(256 << 20);
    Engine::new(config, vec![Box::new(Drawn)]).unwrap()
}

#[test]
#[ignore = "takes the pool of the process; run alone"]
fn a_model_that_stays_on_the_gpu_is_drawn_there_with_the_bits_of_the_host() {
    let _capped = Capped::by_the_gpu();
    for precision in PRECISIONS {
        let [host, gpu] = [DeviceKind::Cpu, DeviceKind::Cuda].map(|device| engine(precision, device));
        let brought = gpu.runtime().stats().bytes[Direction::HostToDevice as usize];
        assert_eq!(brought, 0, "{precision:?}: nothing crosses the link");
        for name in host.parameter_names() {
            let [expected, got] = [&host, &gpu].map(|engine| engine.parameter(&name).unwrap());
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
            assert!(expected.iter().any(|&value| value != 0.0) || name == "zeros");
            assert!(bits(&expected) == bits(&got), "{name} in {precision:?}");
            let momentum = gpu.optimizer_state(&name, Kind::Momentum).unwrap();
            assert!(momentum.len() == got.len() && momentum.iter().all(|&value| value == 0.0));
        }
    }
}
