// What the two backward kernels share: arguments, tensor maps and row statistics.
//
// The backward pass is two launches, in this order, on one stream:
//   attention_backward_q_*   (attention_backward_q.cu)    dq, row statistics -> stats
//   attention_backward_kv_*  (attention_backward_kv.cu)   dk, dv
// Both recompute the scores: that costs two of seven products, and in return every sum has
// one owner and one order, so results have the same bits in every run without turn-taking.
//
// stats is scratch, f32[2, batch, q_heads, time_padded], 16-byte aligned, with
// time_padded = ceil(time / 128) * 128. Tensor maps, masks and the meaning of the arguments
// are those of attention_forward.cu; all boxes have 64 rows.
#pragma once

#include "attention_wgmma.cuh"

namespace attention {

constexpr int TIME_TILE = 128;

struct BackwardArguments {
  int batch, time, q_heads, kv_heads, head_dim;
  float scale;
  int causal, window;
  const int* seg_start;
  const int* seg_end;
  int* schedule;

  // Where a head's logsumexps begin in stats; its sums of do * o lie stats_half() further.
  __device__ __forceinline__ int64_t stats_at(int batch_, int head) const {
    const int64_t time_padded =
        (static_cast<int64_t>(time) + TIME_TILE - 1) / TIME_TILE * TIME_TILE;
    return (static_cast<int64_t>(batch_) * q_heads + head) * time_padded;
  }
  __device__ __forceinline__ int64_t stats_half() const { return stats_at(batch, 0); }

  __device__ __forceinline__ Mask mask(int batch_) const {
    return Mask(time, causal, window, seg_start, seg_end, batch_);
  }
};

struct BackwardMaps {
  OperandMap q, k, v, d_o;

  template <int WIDTH>
  __device__ __forceinline__ void prefetch() const {
    prefetch_maps<WIDTH>(q);
    prefetch_maps<WIDTH>(k);
    prefetch_maps<WIDTH>(v);
    prefetch_maps<WIDTH>(d_o);
  }
};

template <int TILES>
__device__ __forceinline__ void clear(float (&values)[TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) values[tile][i] = 0.0f;
}

}  // namespace attention
