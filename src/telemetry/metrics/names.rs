//! Every metric there is: one enum a kind, with name, unit, labels and meaning. No name is spelled anywhere else, except by
//! the monitor of the actors crate, whose three constants are taken up here.

use patrickstar_actors::monitor::{CHUNK_BYTES, HOST_AVAILABLE_BYTES, NON_MODEL_BYTES};

/// What a number counts. A name ends in its unit, so that a reader of a graph needs no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things: steps, tokens, messages.
    Count,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
    /// Seconds since 1970.
    Timestamp,
    /// From 0 to 1.
    Ratio,
    /// Floating-point operations.
    Flops,
    /// Degrees Celsius.
    Celsius,
    /// Watts.
    Watts,
    /// Joules.
    Joules,
    /// A number without a unit: a loss, a norm, a rate of learning.
    Number,
    /// Always 1; the labels say something.
    Info,
}

impl Unit {
    /// The word in the documentation.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Count => "count",
            Unit::Bytes => "bytes",
            Unit::Seconds => "seconds",
            Unit::Timestamp => "seconds since 1970",
            Unit::Ratio => "0 to 1",
            Unit::Flops => "operations",
            Unit::Celsius => "degrees Celsius",
            Unit::Watts => "watts",
            Unit::Joules => "joules",
            Unit::Number => "number",
            Unit::Info => "always 1",
        }
    }
}

/// A metric: what its series have in common.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// As Prometheus shows it.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// Names of its labels, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

