//! The arguments of every command.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use patrickstar_actors::types::Bytes;

use crate::config::DeviceKind;

/// Trains transformers larger than the device.
#[derive(Debug, Parser)]
#[command(name = "patrickstar", version)]
pub struct Cli {
    /// Least severe messages that are logged, or a filter such as patrickstar=debug.
    #[arg(long, global = true, default_value = "warn", env = "PATRICKSTAR_LOG")]
    pub log_level: String,
    /// Form of the log on stderr.
    #[arg(long, global = true, value_enum, default_value = "pretty")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// The commands that [`super::run`] dispatches.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model.
    Train(TrainArgs),
    /// Train models for others, over HTTP.
    Serve(ServeArgs),
    /// Give a service a job.
    Submit(SubmitArgs),
    /// Look after the jobs of a service.
    Jobs(JobsArgs),
    /// Train one job of a service.
    #[command(hide = true)]
    Worker,
    /// Write texts for a service.
    #[command(hide = true)]
    Sample,
    /// Print the OpenAPI document of the service.
    #[command(hide = true)]
    Openapi,
    /// Say whether a job fits, before anything is allocated; exit code 3 if not.
    Plan(PlanArgs),
    /// Measure, or compare with references.
    Bench(BenchArgs),
    /// Continue a text with a checkpoint.
    Generate(GenerateArgs),
    /// Show, describe or check the configuration.
    Config(ConfigArgs),
    /// Check this machine.
    Doctor(DoctorArgs),
    /// Print the completions of a shell.
    Completions(CompletionsArgs),
}

/// A configuration file and changes to it.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigSource {
    /// Configuration file (TOML).
    pub config: Option<PathBuf>,
    /// Change a key, such as train.steps=10; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Arguments of `config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub action: ConfigAction,
}

/// The actions of `config`.
#[derive(Debug, Subcommand)]
pub enum ConfigAction {
    /// Print every key with its value.
    Show {
        /// The configuration.
        #[command(flatten)]
        source: ConfigSource,
        /// Print where each value came from.
        #[arg(long)]
        origin: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON schema.
    Schema,
    /// Check a configuration.
    Validate {
        /// The configuration.
        #[command(flatten)]
        source: ConfigSource,
    },
}

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The configuration.
    #[command(flatten)]
    pub source: ConfigSource,
    /// Text to train on; the same as --set data.path=PATH.
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Continue from a checkpoint: the newest of the run, or of this directory.
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Serve Prometheus metrics while training, such as at 127.0.0.1:9464; the same as --set telemetry.metrics_listen=ADDRESS.
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// Print JSON lines.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML) that all jobs begin with; SIGHUP reads it again.
    pub config: Option<PathBuf>,
    /// Read the configuration again whenever its file changes.
    #[arg(long, requires = "config")]
    pub watch_config: bool,
    /// Address to listen on; one that others can reach needs a token.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Directory of the database, files and jobs.
    #[arg(long, value_name = "DIR", default_value = "patrickstar-data")]
    pub data: PathBuf,
    /// Tokens that are accepted, a line each: read, write or admin, then sha256: and the token's hash. The variable
    /// PATRICKSTAR_TOKEN holds one that may do everything.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Name by which clients may call besides addresses and localhost; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub allowed_host: Vec<String>,
    /// Largest file that is accepted.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub max_upload: Bytes,
    /// Jobs that may wait.
    #[arg(long, value_name = "JOBS", default_value_t = 1000)]
    pub max_waiting: usize,
    /// Directory of models in Hugging Face layout that jobs may begin with, each in a directory of its own; may be repeated.
    #[arg(long, value_name = "DIR")]
    pub model_root: Vec<PathBuf>,
    /// Texts that are written at a time, each by a process with a model of its own.
    #[arg(long, value_name = "TEXTS", default_value_t = 2)]
    pub max_samplers: usize,
    /// Where texts are computed: cpu, cuda or auto; a GPU is then shared with the job that trains on it.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub sample_device: DeviceKind,
    /// Times that a job is restarted without a new checkpoint before it fails.
    #[arg(long, value_name = "TIMES", default_value_t = 5)]
    pub max_restarts: u32,
    /// Seconds without any progress after which a worker is killed and started again; 0 is never.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    pub hang_timeout: u64,
}

/// Which service, and how it knows us. The variable PATRICKSTAR_TOKEN holds the token otherwise.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// Address of the service.
    #[arg(long, value_name = "URL", global = true, env = "PATRICKSTAR_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// File whose first line is the token to show; the variable PATRICKSTAR_TOKEN holds it otherwise.
    #[arg(long, value_name = "FILE", global = true)]
    pub token_file: Option<PathBuf>,
    /// Seconds to wait for a service that is away before a watcher gives up.
    #[arg(long, value_name = "SECONDS", global = true, default_value_t = 600)]
    pub patience: u64,
    /// Print JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

