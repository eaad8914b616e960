"""The processes and their actors."""

from build import graph, row, stat, table

TITLE = "Service and actors"
VERSION = 4
DESCRIPTION = "Processes, what they take of the machine, scrapes, and the actors of each job."
RATE = "[$__rate_interval]"

PANELS = [
    stat("Up", "1 while a process answers scrapes.", "none", "up{PROCESS}", legend="{{instance}}", width=6,
         thresholds=[(None, "red"), (1, "green")]),
    stat("Running since", "Time since the process started. A small number after a long run is a restart.", "s",
         "time() - process_start_time_seconds{PROCESS}", legend="{{instance}}", width=6),
    stat("Scrape", "Time that a scrape took.", "s", "scrape_duration_seconds{PROCESS}", legend="{{instance}}", width=6,
         thresholds=[(None, "green"), (0.1, "orange"), (1, "red")]),
    stat("Series", "Series in a scrape.", "none", "scrape_samples_scraped{PROCESS}", legend="{{instance}}", width=6),

    row("Service"),
    graph("Jobs", "Jobs by status. Those queued wait for their device.", "none",
          ("patrickstar_service_jobs{PROCESS}", "{{status}}"), min=0),
    graph("Jobs that ended", "In the last hour, by outcome.", "none",
          ("increase(patrickstar_service_jobs_finished_total{PROCESS}[1h])", "{{outcome}}"), min=0),
    graph("Time in the queue", "From a job's creation to its first worker, mean since the service began.", "s",
          ("patrickstar_service_job_queue_wait_seconds_sum{PROCESS} / patrickstar_service_job_queue_wait_seconds_count{PROCESS}",
           "mean"), min=0),
    graph("Requests", "Answers by status code.", "reqps",
          ("sum by (code) (rate(patrickstar_service_http_request_duration_seconds_count{PROCESS}%s))" % RATE, "{{code}}"), min=0),
    graph("Time to answer", "99 of 100 requests of a route are answered in this time; of a stream, its beginning.", "s",
          ("histogram_quantile(0.99, sum by (le, route) (rate(patrickstar_service_http_request_duration_seconds_bucket{PROCESS}%s)))" % RATE,
           "{{route}}"), min=0),
    graph("Writes to the database", "Time until a change is safe on disk, 99 of 100.", "s",
          ("histogram_quantile(0.99, sum by (le) (rate(patrickstar_service_store_write_duration_seconds_bucket{PROCESS}%s)))" % RATE,
           "99 of 100"), min=0),
    graph("Refused", "Requests without a known token, and those beyond a client's rate.", "none",
          ("increase(patrickstar_service_auth_failures_total{PROCESS}[5m])", "no token"),
          ("increase(patrickstar_service_rate_limited_total{PROCESS}[5m])", "too many"), min=0),
    graph("Requests being answered", "Where this grows, answers take longer than clients wait before they ask again.", "none",
          ("patrickstar_service_http_requests_in_flight{PROCESS}", "{{instance}}"), min=0),
    graph("Log", "Messages by level; what they say is in the process's standard error.", "none",
          ("sum by (level) (increase(patrickstar_log_messages_total{PROCESS}[5m]))", "{{level}}"), min=0),
    graph("Streams", "Clients that follow the events of a job.", "none",
          ("patrickstar_service_streams{PROCESS}", "{{instance}}"), min=0),
    graph("Workers started again", "Workers that died. Their jobs go on from the last checkpoint.", "none",
          ("increase(patrickstar_service_worker_restarts_total{PROCESS}[15m])", "{{instance}}"), min=0),
    graph("Configuration", "When the configuration in force was taken over, and whether a later one was refused.", "s",
          ("time() - patrickstar_service_config_last_reload_success_timestamp_seconds{PROCESS}", "age"),
          ("1 - patrickstar_service_config_last_reload_successful{PROCESS}", "refused"), min=0),

    row("Actors"),
    graph("Messages handled", "Work of each actor. One that stands still while the others work is stuck.", "none",
          ("sum by (actor) (rate(patrickstar_actor_messages_total{JOB}%s))" % RATE, "{{actor}}"), min=0),
    graph("Full mailboxes", "Messages that wait, as a share of those that a mailbox holds. One that stays full holds up whoever "
          "sends to it.", "percentunit",
          ("sum by (actor) (patrickstar_actor_mailbox_messages{JOB}) / (sum by (actor) (patrickstar_actor_mailbox_capacity{JOB}) > 0)",
           "{{actor}}"), min=0, max=1),
    graph("Actors at work", "Share of the steps' time in which an actor handled messages.", "percentunit",
          ("sum by (actor) (rate(patrickstar_actor_handle_duration_seconds_sum{JOB}%s)) / ignoring (actor) group_left "
           "sum(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), "{{actor}}"), min=0),
    graph("Last message", "Time since an actor handled one. An actor that has none to handle waits too: compare with the others.",
          "s", ("time() - max by (actor) (patrickstar_actor_last_progress_timestamp_seconds{JOB})", "{{actor}}"), min=0),
    graph("Restarts", "Actors restored after a panic. Five in a row without progress end the training.", "none",
          ("sum by (job_id, actor) (increase(patrickstar_actor_restarts_total{JOB}[5m]))", "{{job_id}} {{actor}}"), min=0),

    row("Processes"),
    graph("Memory", "Memory of the process in RAM: the host tier and everything else.", "bytes",
          ("process_resident_memory_bytes{PROCESS}", "{{instance}} {{job_id}}"), min=0),
    graph("Processor", "Cores in use.", "none", ("rate(process_cpu_seconds_total{PROCESS}[1m])", "{{instance}} {{job_id}}"), min=0),
    graph("Open files", "Files and sockets. A number that only grows is a leak.", "none",
          ("process_open_fds{PROCESS}", "{{instance}} {{job_id}}"), min=0),
    graph("Threads", "Threads of the process.", "none", ("process_threads{PROCESS}", "{{instance}} {{job_id}}"), min=0),
    graph("Time of scrapes", "As Prometheus saw them.", "s", ("scrape_duration_seconds{PROCESS}", "{{instance}}"), min=0),
    graph("Checkpoints", "Checkpoints written in the last hour.", "none",
          ("increase(patrickstar_checkpoints_total{JOB}[1h])", "{{job_id}}"), min=0),
    table("Versions", "The program of each process: its version, the commit it was built from, and the CUDA version it was built for.", "patrickstar_build_info{PROCESS}", ["Time", "__name__", "Value"]),
]