/// Declares an enum whose variants are families; the help is the variant's documentation too.
macro_rules! families {
    ($(#[$doc:meta])* $kind:ident { $($variant:ident = $name:expr, $unit:ident, [$($label:literal),*], $help:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $kind {
            $(#[doc = $help] $variant,)*
        }

        impl $kind {
            /// All of them, in the order of the documentation.
            pub const ALL: &[$kind] = &[$($kind::$variant),*];

            /// Name, unit, labels and meaning.
            pub fn family(self) -> Family {
                match self {
                    $($kind::$variant => {
                        Family { name: $name, unit: Unit::$unit, labels: &[$($label),*], help: $help }
                    })*
                }
            }
        }
    };
}

families! {
    /// What only grows, in whole numbers. Seconds are no whole numbers: they are sums of histograms.
    Counter {
        TrainSteps = "patrickstar_train_steps_total", Count, [],
            "Steps done by this process.";
        TrainTokens = "patrickstar_train_tokens_total", Count, [],
            "Tokens trained on by this process.";
        OverflowSteps = "patrickstar_train_overflow_steps_total", Count, [],
            "Steps that updated nothing, because gradients of the scaled loss overflowed fp16.";
        NonFiniteSteps = "patrickstar_train_nonfinite_steps_total", Count, [],
            "Steps whose loss or gradient norm was infinite or not a number, overflows of the scaled loss aside.";
        ChunkMoves = "patrickstar_chunk_moves_total", Count, ["from", "to"],
            "Chunks copied from one tier to another.";
        ChunkMovedBytes = "patrickstar_chunk_moved_bytes_total", Bytes, ["from", "to"],
            "Bytes copied from one tier to another.";
        ChunkZeroFills = "patrickstar_chunk_zero_fills_total", Count, [],
            "Fresh chunks filled with zeros where they are used: no bytes cross a link.";
        ChunkPlacements = "patrickstar_chunk_placements_total", Count, ["reason"],
            "Chunks copied or filled with zeros, by why: demand (somebody waits), prefetch, evict, offload.";
        ChunkEvictions = "patrickstar_chunk_evictions_total", Count, ["policy", "outcome"],
            "Chunks that lost their slot, by policy: copied away, or dropped because a valid copy lies elsewhere.";
        ChunkAccesses = "patrickstar_chunk_accesses_total", Count, ["result"],
            "Chunks that the model asked for: hit (in place), miss (had to be brought first, or was on its way).";
        ChunkPrefetches = "patrickstar_chunk_prefetches_total", Count, ["outcome"],
            "Prefetched chunks: useful (there in time), late (compute had to wait), wasted (evicted before use).";
        MemoryPressure = "patrickstar_memory_pressure_events_total", Count, ["tier", "action"],
            "What a tier's budget made happen: shrink (it became smaller), evict (a chunk had to leave because the tier was above it).";
        AdamParameters = "patrickstar_adam_parameters_total", Count, ["side"],
            "Parameters stepped by the optimizer, by the side that stepped them.";
        ActorMessages = "patrickstar_actor_messages_total", Count, ["actor"],
            "Messages that an actor has handled.";
        ActorRestarts = "patrickstar_actor_restarts_total", Count, ["actor"],
            "Times that an actor was restored after a panic.";
        Checkpoints = "patrickstar_checkpoints_total", Count, [],
            "Checkpoints that are safe on disk, written by this process.";
        CheckpointBytes = "patrickstar_checkpoint_written_bytes_total", Bytes, [],
            "Bytes of checkpoints that are safe on disk, written by this process.";
        LogMessages = "patrickstar_log_messages_total", Count, ["level"],
            "Messages logged by this process.";
        JobsFinished = "patrickstar_service_jobs_finished_total", Count, ["outcome"],
            "Jobs that ended: succeeded, failed or cancelled.";
        DeviceEnergy = "patrickstar_device_energy_joules_total", Joules, [],
            "Energy that the GPU has used since its driver was loaded, in whole joules.";
        AuthFailures = "patrickstar_service_auth_failures_total", Count, [],
            "Requests without a token that is known, where one is needed.";
        RateLimited = "patrickstar_service_rate_limited_total", Count, [],
            "Requests refused because their client sends too many.";
        WorkerRestarts = "patrickstar_service_worker_restarts_total", Count, [],
            "Workers that died and whose job is started again.";
        ProcessCpuSeconds = "process_cpu_seconds_total", Seconds, [],
            "Processor time of this process, user and system, in whole seconds.";
    }
}

families! {
    /// What is now.
    Gauge {
        BuildInfo = "patrickstar_build_info", Info, ["version", "revision", "cuda"],
            "The program that runs: its version, the commit that it was built from (unknown where git did not tell), and the CUDA version that it was built for (none: computes on the host).";
        JobInfo = "patrickstar_job_info", Info, ["model", "precision", "device"],
            "The job that this process trains.";
        JobStart = "patrickstar_job_start_timestamp_seconds", Timestamp, [],
            "When this process began to train the job.";
        JobLastStep = "patrickstar_job_last_step_timestamp_seconds", Timestamp, [],
            "When the last step ended.";
        JobProgress = "patrickstar_job_progress_ratio", Ratio, [],
            "Steps done of those planned.";
        JobEstimatedFinish = "patrickstar_job_estimated_finish_timestamp_seconds", Timestamp, [],
            "When the job will have done its steps, if they go on taking as long as the latest ones; absent before the second.";
        TrainStep = "patrickstar_train_step", Count, [],
            "Steps done by the job, those before a restart included.";
        TrainPlannedSteps = "patrickstar_train_planned_steps", Count, [],
            "Steps to train in all.";
        TrainLoss = "patrickstar_train_loss", Number, [],
            "Mean loss of the last step.";
        ValidLoss = "patrickstar_valid_loss", Number, [],
            "Mean loss on data.validation_path, every train.eval_every steps; absent before the first time.";
        TrainLearningRate = "patrickstar_train_learning_rate", Number, [],
            "Learning rate of the last step.";
        TrainGradientNorm = "patrickstar_train_gradient_norm", Number, [],
            "Global norm of the last step's gradient before clipping.";
        TrainLossScale = "patrickstar_train_loss_scale", Number, [],
            "What the loss is multiplied by before the backward pass; 1 unless weights are fp16.";
        ModelParameters = "patrickstar_model_parameters", Count, [],
            "Parameters of the model, tied ones once.";
        ModelStateBytes = "patrickstar_model_state_bytes", Bytes, [],
            "Bytes of weights and optimizer states.";
        ModelStepFlops = "patrickstar_model_step_flops", Flops, [],
            "Operations that the model needs for a step, recompute not counted: steps per second times this, divided by patrickstar_device_peak_flops, is the MFU.";
        DevicePeakFlops = "patrickstar_device_peak_flops", Flops, ["dtype"],
            "Operations a second that the device can do at best in the job's precision: what telemetry.device_peak_flops or the data sheet of the GPU says; absent where neither is known.";
        ChunkSizeBytes = "patrickstar_chunk_size_bytes", Bytes, [],
            "Size of a chunk.";
        MemoryCapacity = "patrickstar_memory_capacity_bytes", Bytes, ["tier"],
            "Bytes of a tier's slots that have memory now.";
        MemoryBudget = "patrickstar_memory_budget_bytes", Bytes, ["tier"],
            "Bytes of a tier that chunks may use now.";
        MemoryUsed = "patrickstar_memory_used_bytes", Bytes, ["tier", "kind"],
            "Bytes of chunks in a tier by what they hold, every second, within a step too.";
        MemoryPeak = "patrickstar_memory_peak_bytes", Bytes, ["tier"],
            "Most bytes of chunks that a tier has held.";
        Chunks = "patrickstar_chunks", Count, ["tier", "kind", "state"],
            "Chunks by the nearest tier that holds them (none: without contents, or on their first way), by what they hold, and by state, every second, within a step too.";
        ChunkBytes = CHUNK_BYTES, Bytes, ["tier"],
            "Bytes of chunk slots in use, sampled by the monitor while a step runs.";
        DeviceLimit = "patrickstar_device_limit_bytes", Bytes, [],
            "Device memory that the job was given, for everything.";
        DevicePeak = "patrickstar_device_peak_bytes", Bytes, [],
            "Most device memory in use at any moment: chunks and non-model memory together.";
        DeviceFree = "patrickstar_device_free_bytes", Bytes, [],
            "Memory of the GPU that no process holds.";
        DeviceNeighbours = "patrickstar_device_neighbours", Count, [],
            "Other processes that hold memory of the GPU; absent where they cannot be told from this one.";
        DeviceNeighbourBytes = "patrickstar_device_neighbour_bytes", Bytes, [],
            "Memory of the GPU that other processes hold; absent where they cannot be told from this one.";
        DeviceBusy = "patrickstar_device_busy_ratio", Ratio, [],
            "Share of the last second or so in which any process had a kernel on the GPU.";
        DeviceTemperature = "patrickstar_device_temperature_celsius", Celsius, [],
            "Temperature of the GPU.";
        DevicePower = "patrickstar_device_power_watts", Watts, [],
            "Power that the GPU draws.";
        DeviceThrottled = "patrickstar_device_throttled", Count, ["reason"],
            "Whether the GPU's clocks are held back, 1 or 0, by reason: power, heat, hardware (board or power supply), setting.";
        NonModelBytes = NON_MODEL_BYTES, Bytes, [],
            "Device memory that is not chunks (activations, workspaces), sampled by the monitor while a step runs.";
        NonModelPeak = "patrickstar_non_model_peak_bytes", Bytes, [],
            "Most device memory that was not chunks.";
        HostAvailable = HOST_AVAILABLE_BYTES, Bytes, [],
            "Host memory that this process may still take: what its control groups and the machine leave.";
        CheckpointLastSuccess = "patrickstar_checkpoint_last_success_timestamp_seconds", Timestamp, [],
            "When the newest checkpoint was safe on disk; absent before the first.";
        ActorMailbox = "patrickstar_actor_mailbox_messages", Count, ["actor"],
            "Messages that wait for an actor, every second, within a step too.";
        ActorMailboxCapacity = "patrickstar_actor_mailbox_capacity", Count, ["actor"],
            "Messages that an actor's mailbox holds: when it is full, senders wait.";
        ActorLastProgress = "patrickstar_actor_last_progress_timestamp_seconds", Timestamp, ["actor"],
            "When an actor handled its last message; absent before the first.";
        HttpInFlight = "patrickstar_service_http_requests_in_flight", Count, [],
            "Requests that are being answered.";
        Jobs = "patrickstar_service_jobs", Count, ["status"],
            "Jobs by status; those queued wait for their device.";
        OpenStreams = "patrickstar_service_streams", Count, [],
            "Clients that follow the events of a job.";
        ConfigReloaded = "patrickstar_service_config_last_reload_successful", Count, [],
            "Whether the last change of the configuration was taken over: 1 or 0.";
        ConfigReloadTime = "patrickstar_service_config_last_reload_success_timestamp_seconds", Timestamp, [],
            "When the configuration in force was taken over.";
        ProcessResidentBytes = "process_resident_memory_bytes", Bytes, [],
            "Memory of this process in RAM.";
        ProcessOpenFds = "process_open_fds", Count, [],
            "Open files and sockets of this process.";
        ProcessThreads = "process_threads", Count, [],
            "Threads of this process.";
        ProcessStart = "process_start_time_seconds", Timestamp, [],
            "When this process started.";
    }
}

families! {
    /// Spread of a time. Its sum divided by another's is a share of time; its count counts steps.
    Histogram {
        StepDuration = "patrickstar_train_step_duration_seconds", Seconds, [],
            "Wall time of a step, its data and what it waited for the checkpoint and the validation before it included.";
        PhaseDuration = "patrickstar_train_phase_duration_seconds", Seconds, ["phase"],
            "Parts of a step, one after the other: data (reading and arranging its tokens), forward, backward (recompute included), optimizer (what no pass hides), checkpoint (what it waited before it began because states were being saved), validation (what the loss on validation data took before it).";
        StallDuration = "patrickstar_stall_duration_seconds", Seconds, ["cause"],
            "Time of a step in which the device had nothing to do, by what it waited for.";
        CopyDuration = "patrickstar_chunk_copy_duration_seconds", Seconds, ["from", "to"],
            "Time of a step in which the streams of a direction were copying.";
        AdamHostDuration = "patrickstar_adam_host_duration_seconds", Seconds, [],
            "Time of a step in which the host's cores ran the optimizer.";
        ActorHandleDuration = "patrickstar_actor_handle_duration_seconds", Seconds, ["actor"],
            "Time of a step in which an actor handled messages.";
        ChunkResidency = "patrickstar_chunk_residency_seconds", Seconds, [],
            "From a chunk's arrival on the device to its leaving.";
        ChunkIdle = "patrickstar_chunk_idle_before_eviction_seconds", Seconds, [],
            "From a chunk's last use to its eviction from the device; from its arrival where it was not used.";
        ChunkReuseGap = "patrickstar_chunk_reuse_gap_seconds", Seconds, [],
            "From one use of a chunk on the device to the next, without it leaving in between.";
        CheckpointDuration = "patrickstar_checkpoint_duration_seconds", Seconds, [],
            "Time from the beginning of a checkpoint to the step that found it safe on disk; training goes on meanwhile.";
        HttpDuration = "patrickstar_service_http_request_duration_seconds", Seconds, ["route", "method", "code"],
            "Time to answer a request, by the pattern of its route; of a stream, until it begins.";
        StoreWriteDuration = "patrickstar_service_store_write_duration_seconds", Seconds, [],
            "Time until a change was safe in the database, waiting for its turn included.";
        JobQueueWait = "patrickstar_service_job_queue_wait_seconds", Seconds, [],
            "Time from a job's creation to its first worker.";
    }
}

/// Steps take milliseconds for a toy and minutes for a model of the GPU's whole memory.
const STEP_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0];
/// Parts of a step are read by their sums: powers of ten show whether they are noise, a part, or most of it.
const PART_BUCKETS: &[f64] = &[1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0];
/// Most answers and writes take a millisecond or a few.
const ANSWER_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];
/// A queue is empty, or as long as the jobs before.
const QUEUE_BUCKETS: &[f64] = &[1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0, 86_400.0, 604_800.0];
const CHECKPOINT_BUCKETS: &[f64] = &[0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0];

