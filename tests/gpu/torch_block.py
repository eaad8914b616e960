"""One transformer layer in PyTorch, with the shapes and the recompute of `patrickstar bench block`.

usage: torch_block.py [HIDDEN HEADS BATCH SEQ SECONDS]      prints one JSON line
"""

import json
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

hidden, heads, batch, seq = (int(x) for x in (sys.argv[1:5] or (4096, 32, 16, 1024)))
seconds = float(sys.argv[5]) if len(sys.argv) > 5 else 3.0


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, t, hidden))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


layer = Layer().to(device="cuda", dtype=torch.bfloat16)
x = torch.randn(batch, seq, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
upstream = torch.randn_like(x)


def measure(limit):
    torch.cuda.synchronize()
    began, passes = time.time(), 0
    while time.time() - began < limit:
        for _ in range(10):
            # Gradients accumulate, as micro-batches do.
            checkpoint(layer, x, use_reentrant=False).backward(upstream)
        passes += 10
        torch.cuda.synchronize()
    return (time.time() - began) / passes


measure(seconds / 10)
block_s = measure(seconds)
tokens = batch * seq
flops = 72 * hidden**2 * tokens + 6 * tokens * seq * hidden
print(json.dumps({"block_s": block_s, "tflops": flops / block_s / 1e12}))
