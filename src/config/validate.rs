//! Checks that need more than one value, or more than a type.

use patrickstar_actors::types::Bytes;

use super::{Config, ConfigError};

/// Shapes that `model.preset` accepts besides `gpt2`.
pub const SHAPES: [&str; 11] = ["tiny", "1b", "2b", "4b", "6b", "8b", "10b", "13b", "15b", "18b", "20b"];

impl Config {
    /// Refuses values that no run can use; the error lists everything that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        self.check_model(&mut problems);
        self.check_memory(&mut problems);
        self.check_train(&mut problems);
        self.check_rest(&mut problems);
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(problems)) }
    }

    /// Where metrics are served, if anywhere.
    pub fn metrics_address(&self) -> Option<std::net::SocketAddr> {
        self.telemetry.metrics_listen.parse().ok()
    }

    fn check_model(&self, problems: &mut Vec<String>) {
        let model = &self.model;
        let mut check = |ok: bool, message: String| {
            if !ok {
                problems.push(message)
            }
        };
        let known = model.preset == "gpt2" || SHAPES.contains(&model.preset.as_str());
        check(known, format!("`model.preset` is {:?}: choose gpt2 or one of {}", model.preset, SHAPES.join(", ")));
        for (key, value) in [("hidden", model.hidden), ("layers", model.layers), ("heads", model.heads)] {
            check(value > 0, format!("`model.{key}` is 0: set it to 1 or more"));
        }
        check(model.context > 0, "`model.context` is 0: set it to 1 or more".into());
        check(model.vocab != Some(0), "`model.vocab` is 0: set it to 1 or more, or leave it out".into());
        let divides = model.heads == 0 || model.hidden.is_multiple_of(model.heads);
        check(
            divides,
            format!(
                "`model.heads` = {} does not divide `model.hidden` = {}: change one of them",
                model.heads, model.hidden
            ),
        );
        check(
            (0.0..1.0).contains(&model.dropout),
            format!("`model.dropout` is {}: set it from 0 to below 1", model.dropout),
        );
    }

    fn check_memory(&self, problems: &mut Vec<String>) {
        let memory = &self.memory;
        let mut check = |ok: bool, message: &str| {
            if !ok {
                problems.push(message.to_owned())
            }
        };
        check(memory.device > Bytes(0), "`memory.device` is 0: give the device a budget such as \"8GB\"");
        check(
            memory.chunk_share > 0.0 && memory.chunk_share < 1.0,
            "`memory.chunk_share` is out of range: set it above 0 and below 1",
        );
        check(memory.host.bytes() != Some(Bytes(0)), "`memory.host` is 0: give the host a budget, or \"auto\"");
        check(
            memory.disk > Bytes(0) || memory.disk_path.is_none(),
            "`memory.disk_path` is set but `memory.disk` is 0: set `memory.disk`, or remove the path",
        );
        if let Some(chunk) = memory.chunk.bytes() {
            check(
                chunk.0 > 0 && chunk.0.is_multiple_of(4096),
                "`memory.chunk` is not a positive multiple of 4096: use such as \"64MiB\", or \"auto\"",
            );
            check(chunk <= memory.device, "`memory.chunk` exceeds `memory.device`: use smaller chunks, or \"auto\"");
        }
    }

    fn check_train(&self, problems: &mut Vec<String>) {
        let train = &self.train;
        let mut check = |ok: bool, message: String| {
            if !ok {
                problems.push(message)
            }
        };
        let counts = [
            ("steps", train.steps),
            ("batch", train.batch as u64),
            ("micro_batches", train.micro_batches as u64),
            ("seq_len", train.seq_len as u64),
            ("log_every", train.log_every),
        ];
        for (key, value) in counts {
            check(value > 0, format!("`train.{key}` is 0: set it to 1 or more"));
        }
        check(
            train.micro_batches == 0 || train.batch.is_multiple_of(train.micro_batches),
            format!(
                "`train.micro_batches` = {} does not divide `train.batch` = {}: change one of them",
                train.micro_batches, train.batch
            ),
        );
        // A shape or a directory brings its own context, which the model checks.
        let own_context = self.model.preset == "gpt2" && self.model.path.is_none();
        check(
            !own_context || train.seq_len <= self.model.context,
            format!(
                "`train.seq_len` = {} exceeds `model.context` = {}: shorten the sequences or widen the context",
                train.seq_len, self.model.context
            ),
        );
        check(
            train.lr.is_finite() && train.lr > 0.0,
            format!("`train.lr` is {}: set it above 0, such as 3e-4", train.lr),
        );
        check(
            (0.0..=train.lr).contains(&train.min_lr),
            format!("`train.min_lr` is {}: set it from 0 to `train.lr`", train.min_lr),
        );
        for (key, value) in [("beta1", train.beta1), ("beta2", train.beta2)] {
            check((0.0..1.0).contains(&value), format!("`train.{key}` is {value}: set it from 0 to below 1"));
        }
        check(train.eps.is_finite() && train.eps > 0.0, format!("`train.eps` is {}: set it above 0", train.eps));
        for (key, value) in [("weight_decay", train.weight_decay), ("clip_norm", train.clip_norm)] {
            check(value.is_finite() && value >= 0.0, format!("`train.{key}` is {value}: set it to 0 or more"));
        }
        check(!train.output.as_os_str().is_empty(), "`train.output` is empty: name a run directory".into());
    }

    fn check_rest(&self, problems: &mut Vec<String>) {
        let actors = &self.actors;
        let mut check = |ok: bool, message: &str| {
            if !ok {
                problems.push(message.to_owned())
            }
        };
        check(!self.data.path.as_os_str().is_empty(), "`data.path` is empty: name a file or directory of text");
        check(
            self.data.validation_path.as_ref().is_none_or(|path| !path.as_os_str().is_empty()),
            "`data.validation_path` is empty: name a file or directory of text, or leave it out",
        );
        check(!self.data.tokenizer.is_empty(), "`data.tokenizer` is empty: use \"bytes\" or a tokenizer.json");
        check(
            self.telemetry.metrics_listen.is_empty() || self.metrics_address().is_some(),
            "`telemetry.metrics_listen` is no address: use such as \"127.0.0.1:9464\", or \"\"",
        );
        let peak = self.telemetry.device_peak_flops;
        check(
            peak.is_finite() && peak >= 0.0,
            "`telemetry.device_peak_flops` is no number of operations: use such as 989.5e12, or 0",
        );
        check(
            tracing_subscriber::EnvFilter::try_new(&self.service.log_level).is_ok(),
            "`service.log_level` is neither a level nor a filter: use such as \"info\", or \"\"",
        );
        check(self.checkpoint.keep > 0, "`checkpoint.keep` is 0: keep at least 1");
        check(actors.reduction.mailbox > 0, "`actors.reduction.mailbox` is 0: set it to 1 or more");
        check(actors.monitor.interval_ms > 0, "`actors.monitor.interval_ms` is 0: set it to 1 or more");
        check(
            (0.0..1.0).contains(&actors.monitor.headroom),
            "`actors.monitor.headroom` is out of range: set it from 0 to below 1",
        );
    }
}