impl Histogram {
    /// Upper bounds of its buckets. Without any the exporter would make a summary, which cannot be added up.
    pub fn buckets(self) -> &'static [f64] {
        match self {
            Histogram::StepDuration => STEP_BUCKETS,
            Histogram::PhaseDuration
            | Histogram::ActorHandleDuration
            | Histogram::ChunkResidency
            | Histogram::ChunkIdle
            | Histogram::ChunkReuseGap
            | Histogram::StallDuration
            | Histogram::CopyDuration
            | Histogram::AdamHostDuration => PART_BUCKETS,
            Histogram::CheckpointDuration => CHECKPOINT_BUCKETS,
            Histogram::HttpDuration | Histogram::StoreWriteDuration => ANSWER_BUCKETS,
            Histogram::JobQueueWait => QUEUE_BUCKETS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Family> {
        let counters = Counter::ALL.iter().map(|metric| metric.family());
        let gauges = Gauge::ALL.iter().map(|metric| metric.family());
        counters.chain(gauges).chain(Histogram::ALL.iter().map(|metric| metric.family())).collect()
    }

    #[test]
    fn names_are_unique_and_say_their_unit() {
        let mut seen = std::collections::HashSet::new();
        for family in all() {
            assert!(seen.insert(family.name), "{} is declared twice", family.name);
            assert!(family.name.starts_with("patrickstar_") || family.name.starts_with("process_"), "{}", family.name);
            let stem = family.name.trim_end_matches("_total");
            let ending = match family.unit {
                Unit::Bytes => "_bytes",
                Unit::Seconds => "_seconds",
                Unit::Timestamp if family.name == Gauge::ProcessStart.family().name => "_time_seconds",
                Unit::Timestamp => "_timestamp_seconds",
                Unit::Ratio => "_ratio",
                Unit::Flops => "_flops",
                Unit::Celsius => "_celsius",
                Unit::Watts => "_watts",
                Unit::Joules => "_joules",
                Unit::Info => "_info",
                Unit::Count | Unit::Number => "",
            };
            assert!(stem.ends_with(ending), "{} counts {}", family.name, family.unit.name());
            assert!(family.help.ends_with('.') && !family.help.contains('\n'), "{}", family.name);
            // Prometheus gives every target a label `job`, and the recorder every series of a job `job_id`.
            assert!(!family.labels.iter().any(|label| ["job", "instance", "job_id", "le"].contains(label)));
        }
    }

    #[test]
    fn only_counters_end_in_total_and_buckets_rise() {
        for metric in Counter::ALL {
            assert!(metric.family().name.ends_with("_total"), "{metric:?}");
        }
        for metric in Gauge::ALL {
            assert!(!metric.family().name.ends_with("_total"), "{metric:?}");
        }
        for metric in Histogram::ALL {
            assert!(metric.buckets().is_sorted_by(|a, b| a < b) && !metric.buckets().is_empty(), "{metric:?}");
        }
    }
}
