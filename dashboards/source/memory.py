"""What lies where, what moves and why, and whether fetching ahead pays."""

from build import graph, row, stat

TITLE = "Memory and chunks"
VERSION = 4
DESCRIPTION = "Use of the tiers, moves between them, prefetching, eviction, and the optimizer's two sides."
RATE = "[$__rate_interval]"


def quantile(name):
    return "histogram_quantile(0.5, sum by (le) (rate(%s_bucket{JOB}%s)))" % (name, RATE)


def used(tier):
    return graph("Chunks in the %s tier" % tier, "Bytes by what they hold, and what chunks may use there: every second, wherever the step is. "
                 "Gradients come and go within a step." + (" All 0 where no disk tier is configured." if tier == "disk" else ""), "bytes",
                 ('sum by (kind) (patrickstar_memory_used_bytes{JOB, tier="%s"})' % tier, "{{kind}}"), width=8, stack=True, min=0)


PANELS = [
    stat("Stalled", "Share of the time in which the device had nothing to do.", "percentunit",
         "sum by (job_id) (rate(patrickstar_stall_duration_seconds_sum{JOB}%s)) / sum by (job_id) "
         "(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), width=6,
         thresholds=[(None, "green"), (0.1, "orange"), (0.3, "red")]),
    stat("Prefetches in time", "Share of the prefetched chunks that were there when they were needed.", "percentunit",
         'sum by (job_id) (increase(patrickstar_chunk_prefetches_total{JOB, outcome="useful"}[5m])) / '
         "sum by (job_id) (increase(patrickstar_chunk_prefetches_total{JOB}[5m]))", width=6,
         thresholds=[(None, "red"), (0.5, "orange"), (0.9, "green")]),
    stat("Chunk", "Size of a chunk.", "bytes", "patrickstar_chunk_size_bytes{JOB}", width=6),
    stat("Model states", "Bytes of weights and optimizer states: what the tiers have to hold.", "bytes",
         "patrickstar_model_state_bytes{JOB}", width=6),

    row("Tiers"),
    graph("Device", "Most in use at any moment, and what the job was given: the first never crosses the second. Samples of "
          "the monitor show what is there while a step runs.", "bytes",
          ("patrickstar_device_limit_bytes{JOB}", "given"),
          ("patrickstar_device_peak_bytes{JOB}", "peak"),
          ('patrickstar_chunk_bytes{JOB, tier="device"}', "chunks"),
          ("patrickstar_non_model_bytes{JOB}", "non-model"),
          ("patrickstar_non_model_peak_bytes{JOB}", "non-model peak"), min=0),
    graph("Share of each tier's budget in use", "Samples of the monitor. A device that is never full could have larger "
          "chunks, more kept activations or a larger batch.", "percentunit",
          ("patrickstar_chunk_bytes{JOB} / (patrickstar_memory_budget_bytes{JOB} > 0)", "{{job_id}} {{tier}}"),
          ("patrickstar_memory_peak_bytes{JOB} / (patrickstar_memory_capacity_bytes{JOB} > 0)", "{{job_id}} {{tier}} peak of capacity"), min=0),
    used("device"), used("host"), used("disk"),
    graph("Host memory left", "What the process may still take under its control groups and on the machine. Near 0 the "
          "kernel kills it.", "bytes", ("patrickstar_host_available_bytes{JOB}", "{{job_id}}"),
          thresholds=[(None, "red"), (2 << 30, "green")], min=0),
    graph("Neighbours on the GPU", "What other processes hold of its memory, and what nobody holds, as its driver says. The log "
          "names them. Empty without a GPU.", "bytes",
          ("patrickstar_device_neighbour_bytes{JOB}", "{{job_id}} neighbours"),
          ("patrickstar_device_free_bytes{JOB}", "{{job_id}} free"), min=0),
    graph("Budgets", "What chunks may use now. Budgets shrink when a neighbour takes memory, and chunks are evicted.", "bytes",
          ("patrickstar_memory_budget_bytes{JOB}", "{{job_id}} {{tier}}"), min=0),

    graph("What budgets made happen", "shrink: a tier's budget became smaller, because somebody else took memory, a moment "
          "needed more of it, or it was retuned. evict: a chunk had to leave because its tier was above the budget.", "none",
          ("sum by (tier, action) (rate(patrickstar_memory_pressure_events_total{JOB}%s))" % RATE, "{{tier}} {{action}}"), min=0),

    row("Moves"),
    graph("Bytes moved", "Traffic between tiers by direction.", "Bps",
          ("sum by (from, to) (rate(patrickstar_chunk_moved_bytes_total{JOB}%s))" % RATE, "{{from}} to {{to}}"), min=0),
    graph("Streams at work", "Share of the time in which a direction was copying. At 1 the link is what limits the run.",
          "percentunit",
          ("sum by (from, to) (rate(patrickstar_chunk_copy_duration_seconds_sum{JOB}%s)) / ignoring (from, to) group_left "
           "sum(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), "{{from}} to {{to}}"), min=0),
    graph("Moves", "Chunks copied by direction, and fresh ones filled with zeros.", "none",
          ("sum by (from, to) (rate(patrickstar_chunk_moves_total{JOB}%s))" % RATE, "{{from}} to {{to}}"),
          ("sum(rate(patrickstar_chunk_zero_fills_total{JOB}%s))" % RATE, "zero-filled"), min=0),
    graph("Why chunks move", "demand: somebody waited for it. prefetch: it will be needed. evict: its slot was needed. "
          "offload: its next user is on the other side.", "none",
          ("sum by (reason) (rate(patrickstar_chunk_placements_total{JOB}%s))" % RATE, "{{reason}}"), stack=True, min=0),
    graph("Evictions", "Chunks that lost their slot, by policy: dropped costs nothing, copied costs a move.", "none",
          ("sum by (policy, outcome) (rate(patrickstar_chunk_evictions_total{JOB}%s))" % RATE, "{{policy}} {{outcome}}"), stack=True, min=0),
    graph("Prefetches", "useful: there in time. late: compute had to wait for the rest of the copy. wasted: evicted "
          "before it was used; if these grow, lower actors.eviction.prefetch.", "none",
          ("sum by (outcome) (rate(patrickstar_chunk_prefetches_total{JOB}%s))" % RATE, "{{outcome}}"), stack=True, min=0),

    graph("Found in place", "Share of the chunks that the model asked for and found where it needed them; the others had to be "
          "brought first, or were on their way.", "percentunit",
          ('sum by (job_id) (rate(patrickstar_chunk_accesses_total{JOB, result="hit"}%s)) / '
           "sum by (job_id) (rate(patrickstar_chunk_accesses_total{JOB}%s))" % (RATE, RATE), "{{job_id}}"), min=0, max=1),
    graph("States of chunks", "Every second: compute: in use, hold: with contents, after_forward and after_backward: used by that pass, "
          "move: between slots, released: used up, free: never had contents.", "none",
          ("sum by (tier, state) (patrickstar_chunks{JOB})", "{{tier}} {{state}}"), stack=True, min=0),
    graph("Stays on the device", "Half of the chunks that left the device had been there for less, had been idle for less when "
          "they were evicted, and were used again after less. Short stays beside long idle times: another policy.", "s",
          (quantile("patrickstar_chunk_residency_seconds"), "stay"),
          (quantile("patrickstar_chunk_idle_before_eviction_seconds"), "idle before eviction"),
          (quantile("patrickstar_chunk_reuse_gap_seconds"), "between uses"), min=0),

    row("Waits and updates"),
    graph("What the device waits for", "Share of the steps' time, by cause. copy: more prefetch, or a slower model than "
          "link. slot, budget: more device memory or smaller chunks. optimizer: the host's cores are too slow.", "percentunit",
          ("sum by (cause) (rate(patrickstar_stall_duration_seconds_sum{JOB}%s)) / ignoring (cause) group_left "
           "sum(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), "{{cause}}"), stack=True, min=0),
    graph("Parameters stepped", "By the side that ran the optimizer for them.", "none",
          ("sum by (side) (rate(patrickstar_adam_parameters_total{JOB}%s))" % RATE, "{{side}}"), stack=True, min=0),
    graph("Optimizer on the host", "Share of the steps' time in which the host's cores ran the optimizer. It hides under "
          "compute as long as `optimizer` is not among the waits.", "percentunit",
          ("sum by (job_id) (rate(patrickstar_adam_host_duration_seconds_sum{JOB}%s)) / sum by (job_id) "
           "(rate(patrickstar_train_step_duration_seconds_sum{JOB}%s))" % (RATE, RATE), "{{job_id}}"), min=0),
]
