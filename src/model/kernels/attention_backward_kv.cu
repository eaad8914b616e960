// Attention backward on 16-bit inputs, keys and values: dk and dv.
//
// kernels   attention_backward_kv_{bf16,f16}_d{64,96,128,256}
//           A block owns a tile of keys and walks over the queries of all query heads that
//           share its key head.
// grid      x = min(tiles, multiprocessors), any x from 1 to tiles gives the same bits;
//           tiles = ceil(time / KEYS) * batch * kv_heads, KEYS = 128 (d256: 64)
// block     384
// shared    bytes, dynamic: d64 117 376, d96 232 064, d128 232 064, d256 198 720
// arguments map_q, map_k, map_v, map_do (tensor maps by value), stats (f32*),
//           d_k (T*), dk_stride (i64), d_v (T*), dv_stride (i64),
//           batch, time, q_heads, kv_heads, head_dim (i32), scale (f32),
//           causal, window (i32), seg_start, seg_end (i32*), schedule (i32*)
// See attention_backward.cuh for the order of launches and for stats.

#include "attention_backward.cuh"

using namespace attention;

namespace {

// ---------------------------------------------------------------------------------------
// dk and dv. Scores are computed transposed (keys down, queries across), so probabilities
// and their gradients already lie in registers as left operands of the second products.
//
// Up to width 128 each warpgroup owns 64 of 128 keys. At 256 two accumulators do not fit in
// one warpgroup's registers: both work on the same 64 keys, one for dv, one for dk.
// ---------------------------------------------------------------------------------------
template <int WIDTH>
struct KvLayout {
  static constexpr bool SPLIT_ROLES = WIDTH > 128;
  static constexpr int KEYS = SPLIT_ROLES ? 64 : 128;
  static constexpr int QUERIES = 64;
  static constexpr int STAGES = SPLIT_ROLES ? 2 : 3;    // of queries
  static constexpr int BUFFERS = SPLIT_ROLES ? 1 : 2;   // of keys: the next tile loads early
  static constexpr int PANELS = (WIDTH + PANEL - 1) / PANEL;
  static constexpr int KV_BYTES = PANELS * KEYS * PANEL_ROW_BYTES;
  static constexpr int Q_BYTES = PANELS * QUERIES * PANEL_ROW_BYTES;
  static constexpr int STATS_BYTES = QUERIES * 4;
  static constexpr int Q_OFFSET = 2 * BUFFERS * KV_BYTES;
  static constexpr int DO_OFFSET = Q_OFFSET + STAGES * Q_BYTES;
  static constexpr int LSE_OFFSET = DO_OFFSET + STAGES * Q_BYTES;
  static constexpr int DELTA_OFFSET = LSE_OFFSET + STAGES * STATS_BYTES;
  static constexpr int BARRIERS = DELTA_OFFSET + STAGES * STATS_BYTES;

  uint32_t base;
  __device__ __forceinline__ uint32_t k(int b) const { return base + 2 * b * KV_BYTES; }
  __device__ __forceinline__ uint32_t v(int b) const { return k(b) + KV_BYTES; }
  __device__ __forceinline__ uint32_t q(int s) const { return base + Q_OFFSET + s * Q_BYTES; }
  __device__ __forceinline__ uint32_t d_o(int s) const {
    return base + DO_OFFSET + s * Q_BYTES;
  }
  __device__ __forceinline__ uint32_t lse(int s) const {
    return base + LSE_OFFSET + s * STATS_BYTES;
  }
  __device__ __forceinline__ uint32_t delta(int s) const {
    return base + DELTA_OFFSET + s * STATS_BYTES;
  }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + BARRIERS + 8 * i; }
  __device__ __forceinline__ uint32_t kv_full(int b) const { return barrier(b); }
  __device__ __forceinline__ uint32_t kv_empty(int b) const { return barrier(BUFFERS + b); }
  __device__ __forceinline__ uint32_t tile_full(int b) const { return barrier(2 * BUFFERS + b); }
  __device__ __forceinline__ uint32_t q_full(int s) const { return barrier(3 * BUFFERS + s); }
  __device__ __forceinline__ uint32_t do_full(int s) const { return q_full(STAGES + s); }
  __device__ __forceinline__ uint32_t empty(int s) const { return q_full(2 * STAGES + s); }