/// Arguments of `submit`.
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// The configuration, as for train.
    #[command(flatten)]
    pub source: ConfigSource,
    /// What to train on instead of data.path: text files, directories of them, or JSONL; it is uploaded.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// What to look at the loss on instead of data.validation_path, without training; it is uploaded.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub validation: Vec<PathBuf>,
    /// Model of the service to begin with; otherwise the one that the configuration describes.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Passes over the data, where the configuration sets no train.steps.
    #[arg(long, value_name = "N")]
    pub epochs: Option<u32>,
    /// Part of the trained model's name.
    #[arg(long, value_name = "NAME")]
    pub suffix: Option<String>,
    /// Jobs of a higher priority start first.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,
    /// Watch the job to its end, as `jobs watch` does.
    #[arg(long)]
    pub wait: bool,
    /// The service.
    #[command(flatten)]
    pub connection: Connection,
}

/// Arguments of `jobs`.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: JobsAction,
    /// The service.
    #[command(flatten)]
    pub connection: Connection,
}

/// The actions of `jobs`.
#[derive(Debug, Subcommand)]
pub enum JobsAction {
    /// List jobs, newest first.
    List {
        /// Most jobs to list.
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
    },
    /// Show a job.
    Show {
        /// Its id.
        id: String,
    },
    /// Follow a job to its end. Exit code: 0 succeeded, 1 failed, 3 does not fit, 4 cancelled, 5 no service.
    Watch {
        /// Its id.
        id: String,
    },
    /// Finish the step, save a checkpoint, free the device.
    Pause {
        /// Its id.
        id: String,
    },
    /// Let a paused job go on, with the same bits.
    Resume {
        /// Its id.
        id: String,
    },
    /// End a job.
    Cancel {
        /// Its id.
        id: String,
    },
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The configuration.
    #[command(flatten)]
    pub source: ConfigSource,
    /// TFLOP/s of the machine to plan for; without it, or either of the next two, this machine is measured.
    #[arg(long, value_name = "TFLOPS", value_parser = positive)]
    pub compute: Option<f64>,
    /// GB/s of its link between host and device, one direction.
    #[arg(long, value_name = "GBPS", value_parser = positive)]
    pub link: Option<f64>,
    /// GB/s of its host memory, reads and writes together.
    #[arg(long, value_name = "GBPS", value_parser = positive)]
    pub host: Option<f64>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: BenchCommand,
    /// Print one JSON object.
    #[arg(long, global = true)]
    pub json: bool,
}

/// The measurements of `bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Throughput of the optimizer.
    Adam,
    /// Bandwidth between tiers.
    Copy,
    /// Time of a training step.
    Step {
        /// Shape of the model, such as tiny or 1b; without it the quick start's model.
        #[arg(long)]
        shape: Option<String>,
        /// Sequences a step.
        #[arg(long)]
        batch: Option<usize>,
        /// Steps to time, after one of warm-up.
        #[arg(long, default_value_t = 20)]
        steps: u64,
        /// Leave out the step after them in which kernels are timed one by one.
        #[arg(long)]
        no_kernels: bool,
        /// Change a key; may be repeated.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Time of one transformer layer: forward, then recompute and backward, as a step runs it.
    Block {
        /// Width of the residual stream.
        #[arg(long, default_value_t = 4096)]
        hidden: usize,
        /// Attention heads.
        #[arg(long, default_value_t = 32)]
        heads: usize,
        /// Sequences.
        #[arg(long, default_value_t = 16)]
        batch: usize,
        /// Tokens of a sequence.
        #[arg(long, default_value_t = 1024)]
        seq_len: usize,
        /// Time to measure, after a warm-up of one tenth: a card slows down in its first seconds.
        #[arg(long, default_value_t = 3.0, value_parser = positive)]
        seconds: f64,
        /// What it and copies between host and device, both ways at once, cost each other.
        #[arg(long)]
        beside_copies: bool,
    },
    /// Time of each GPU kernel beside its floor.
    Kernels {
        /// Also times PyTorch's attention on the same shapes, with this interpreter.
        #[arg(long, value_name = "PYTHON")]
        torch: Option<PathBuf>,
    },
    /// Our step beside those of other engines, from what each printed.
    Peers {
        /// What `bench step --json` printed.
        ours: PathBuf,
        /// What the peer harness printed.
        #[arg(required = true)]
        peers: Vec<PathBuf>,
    },
    /// Compare with the resident run, bit for bit.
    Parity,
    /// Compare with recorded results.
    Golden {
        /// Directory of the results.
        dir: PathBuf,
        /// How weights are stored: fp32, or in 16 bits with the bounds that they allow.
        #[arg(long, value_enum, default_value = "fp32")]
        precision: GoldenPrecision,
    },
}

/// Precisions that `bench golden` has bounds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GoldenPrecision {
    /// As the recorded results.
    Fp32,
    /// bf16 weights and gradients.
    Bf16,
    /// fp16 weights and gradients of a scaled loss.
    Fp16,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Checkpoint to load.
    pub checkpoint: PathBuf,
    /// Text to continue.
    #[arg(long, default_value = "")]
    pub prompt: String,
    /// Tokens to generate.
    #[arg(long, default_value_t = 100)]
    pub tokens: usize,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Choose among the likeliest K only.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: clap_complete::Shell,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("give a number greater than 0".to_owned()),
    }
}
