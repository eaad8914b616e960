"""Is everything all right? One line of numbers, and the two curves that say the most."""

from build import bars, graph, stat, table

TITLE = "Overview"
VERSION = 1
DESCRIPTION = "All jobs at a glance: is each running, learning, fast, and saved?"
RATE = "[$__rate_interval]"

PANELS = [
    stat("Processes", "Processes of patrickstar that answer scrapes, of those that Prometheus knows.", "none",
         'sum(up{PROCESS})', legend="up"),
    stat("Jobs", "Jobs whose process is there.", "none", "count(patrickstar_job_info{JOB})", legend="jobs"),
    stat("Tokens per second", "Tokens trained on, over all chosen jobs.", "none",
         "sum(rate(patrickstar_train_tokens_total{JOB}%s))" % RATE, legend="tokens/s"),
    stat("Stalled", "Share of the time in which the device had nothing to do, of the worst job. Above 0.1 look at the board "
         "Memory and chunks: it says what the device waits for.", "percentunit",
         "max(sum by (job_id) (rate(patrickstar_stall_duration_seconds_sum{JOB}%s)) / sum by (job_id) "
         "(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s)))" % (RATE, RATE), legend="of the time",
         thresholds=[(None, "green"), (0.1, "orange"), (0.3, "red")]),
    stat("Unsaved work", "Time since the newest checkpoint, or since the start where there is none: what a kill would cost "
         "the job that it would cost most.", "s",
         "time() - min(patrickstar_checkpoint_last_success_timestamp_seconds{JOB} or patrickstar_job_start_timestamp_seconds{JOB})",
         legend="at most", thresholds=[(None, "green"), (3600, "orange"), (14400, "red")]),
    stat("Actor restarts", "Actors restored after a panic in the last hour. Training goes on with the same bits, but the "
         "log says what went wrong.", "none", "sum(increase(patrickstar_actor_restarts_total{JOB}[1h]))",
         legend="last hour", thresholds=[(None, "green"), (1, "red")]),
    graph("Loss", "Mean loss of each job's last step.", "none", ("patrickstar_train_loss{JOB}", "{{job_id}}")),
    graph("Tokens per second by job", "Throughput of each job.", "none",
          ("sum by (job_id) (rate(patrickstar_train_tokens_total{JOB}%s))" % RATE, "{{job_id}}"), min=0),
    bars("Progress", "Share of the planned steps that is done.", "percentunit",
         "patrickstar_train_step{JOB} / patrickstar_train_planned_steps{JOB}", min=0, max=1),
    bars("Device memory", "Most device memory in use so far, of what the job was given. It never exceeds 1.", "percentunit",
         "patrickstar_device_peak_bytes{JOB} / patrickstar_device_limit_bytes{JOB}", min=0, max=1,
         thresholds=[(None, "green"), (1, "red")]),
    table("Jobs that run", "What each process trains.", "patrickstar_job_info{JOB}", ["Time", "__name__", "Value"]),
]