  __device__ __forceinline__ uint32_t tile_slot(int b) const {
    return q_full(3 * STAGES) + 4 * b;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int b = 0; b < BUFFERS; ++b) {
      barrier_init(kv_full(b), 1);
      barrier_init(tile_full(b), 1);
      barrier_init(kv_empty(b), COMPUTE_WARPS);
    }
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(q_full(s), 1);
      barrier_init(do_full(s), 1);
      barrier_init(empty(s), COMPUTE_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

template <int WIDTH>
struct KvWork {
  using L = KvLayout<WIDTH>;
  int batch, head, key;      // key head, first key of the tile
  int first_tile, end_tile;  // query tiles

  __device__ __forceinline__ KvWork(const BackwardArguments& args, const TileList& list,
                                    int tile) {
    int batch_head, rank;
    list.decode(tile, batch_head, rank);  // with a causal mask early keys have most readers
    batch = batch_head / args.kv_heads;
    head = batch_head - batch * args.kv_heads;
    key = rank * L::KEYS;
    const Mask mask = args.mask(batch);
    const int key_end = min(key + L::KEYS, args.time);
    first_tile = mask.first_query(key) / L::QUERIES;
    end_tile = (mask.end_query(key_end) + L::QUERIES - 1) / L::QUERIES;
  }
};

// The part of a tile that one warpgroup works on.
template <int WIDTH>
struct KvShare {
  int first_tile, end_tile;  // query tiles that see any of its keys
  int plain_from, plain_to;  // query rows that see all of its keys

  __device__ __forceinline__ KvShare(const KvWork<WIDTH>& work, const Mask& mask, int key) {
    constexpr int QUERIES = KvLayout<WIDTH>::QUERIES;
    const int first = min(key, mask.time - 1);
    const int end = min(key + 64, mask.time);
    first_tile = uniform(max(work.first_tile, mask.first_query(first) / QUERIES));
    end_tile = uniform(min(work.end_tile, (mask.end_query(end) + QUERIES - 1) / QUERIES));
    if (key >= mask.time) end_tile = first_tile;  // nothing to do past the last key
    // The last key decides from where on, the first key up to where, all are seen.
    plain_from = mask.first_query(end - 1);
    plain_to = mask.end_query(first + 1);
    if (plain_to == mask.time) plain_to = end_tile * QUERIES;  // missing rows weigh 0
  }
};

template <int WIDTH>
__device__ __forceinline__ TileList key_tiles(const BackwardArguments& args) {
  constexpr int KEYS = KvLayout<WIDTH>::KEYS;
  const int64_t bytes = static_cast<int64_t>(args.time) * args.head_dim * 4;
  return TileList(args.batch * args.kv_heads, (args.time + KEYS - 1) / KEYS,
                  bytes * (args.q_heads / args.kv_heads));
}

template <int WIDTH>
__device__ __forceinline__ void kv_copy_loop(const KvLayout<WIDTH>& shared,
                                             const BackwardArguments& args,
                                             const BackwardMaps& maps, const float* stats) {
  using L = KvLayout<WIDTH>;
  const TileList list = key_tiles<WIDTH>(args);
  Ring<L::STAGES> ring;
  Ring<L::BUFFERS> kv_ring;
  const int group = args.q_heads / args.kv_heads;
  for (int drawn = blockIdx.x;;) {
    const int b = kv_ring.stage;
    barrier_wait(shared.kv_empty(b), kv_ring.phase ^ 1);
    store_tile(shared.tile_slot(b), drawn < list.total ? drawn : NO_TILE);
    barrier_arrive(shared.tile_full(b));
    if (drawn >= list.total) break;
    const KvWork<WIDTH> work(args, list, drawn);
    drawn = draw_tile(args.schedule);  // arrives while this tile is copied
    barrier_expect(shared.kv_full(b), 2 * L::KV_BYTES);
    copy_tile<L::KEYS, WIDTH>(shared.k(b), maps.k, shared.kv_full(b), work.key, work.head,
                              work.batch);
    copy_tile<L::KEYS, WIDTH>(shared.v(b), maps.v, shared.kv_full(b), work.key, work.head,
                              work.batch);
    kv_ring.advance();
    for (int member = 0; member < group; ++member) {
      const int head = work.head * group + member;
#pragma unroll 1
      for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
        const int s = ring.stage;
        const int row = tile * L::QUERIES;
        barrier_wait(shared.empty(s), ring.phase ^ 1);
        barrier_expect(shared.q_full(s), L::Q_BYTES + L::STATS_BYTES);
        copy_tile<L::QUERIES, WIDTH>(shared.q(s), maps.q, shared.q_full(s), row, head,
                                     work.batch);
        const int64_t at = args.stats_at(work.batch, head) + row;
        copy_linear(shared.lse(s), stats + at, L::STATS_BYTES, shared.q_full(s));
        barrier_expect(shared.do_full(s), L::Q_BYTES + L::STATS_BYTES);
        copy_tile<L::QUERIES, WIDTH>(shared.d_o(s), maps.d_o, shared.do_full(s), row, head,
                                     work.batch);
        copy_linear(shared.delta(s), stats + args.stats_half() + at, L::STATS_BYTES,
                    shared.do_full(s));
        ring.advance();
      }
    }
  }
  leave_schedule(args.schedule);
}

__device__ __forceinline__ float2 load_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

template <int QUERIES>
__device__ __forceinline__ void hide_transposed(float (&s)[QUERIES / 8][4], const Mask& mask,
                                                int key, int query_of_tile) {
  const int query = query_of_tile + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int tile = 0; tile < QUERIES / 8; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = mask.first_key(query + tile * 8 + i);
      const int end = mask.end_key(query + tile * 8 + i);
      if (key < first || key >= end) s[tile][i] = -INFINITY;
      if (key + 8 < first || key + 8 >= end) s[tile][2 + i] = -INFINITY;
    }
}

