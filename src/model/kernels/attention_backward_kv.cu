// Attention backward on 16-bit inputs, keys and values: dk and dv.
//
// kernels   attention_backward_kv_{bf16,f16}_d{64,96,128,144,192,256}
//           A block owns a tile of keys and walks over the queries of all query heads that
//           share its key head.
// grid      x = min(tiles, multiprocessors), any x from 1 to tiles gives the same bits;
//           tiles = ceil(time / KEYS) * batch * kv_heads, KEYS = 128, from d144 on 64
// block     384
// shared    bytes, dynamic: d64 117 376, d96 232 064, d128 232 064, d144 232 192, d192 232 192,
//           d256 231 680
// arguments map_q, map_k, map_v, map_do (tensor maps by value); d144 then map_q_tail,
//           map_k_tail, map_v_tail, map_do_tail; stats (f32*),
//           d_k (T*), dk_stride (i64), d_v (T*), dv_stride (i64),
//           batch, time, q_heads, kv_heads, head_dim (i32), scale (f32),
//           causal, window (i32), seg_start, seg_end (i32*), schedule (i32*)
// See attention_backward.cuh for the order of launches and for stats.

#include "attention_backward_keys.cuh"

using namespace attention;

namespace {

// A warpgroup that computes both gradients of its 64 keys.
template <typename T, int WIDTH>
__device__ __forceinline__ void kv_compute_loop(const KvLayout<WIDTH>& shared,
                                                const BackwardArguments& args,
                                                int key_of_group, const KeyRows<T>& d_k,
                                                const KeyRows<T>& d_v) {
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
    float sum_k[WIDTH / 8][4];
    float sum_v[WIDTH / 8][4];
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
        wgmma_wait<0>();
        wgmma_fence();
        multiply_rows<T, QUERIES, WIDTH, 0, L::KEYS, QUERIES>(s, {}, k, shared.q(stage));
        wgmma_commit();
        barrier_wait(shared.do_full(stage), ring.phase);
        wgmma_fence();
        multiply_rows<T, QUERIES, WIDTH, 0, L::KEYS, QUERIES>(d_p, {}, v, shared.d_o(stage));
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        pin(sum_k);
        pin(sum_v);
        if (held >= 0) warp_arrive(shared.empty(held));
        held = stage;

        const int query = tile * QUERIES;
        if (query < share.plain_from || query + QUERIES > share.plain_to)
          hide_transposed<QUERIES>(s, mask, key, query);
        probabilities<QUERIES>(s, factor, shared.lse(stage));
        pack_operand<T>(p, s);
        wgmma_fence();
        multiply_columns<T, QUERIES, WIDTH>(sum_v, p, shared.d_o(stage));
        wgmma_commit();
        wgmma_wait<1>();
        pin(d_p);
#pragma unroll
        for (int t = 0; t < QUERIES / 8; ++t)
          score_gradients(d_p[t], s[t], pair_of_tile(shared.delta(stage), t));
        pack_operand<T>(d_s, d_p);
        wgmma_fence();
        multiply_columns<T, QUERIES, WIDTH>(sum_k, d_s, shared.q(stage));
        wgmma_commit();
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

    store_keys<T, WIDTH>(d_k, work, args, key_of_group, sum_k, args.scale);
    store_keys<T, WIDTH>(d_v, work, args, key_of_group, sum_v, 1.0f);
  }
}

