"""One run: does it learn, how fast, and where does the time go?"""

from build import graph, heat, row, stat

TITLE = "Training run"
VERSION = 3
DESCRIPTION = "Curves of a run, its speed, and what its steps spend their time on."
RATE = "[$__rate_interval]"
STEP_TIME = "sum by (job_id) (rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % RATE
FLOPS = "sum by (job_id) (rate(patrickstar_train_steps_total{JOB}%s)) * on (job_id) max by (job_id) (patrickstar_model_step_flops{JOB})" % RATE


def quantile(share):
    return "histogram_quantile(%s, sum by (job_id, le) (rate(patrickstar_train_step_duration_seconds_bucket{JOB}%s)))" % (share, RATE)


PANELS = [
    stat("Step", "Steps done, those before a restart included.", "none", "patrickstar_train_step{JOB}", width=4),
    stat("Planned", "Steps to train in all.", "none", "patrickstar_train_planned_steps{JOB}", width=4),
    stat("Time left", "Until all steps are done, at the pace of the latest ones.", "s",
         "patrickstar_job_estimated_finish_timestamp_seconds{JOB} - time()", width=4),
    stat("Progress", "Steps done of those planned.", "percentunit", "patrickstar_job_progress_ratio{JOB}", width=4),
    stat("Loss", "Mean loss of the last step.", "none", "patrickstar_train_loss{JOB}", width=4, decimals=4),
    stat("Parameters", "Parameters of the model.", "short", "patrickstar_model_parameters{JOB}", width=4),
    stat("Last step", "Time since the last step ended. If it grows beyond a few steps' time, the run hangs.", "s",
         "time() - patrickstar_job_last_step_timestamp_seconds{JOB}", width=4,
         thresholds=[(None, "green"), (300, "orange"), (900, "red")]),

    row("Learning"),
    graph("Loss", "Mean loss of the last step, and on validation data where there is any: if that rises while the other falls, the "
          "model learns its data by heart.", "none", ("patrickstar_train_loss{JOB}", "{{job_id}}"),
          ("patrickstar_valid_loss{JOB}", "{{job_id}} validation")),
    graph("Gradient norm", "Global norm before clipping. A rise over orders of magnitude comes before a loss that explodes.",
          "none", ("patrickstar_train_gradient_norm{JOB}", "{{job_id}}"), log=True),
    graph("Learning rate", "As the schedule gives it.", "none", ("patrickstar_train_learning_rate{JOB}", "{{job_id}}"), min=0),
    graph("Steps that updated nothing or went wrong", "Overflows of the scaled loss are normal in fp16, a few in a thousand "
          "steps; a loss or norm that is infinite or no number never is.", "none",
          ("increase(patrickstar_train_overflow_steps_total{JOB}%s)" % RATE, "{{job_id}} overflow"),
          ("increase(patrickstar_train_nonfinite_steps_total{JOB}%s)" % RATE, "{{job_id}} not finite"),
          ("patrickstar_train_loss_scale{JOB}", "{{job_id}} loss scale"), log=True),

    row("Speed"),
    graph("Tokens per second", "Throughput.", "none",
          ("sum by (job_id) (rate(patrickstar_train_tokens_total{JOB}%s))" % RATE, "{{job_id}}"), min=0),
    graph("Time of a step", "Half of the steps, and all but one in a hundred, are faster.", "s",
          (quantile(0.5), "{{job_id}} median"), (quantile(0.99), "{{job_id}} 99 %"), min=0),
    graph("Phases of a step", "Mean time of each. `backward` includes recompute, `optimizer` is what no pass hides, `checkpoint` what "
          "a step waits before it begins because states are being saved, `validation` what the loss on validation data took; on a GPU the passes are timed there, waits for copies included.", "s",
          ("sum by (phase) (rate(patrickstar_train_phase_duration_seconds_sum{JOB}%s)) / ignoring (phase) group_left "
           "sum(rate(patrickstar_train_step_duration_seconds_count{JOB}%s))" % (RATE, RATE), "{{phase}}"), stack=True, min=0),
    graph("Where the time goes", "Shares of the steps' time: reading data, and the device's waits by cause. The rest is "
          "compute. `queue` is time in which the compute thread had not queued the next block, `checkpoint` in which states had to be "
          "saved before they could be stepped.", "percentunit",
          ("sum by (cause) (rate(patrickstar_stall_duration_seconds_sum{JOB}%s)) / ignoring (cause) group_left "
           "sum(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), "waits: {{cause}}"),
          ("sum(rate(patrickstar_train_phase_duration_seconds_sum{JOB, phase=\"data\"}%s)) / sum(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))"
           % (RATE, RATE), "data"), stack=True, min=0, max=1),
    heat("Steps by time", "How many steps took how long: two bands are two kinds of steps.", "s",
         "sum by (le) (increase(patrickstar_train_step_duration_seconds_bucket{JOB}%s))" % RATE),
    graph("Model FLOP/s", "Operations that the model needs, recompute not counted, per second.", "flops", (FLOPS, "{{job_id}}"), min=0),
    graph("MFU", "Model FLOP/s as a share of what the device can do at best in the job's precision, by the data sheet of the GPU. "
          "Empty where that is not known: telemetry.device_peak_flops says it.", "percentunit",
          ("(%s) / on (job_id) max by (job_id) (patrickstar_device_peak_flops{JOB})" % FLOPS, "{{job_id}}"), min=0),

    row("Checkpoints"),
    graph("Time since the newest checkpoint", "What a kill would cost. Before the first, time since the start.", "s",
          ("time() - (patrickstar_checkpoint_last_success_timestamp_seconds{JOB} or patrickstar_job_start_timestamp_seconds{JOB})",
           "{{job_id}}"), min=0),
    graph("Bytes of checkpoints", "What was written and is safe on disk, per second.", "Bps",
          ("rate(patrickstar_checkpoint_written_bytes_total{JOB}[1h])", "{{job_id}}"), min=0),
    graph("Time of a checkpoint", "Mean time from its beginning to the step that found it on disk. Training goes on meanwhile.", "s",
          ("rate(patrickstar_checkpoint_duration_seconds_sum{JOB}[1h]) / rate(patrickstar_checkpoint_duration_seconds_count{JOB}[1h])",
           "{{job_id}}"), min=0),

    row("GPU"),
    graph("Busy and held back", "Share of the time in which a kernel ran, and whether something holds the clocks back: power is "
          "what a busy GPU runs into, heat and hardware are what to look after.", "percentunit",
          ("patrickstar_device_busy_ratio{JOB}", "{{job_id}} busy"),
          ("patrickstar_device_throttled{JOB}", "{{job_id}} held back by {{reason}}"), min=0, max=1),
    graph("Other processes on the GPU", "How many hold memory of it: each shares its time too.", "none",
          ("patrickstar_device_neighbours{JOB}", "{{job_id}}"), min=0),
    graph("Temperature", "Of the chip.", "celsius", ("patrickstar_device_temperature_celsius{JOB}", "{{job_id}}"), min=0),
    graph("Power", "What the GPU draws: now, and on average by its own counter of energy.", "watt",
          ("patrickstar_device_power_watts{JOB}", "{{job_id}} now"),
          ("rate(patrickstar_device_energy_joules_total{JOB}%s)" % RATE, "{{job_id}} average"), min=0),

    row("GPU (needs dcgm-exporter)"),
    graph("Tensor cores", "Share of the time in which they worked, as the GPU counts it.", "percentunit",
          ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "GPU {{gpu}}"), min=0, max=1),
    graph("PCIe", "Traffic between host and device, as the GPU counts it.", "Bps",
          ("rate(DCGM_FI_PROF_PCIE_RX_BYTES%s)" % RATE, "GPU {{gpu}} in"),
          ("rate(DCGM_FI_PROF_PCIE_TX_BYTES%s)" % RATE, "GPU {{gpu}} out"), min=0),
]