template <typename T, int WIDTH, bool FOR_V, bool FOR_K>
__device__ __forceinline__ void kv_compute_loop(const KvLayout<WIDTH>& shared,
                                                const BackwardArguments& args,
                                                int key_of_group, T* d_k, int64_t dk_stride,
                                                T* d_v, int64_t dv_stride) {
  using L = KvLayout<WIDTH>;
  constexpr int QUERIES = L::QUERIES;
  const TileList list = key_tiles<WIDTH>(args);
  const int lane = threadIdx.x % 32;
  const int row_in_group = (threadIdx.x / 32 % 4) * 16 + lane / 4;
  const float factor = args.scale * LOG2_E;
  const int group = args.q_heads / args.kv_heads;
  Ring<L::STAGES> ring;
  Ring<L::BUFFERS> kv_ring;

  for (;;) {
    barrier_wait(shared.tile_full(kv_ring.stage), kv_ring.phase);
    const int drawn = load_tile(shared.tile_slot(kv_ring.stage));
    if (drawn == NO_TILE) break;
    const KvWork<WIDTH> work(args, list, drawn);
    const Mask mask = args.mask(work.batch);
    const KvShare<WIDTH> share(work, mask, work.key + key_of_group);
    const int key = work.key + key_of_group + row_in_group;
    float sum_k[FOR_K ? WIDTH / 8 : 1][4];
    float sum_v[FOR_V ? WIDTH / 8 : 1][4];
    clear(sum_k);
    clear(sum_v);

    // Tiles that only the other warpgroup needs. They are waited for all the same: arriving
    // a round early would be taken for the current round.
    const auto skip = [&](int from, int to) {
#pragma unroll 1
      for (int tile = from; tile < to; ++tile) {
        barrier_wait(shared.q_full(ring.stage), ring.phase);
        barrier_wait(shared.do_full(ring.stage), ring.phase);
        warp_arrive(shared.empty(ring.stage));
        ring.advance();
      }
    };

    const uint32_t k = shared.k(kv_ring.stage) + key_of_group * PANEL_ROW_BYTES;
    const uint32_t v = shared.v(kv_ring.stage) + key_of_group * PANEL_ROW_BYTES;
    barrier_wait(shared.kv_full(kv_ring.stage), kv_ring.phase);
    for (int member = 0; member < group; ++member) {
      int held = -1;  // stage whose products are still running
      skip(work.first_tile, share.first_tile);
#pragma unroll 1
      for (int tile = share.first_tile; tile < share.end_tile; ++tile) {
        const int stage = ring.stage;
        float s[QUERIES / 8][4];
        float d_p[QUERIES / 8][4];
        uint32_t p[QUERIES / 16][4];
        uint32_t d_s[QUERIES / 16][4];

        barrier_wait(shared.q_full(stage), ring.phase);
        // Two accumulators leave no registers for operands of products still running: those
        // of the tile before end first, and the other warpgroup keeps the cores busy.
        if constexpr (FOR_V && FOR_K) wgmma_wait<0>();
        wgmma_fence();
        multiply_rows<T, QUERIES, WIDTH, L::KEYS, QUERIES>(s, k, shared.q(stage));
        wgmma_commit();
        barrier_wait(shared.do_full(stage), ring.phase);
        if constexpr (FOR_K) {
          wgmma_fence();
          multiply_rows<T, QUERIES, WIDTH, L::KEYS, QUERIES>(d_p, v, shared.d_o(stage));
          wgmma_commit();
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(s);
        pin(sum_k);
        pin(sum_v);
        if (held >= 0) warp_arrive(shared.empty(held));
        held = stage;

        const int query = tile * QUERIES;
        if (query < share.plain_from || query + QUERIES > share.plain_to)
          hide_transposed<QUERIES>(s, mask, key, query);
#pragma unroll
        for (int t = 0; t < QUERIES / 8; ++t) {
          const float2 lse = load_pair(shared.lse(stage) + (t * 8 + 2 * (lane % 4)) * 4);
          s[t][0] = exp2_fast(s[t][0] * factor - lse.x);
          s[t][1] = exp2_fast(s[t][1] * factor - lse.y);
          s[t][2] = exp2_fast(s[t][2] * factor - lse.x);
          s[t][3] = exp2_fast(s[t][3] * factor - lse.y);
        }
        if constexpr (FOR_V) {
          pack_operand<T>(p, s);
          wgmma_fence();
          multiply_columns<T, QUERIES, WIDTH>(sum_v, p, shared.d_o(stage));
          wgmma_commit();
        }
        if constexpr (FOR_K) {
          wgmma_wait<FOR_V ? 1 : 0>();
          pin(d_p);
#pragma unroll
          for (int t = 0; t < QUERIES / 8; ++t) {
            const float2 delta = load_pair(shared.delta(stage) + (t * 8 + 2 * (lane % 4)) * 4);
            d_p[t][0] = s[t][0] * (d_p[t][0] - delta.x);
            d_p[t][1] = s[t][1] * (d_p[t][1] - delta.y);
            d_p[t][2] = s[t][2] * (d_p[t][2] - delta.x);
            d_p[t][3] = s[t][3] * (d_p[t][3] - delta.y);
          }
          pack_operand<T>(d_s, d_p);
          wgmma_fence();
          multiply_columns<T, QUERIES, WIDTH>(sum_k, d_s, shared.q(stage));
          wgmma_commit();
        }
        ring.advance();
      }
      wgmma_wait<0>();
      pin(sum_k);
      pin(sum_v);
      if (held >= 0) warp_arrive(shared.empty(held));
      skip(share.end_tile, work.end_tile);
    }
    warp_arrive(shared.kv_empty(kv_ring.stage));
    kv_ring.advance();

    const int first = work.key + key_of_group;
    const int64_t token = static_cast<int64_t>(work.batch) * args.time + first;
    const int64_t column = static_cast<int64_t>(work.head) * args.head_dim;
    if constexpr (FOR_K)
      store_rows<T, WIDTH>(d_k + token * dk_stride + column, dk_stride, args.time - first,
                           args.head_dim, sum_k, args.scale, args.scale);
    if constexpr (FOR_V)
      store_rows<T, WIDTH>(d_v + token * dv_stride + column, dv_stride, args.time - first,
                           args.head_dim, sum_v, 1.0f, 1.0f);
  }
}

template <typename T, int WIDTH>
__device__ __forceinline__ void backward_kv(const BackwardMaps& maps,
                                            const BackwardArguments& args, const float* stats,
                                            T* d_k, int64_t dk_stride, T* d_v,
                                            int64_t dv_stride) {
  using L = KvLayout<WIDTH>;
  extern __shared__ uint8_t dynamic_shared[];
  const L shared{(shared_address(dynamic_shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    maps.prefetch();
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) kv_copy_loop<WIDTH>(shared, args, maps, stats);
  } else {
    take_registers<240>();
    if constexpr (!L::SPLIT_ROLES) {
      kv_compute_loop<T, WIDTH, true, true>(shared, args, (warpgroup - 1) * 64, d_k,
                                            dk_stride, d_v, dv_stride);
    } else if (warpgroup == 1) {
      kv_compute_loop<T, WIDTH, false, true>(shared, args, 0, d_k, dk_stride, d_v,
                                             dv_stride);
    } else {
      kv_compute_loop<T, WIDTH, true, false>(shared, args, 0, d_k, dk_stride, d_v,
                                             dv_stride);
    }
  }
}

}  // namespace

#define ATTENTION_BACKWARD_KV(NAME, TYPE, WIDTH)                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
      attention_backward_kv_##NAME##_d##WIDTH(                                                  \
          const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,     \
          const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_do,    \
          const float* stats, TYPE* d_k, int64_t dk_stride, TYPE* d_v, int64_t dv_stride,       \
          int batch, int time, int q_heads, int kv_heads, int head_dim, float scale,            \
          int causal, int window, const int* seg_start, const int* seg_end, int* schedule) {    \
    backward_kv<TYPE, WIDTH>({map_q, map_k, map_v, map_do},                                     \
                             {batch, time, q_heads, kv_heads, head_dim, scale, causal, window,  \
                              seg_start, seg_end, schedule},                                    \
                             stats, d_k, dk_stride, d_v, dv_stride);                            \
  }

ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 64)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 96)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 128)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 256)
ATTENTION_BACKWARD_KV(f16, __half, 64)
ATTENTION_BACKWARD_KV(f16, __half, 96)
ATTENTION_BACKWARD_KV(f16, __half, 128)
ATTENTION_BACKWARD_KV(f16, __half, 256)