// The first warpgroup of a pair: probabilities, and dv. The scores of a tile and dv of the one
// before run together.
template <typename T, int WIDTH>
__device__ __forceinline__ void kv_values_loop(const KvLayout<WIDTH>& shared,
                                               const BackwardArguments& args,
                                               const KeyRows<T>& d_v) {
  using L = KvLayout<WIDTH>;
  constexpr int QUERIES = L::QUERIES;
  const TileList list = key_tiles<WIDTH>(args);
  const int row_in_group = (threadIdx.x / 32 % 4) * 16 + threadIdx.x % 32 / 4;
  const float factor = args.scale * LOG2_E;
  const uint32_t k = shared.k(0);
  Ring<L::STAGES> ring;
  Ring<L::HANDED> out;
  uint32_t kv_phase = 0;

  for (;; kv_phase ^= 1) {
    barrier_wait(shared.tile_full(0), kv_phase);
    const int drawn = load_tile(shared.tile_slot(0));
    if (drawn == NO_TILE) break;
    const KvWork<WIDTH> work(args, list, drawn);
    const Mask mask = args.mask(work.batch);
    const KvShare<WIDTH> share(work, mask, work.key);
    const int group = args.q_heads / args.kv_heads;
    const int tiles = uniform((work.end_tile - work.first_tile) * group);
    float sum[WIDTH / 8][4];
    float s[QUERIES / 8][4];
    uint32_t p[QUERIES / 16][4];
    clear(sum);
    Held<L::HELD> held;
    barrier_wait(shared.kv_full(0), kv_phase);
    load_operand<L::KEYS>(held, k);
    if constexpr (L::HELD == WIDTH) warp_arrive(shared.kv_empty(0));

    int query = work.first_tile * QUERIES;
    const auto hand_out = [&] {
      if (query < share.plain_from || query + QUERIES > share.plain_to)
        hide_transposed<QUERIES>(s, mask, work.key + row_in_group, query);
      query += QUERIES;
      if (query >= work.end_tile * QUERIES) query = work.first_tile * QUERIES;  // next head
      probabilities<QUERIES>(s, factor, shared.lse(ring.stage));
      barrier_wait(shared.handed_empty(out.stage), out.phase ^ 1);
#pragma unroll
      for (int t = 0; t < QUERIES / 8; ++t)
        store_16_bytes(shared.handed(out.stage) + t * 128 * 16, s[t]);
      warp_arrive(shared.handed_full(out.stage));
      out.advance();
    };

    barrier_wait(shared.q_full(ring.stage), ring.phase);
    wgmma_fence();
    multiply_rows<T, QUERIES, WIDTH, L::HELD, L::KEYS, QUERIES>(s, held, k,
                                                                shared.q(ring.stage));
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    hand_out();
    pack_operand<T>(p, s);
#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      const Ring<L::STAGES> before = ring;
      ring.advance();
      barrier_wait(shared.q_full(ring.stage), ring.phase);
      pin(s);
      pin(sum);
      wgmma_fence();
      multiply_rows<T, QUERIES, WIDTH, L::HELD, L::KEYS, QUERIES>(s, held, k,
                                                                  shared.q(ring.stage));
      wgmma_commit();
      barrier_wait(shared.do_full(before.stage), before.phase);
      multiply_columns<T, QUERIES, WIDTH>(sum, p, shared.d_o(before.stage));
      wgmma_commit();
      wgmma_wait<1>();
      pin(s);
      hand_out();
      wgmma_wait<0>();
      pin(sum);
      warp_arrive(shared.empty(before.stage));
      pack_operand<T>(p, s);
    }
    barrier_wait(shared.do_full(ring.stage), ring.phase);
    pin(sum);
    wgmma_fence();
    multiply_columns<T, QUERIES, WIDTH>(sum, p, shared.d_o(ring.stage));
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum);
    warp_arrive(shared.empty(ring.stage));
    ring.advance();
    if constexpr (L::HELD < WIDTH) warp_arrive(shared.kv_empty(0));
    store_keys<T, WIDTH>(d_v, work, args, 0, sum, 1.0f);
  }
}

// The second warpgroup of a pair: gradients of scores, and dk, in the same rhythm.
template <typename T, int WIDTH>
__device__ __forceinline__ void kv_keys_loop(const KvLayout<WIDTH>& shared,
                                             const BackwardArguments& args,
                                             const KeyRows<T>& d_k) {
  using L = KvLayout<WIDTH>;
  constexpr int QUERIES = L::QUERIES;
  const TileList list = key_tiles<WIDTH>(args);
  const uint32_t v = shared.v(0);
  Ring<L::STAGES> ring;
  Ring<L::HANDED> in;
  uint32_t kv_phase = 0;

  for (;; kv_phase ^= 1) {
    barrier_wait(shared.tile_full(0), kv_phase);
    const int drawn = load_tile(shared.tile_slot(0));
    if (drawn == NO_TILE) break;
    const KvWork<WIDTH> work(args, list, drawn);
    const int group = args.q_heads / args.kv_heads;
    const int tiles = uniform((work.end_tile - work.first_tile) * group);
    float sum[WIDTH / 8][4];
    float d_p[QUERIES / 8][4];
    uint32_t d_s[QUERIES / 16][4];
    clear(sum);
    Held<L::HELD> held;
    barrier_wait(shared.kv_full(0), kv_phase);
    load_operand<L::KEYS>(held, v);
    if constexpr (L::HELD == WIDTH) warp_arrive(shared.kv_empty(0));

    const auto take_in = [&] {
      barrier_wait(shared.handed_full(in.stage), in.phase);
#pragma unroll
      for (int t = 0; t < QUERIES / 8; ++t) {
        float p[4];
        load_16_bytes(p, shared.handed(in.stage) + t * 128 * 16);
        score_gradients(d_p[t], p, pair_of_tile(shared.delta(ring.stage), t));
      }
      warp_arrive(shared.handed_empty(in.stage));
      in.advance();
    };

    barrier_wait(shared.do_full(ring.stage), ring.phase);
    wgmma_fence();
    multiply_rows<T, QUERIES, WIDTH, L::HELD, L::KEYS, QUERIES>(d_p, held, v,
                                                                shared.d_o(ring.stage));
    wgmma_commit();
    wgmma_wait<0>();
    pin(d_p);
    take_in();
    pack_operand<T>(d_s, d_p);
#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      const Ring<L::STAGES> before = ring;
      ring.advance();
      barrier_wait(shared.do_full(ring.stage), ring.phase);
      pin(d_p);
      pin(sum);
      wgmma_fence();
      multiply_rows<T, QUERIES, WIDTH, L::HELD, L::KEYS, QUERIES>(d_p, held, v,
                                                                  shared.d_o(ring.stage));
      wgmma_commit();
      barrier_wait(shared.q_full(before.stage), before.phase);
      multiply_columns<T, QUERIES, WIDTH>(sum, d_s, shared.q(before.stage));
      wgmma_commit();
      wgmma_wait<1>();
      pin(d_p);
      take_in();
      wgmma_wait<0>();
      pin(sum);
      warp_arrive(shared.empty(before.stage));
      pack_operand<T>(d_s, d_p);
    }
    barrier_wait(shared.q_full(ring.stage), ring.phase);
    pin(sum);
    wgmma_fence();
    multiply_columns<T, QUERIES, WIDTH>(sum, d_s, shared.q(ring.stage));
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum);
    warp_arrive(shared.empty(ring.stage));
    ring.advance();
    if constexpr (L::HELD < WIDTH) warp_arrive(shared.kv_empty(0));
    store_keys<T, WIDTH>(d_k, work, args, 0, sum, args.scale);
  }
}

