"""Causal attention in PyTorch on given shapes, timed as `patrickstar bench kernels` times its own.

usage: sdpa.py BATCHxHEADSxTIMExHEAD...      prints a JSON array of {"forward_s", "backward_s"}
"""

import json
import statistics
import sys

import torch
import torch.nn.functional as F

CALLS, WARM_UP = 15, 3
ahead = [torch.empty(512 << 20, dtype=torch.uint8, device="cuda") for _ in range(2)]
scanned = torch.zeros(64 << 20, dtype=torch.bfloat16, device="cuda")


def median(work):
    """Seconds of a call, each after a copy and a read that leave nothing of it in the cache and nothing to be written."""
    spans = []
    for call in range(WARM_UP + CALLS):
        ahead[0].copy_(ahead[1])
        scanned.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        if call >= WARM_UP:
            spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3


results = []
for shape in sys.argv[1:]:
    batch, heads, time, head = (int(x) for x in shape.split("x"))
    # Queries, keys and values lie side by side, as a linear layer writes them.
    packed = torch.randn(batch, time, 3, heads, head, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    upstream = torch.randn_like(out)
    with torch.no_grad():
        forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    backward = median(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True))
    results.append({"forward_s": forward, "backward_s": backward})
print(json.dumps(results))