template <typename T, int WIDTH>
__device__ __forceinline__ void backward_kv(const BackwardMaps& maps,
                                            const BackwardArguments& args, const float* stats,
                                            const KeyRows<T>& d_k, const KeyRows<T>& d_v) {
  using L = KvLayout<WIDTH>;
  extern __shared__ uint8_t dynamic_shared[];
  const L shared{(shared_address(dynamic_shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    maps.prefetch<WIDTH>();
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) kv_copy_loop<WIDTH>(shared, args, maps, stats);
  } else {
    take_registers<240>();
    if constexpr (!L::PAIRED)
      kv_compute_loop<T, WIDTH>(shared, args, (warpgroup - 1) * 64, d_k, d_v);
    else if (warpgroup == 1)
      kv_values_loop<T, WIDTH>(shared, args, d_v);
    else
      kv_keys_loop<T, WIDTH>(shared, args, d_k);
  }
}

}  // namespace

#define MAP(NAME) const __grid_constant__ TensorMap map_##NAME
#define PARAMETERS(TYPE)                                                                        \
  const float *stats, TYPE *d_k, int64_t dk_stride, TYPE *d_v, int64_t dv_stride, int batch,    \
      int time, int q_heads, int kv_heads, int head_dim, float scale, int causal, int window,   \
      const int *seg_start, const int *seg_end, int *schedule
#define ARGUMENTS                                                                               \
  {batch,  time,   q_heads,   kv_heads, head_dim, scale,                                        \
   causal, window, seg_start, seg_end,  schedule},                                              \
      stats, {d_k, dk_stride}, {d_v, dv_stride}

#define ATTENTION_BACKWARD_KV(NAME, TYPE, WIDTH)                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
      attention_backward_kv_##NAME##_d##WIDTH(MAP(q), MAP(k), MAP(v), MAP(do),                  \
                                              PARAMETERS(TYPE)) {                               \
    backward_kv<TYPE, WIDTH>(                                                                   \
        {{map_q, map_q}, {map_k, map_k}, {map_v, map_v}, {map_do, map_do}}, ARGUMENTS);         \
  }
#define ATTENTION_BACKWARD_KV_TAIL(NAME, TYPE, WIDTH)                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
      attention_backward_kv_##NAME##_d##WIDTH(MAP(q), MAP(k), MAP(v), MAP(do), MAP(q_tail),     \
                                              MAP(k_tail), MAP(v_tail), MAP(do_tail),           \
                                              PARAMETERS(TYPE)) {                               \
    backward_kv<TYPE, WIDTH>({{map_q, map_q_tail},                                              \
                              {map_k, map_k_tail},                                              \
                              {map_v, map_v_tail},                                              \
                              {map_do, map_do_tail}},                                           \
                             ARGUMENTS);                                                        \
  }

ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 64)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 96)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 128)
ATTENTION_BACKWARD_KV_TAIL(bf16, __nv_bfloat16, 144)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 192)
ATTENTION_BACKWARD_KV(bf16, __nv_bfloat16, 256)
ATTENTION_BACKWARD_KV(f16, __half, 64)
ATTENTION_BACKWARD_KV(f16, __half, 96)
ATTENTION_BACKWARD_KV(f16, __half, 128)
ATTENTION_BACKWARD_KV_TAIL(f16, __half, 144)
ATTENTION_BACKWARD_KV(f16, __half, 192)
ATTENTION_BACKWARD_KV(f16, __half, 256)
