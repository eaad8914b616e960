// Attention backward on 16-bit inputs, queries: row statistics and dq.
//
// kernels   attention_backward_q_{bf16,f16}_d{64,96,128,144,192,256}
//           A block owns a tile of queries and walks over the keys. On the way it leaves, per
//           query, the sum of do * o and the logsumexp in base 2 in stats.
// grid      x = min(tiles, multiprocessors), any x from 1 to tiles gives the same bits;
//           tiles = ceil(time / 128) * batch * q_heads
// block     384
// shared    bytes, dynamic: d64 99 584, d96 197 888, d128 197 888, d144 222 464, d192 222 464,
//           d256 230 656
// arguments map_q, map_k, map_v, map_do (tensor maps by value); d144 then map_q_tail,
//           map_k_tail, map_v_tail, map_do_tail; o (T*), o_stride (i64),
//           lse (f32*), stats (f32*), d_q (T*), dq_stride (i64),
//           batch, time, q_heads, kv_heads, head_dim (i32), scale (f32),
//           causal, window (i32), seg_start, seg_end (i32*), schedule (i32*)
// See attention_backward.cuh for the order of launches and for stats.

#include "attention_backward.cuh"

using namespace attention;

namespace {

template <typename T>
__device__ __forceinline__ float dot8(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w};
  const uint32_t y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x0, x1, y0, y1;
    unpack<T>(x[i], x0, x1);
    unpack<T>(y[i], y0, y1);
    sum = fmaf(x0, y0, sum);
    sum = fmaf(x1, y1, sum);
  }
  return sum;
}

constexpr int QUERIES = 64 * COMPUTE_GROUPS;

template <int WIDTH>
struct QLayout {
  // Columns of the queries' operands that move to registers when a tile starts: products then
  // read half as much shared memory, and once all have moved the buffer is free for the next
  // tile. 256 has no registers for that, 144 for most; at 192 the 128 columns that would fit
  // gain nothing. At 64 ptxas 13.0 lets d_s overwrite held_do, which gives a wrong dq.
  static constexpr int HELD_Q = WIDTH > 64 && WIDTH <= 144 ? WIDTH : 0;
  static constexpr int HELD_DO = WIDTH == 144 ? 96 : HELD_Q;
  static constexpr bool ALL_HELD = HELD_Q == WIDTH && HELD_DO == WIDTH;
  static constexpr int KEYS = 64;
  // A tile's keys are needed for longer than its values.
  static constexpr int K_STAGES = WIDTH > 192 ? 2 : WIDTH > 128 ? 3 : 4;
  static constexpr int V_STAGES = WIDTH > 192 ? 1 : WIDTH > 128 ? 2 : 4;
  static constexpr int Q_BYTES = PANELS<WIDTH> * QUERIES * PANEL_ROW_BYTES;
  static constexpr int KV_BYTES = PANELS<WIDTH> * KEYS * PANEL_ROW_BYTES;
  static constexpr int K_OFFSET = 2 * Q_BYTES;
  static constexpr int V_OFFSET = K_OFFSET + K_STAGES * KV_BYTES;
  static constexpr int BARRIERS = V_OFFSET + V_STAGES * KV_BYTES;
  static constexpr int BYTES = BARRIERS + 256 + 1024;  // the base is aligned to 1024
  static_assert(BYTES <= MAX_SHARED_BYTES);

  uint32_t base;
  __device__ __forceinline__ uint32_t q() const { return base; }
  __device__ __forceinline__ uint32_t d_o() const { return base + Q_BYTES; }
  __device__ __forceinline__ uint32_t k(int s) const { return base + K_OFFSET + s * KV_BYTES; }
  __device__ __forceinline__ uint32_t v(int s) const { return base + V_OFFSET + s * KV_BYTES; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + BARRIERS + 8 * i; }
  __device__ __forceinline__ uint32_t q_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t q_empty() const { return barrier(1); }
  __device__ __forceinline__ uint32_t tile_full() const { return barrier(2); }
  __device__ __forceinline__ uint32_t tile_slot() const { return barrier(3); }
  __device__ __forceinline__ uint32_t k_full(int s) const { return barrier(4 + s); }
  __device__ __forceinline__ uint32_t k_empty(int s) const { return barrier(8 + s); }
  __device__ __forceinline__ uint32_t v_full(int s) const { return barrier(12 + s); }
  __device__ __forceinline__ uint32_t v_empty(int s) const { return barrier(16 + s); }

  __device__ __forceinline__ void init_barriers() const {
    barrier_init(q_full(), 1);
    barrier_init(q_empty(), COMPUTE_WARPS);
    barrier_init(tile_full(), 1);
    for (int s = 0; s < K_STAGES; ++s) {
      barrier_init(k_full(s), 1);
      barrier_init(k_empty(s), COMPUTE_WARPS);
    }
    for (int s = 0; s < V_STAGES; ++s) {
      barrier_init(v_full(s), 1);
      barrier_init(v_empty(s), COMPUTE_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

template <typename T>
struct QueryRows {
  const T* o;
  int64_t o_stride;
  const float* lse;
  float* stats;
  T* d_q;
  int64_t dq_stride;
};

// A thread's quarter of two rows of o, in flight while the tile's other operands arrive.
template <typename T, int WIDTH>
struct RowOutput {
  static constexpr int PIECES = (WIDTH + 31) / 32;  // of 8 columns, every fourth one
  uint4 piece[2][PIECES];

  __device__ __forceinline__ RowOutput(const QueryRows<T>& rows, const BackwardArguments& args,
                                       int batch, int head, int row) {
    const int quarter = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = min(row + 8 * half, args.time - 1);
      const T* o = rows.o + (static_cast<int64_t>(batch) * args.time + at) * rows.o_stride +
                   static_cast<int64_t>(head) * args.head_dim;
#pragma unroll
      for (int i = 0; i < PIECES; ++i) {
        const int column = (quarter + 4 * i) * 8;
        piece[half][i] = column < args.head_dim
                             ? __ldg(reinterpret_cast<const uint4*>(o + column))
                             : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // The row's o . do; `d_o` is the address of its row in the first panel.
  __device__ __forceinline__ float dot(int half, uint32_t d_o) const {
    const int quarter = threadIdx.x % 4;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int column = quarter + 4 * i;  // in 16-byte pieces, eight in a panel
      const uint32_t panel = d_o + i / 2 * QUERIES * PANEL_ROW_BYTES;
      // Behind the columns of a tail may lie anything.
      if (WIDTH % 32 == 0 || column < WIDTH / 8)
        sum += dot8<T>(piece[half][i], load_16_bytes(panel + swizzled(column % 8, d_o)));
    }
    return quad_sum(sum);
  }
};

template <typename T, int WIDTH>
__device__ __forceinline__ void q_copy_loop(const QLayout<WIDTH>& shared,
                                            const BackwardArguments& args,
                                            const BackwardMaps& maps) {
  using L = QLayout<WIDTH>;
  const TileList list = query_tiles<QUERIES>(args);
  Ring<L::K_STAGES> k_ring;
  Ring<L::V_STAGES> v_ring;
  uint32_t q_phase = 0;
  const int group = args.q_heads / args.kv_heads;
  for (int drawn = blockIdx.x;;) {
    barrier_wait(shared.q_empty(), q_phase ^ 1);
    store_tile(shared.tile_slot(), drawn < list.total ? drawn : NO_TILE);
    barrier_arrive(shared.tile_full());
    if (drawn >= list.total) break;
    const QueryTile<QUERIES, L::KEYS> work(args, list, drawn);
    drawn = draw_piece(args.schedule);  // arrives while this tile is copied
    const int kv_head = work.head / group;
    barrier_expect(shared.q_full(), 2 * COPIED_BYTES<QUERIES, WIDTH>);
    copy_tile<QUERIES, WIDTH>(shared.q(), maps.q, shared.q_full(), work.row, work.head,
                              work.batch);
    copy_tile<QUERIES, WIDTH>(shared.d_o(), maps.d_o, shared.q_full(), work.row, work.head,
                              work.batch);
    q_phase ^= 1;
#pragma unroll 1
    for (int tile = work.last_tile; tile >= work.first_tile; --tile) {
      const uint32_t k_full = shared.k_full(k_ring.stage);
      const uint32_t v_full = shared.v_full(v_ring.stage);
      barrier_wait(shared.k_empty(k_ring.stage), k_ring.phase ^ 1);
      barrier_expect(k_full, COPIED_BYTES<L::KEYS, WIDTH>);
      copy_tile<L::KEYS, WIDTH>(shared.k(k_ring.stage), maps.k, k_full, tile * L::KEYS, kv_head,
                                work.batch);
      k_ring.advance();
      barrier_wait(shared.v_empty(v_ring.stage), v_ring.phase ^ 1);
      barrier_expect(v_full, COPIED_BYTES<L::KEYS, WIDTH>);
      copy_tile<L::KEYS, WIDTH>(shared.v(v_ring.stage), maps.v, v_full, tile * L::KEYS, kv_head,
                                work.batch);
      v_ring.advance();
    }
  }
  leave_schedule(args.schedule);
}

template <typename T, int WIDTH>
__device__ __forceinline__ void q_compute_loop(const QLayout<WIDTH>& shared,
                                               const BackwardArguments& args, int group,
                                               const QueryRows<T>& out) {
  using L = QLayout<WIDTH>;
  const TileList list = query_tiles<QUERIES>(args);
  constexpr int KEYS = L::KEYS;
  const int lane = threadIdx.x % 32;
  const int row_in_group = (threadIdx.x / 32 % 4) * 16 + lane / 4;
  const float factor = args.scale * LOG2_E;
  const uint32_t q = shared.q() + group * 64 * PANEL_ROW_BYTES;
  const uint32_t d_o = shared.d_o() + group * 64 * PANEL_ROW_BYTES;
  Ring<L::K_STAGES> k_ring;
  Ring<L::V_STAGES> v_ring;
  uint32_t q_phase = 0;

  for (;;) {
    barrier_wait(shared.tile_full(), q_phase);
    const int drawn = load_tile(shared.tile_slot());
    if (drawn == NO_TILE) break;
    const QueryTile<QUERIES, KEYS> work(args, list, drawn);
    const Mask mask = args.mask(work.batch);
    // The keys that this warpgroup's 64 rows need, and those that all of them see.
    const int first = work.row + group * 64;
    const int share_first = uniform(mask.first_key(first) / KEYS);
    const int share_last = uniform((mask.end_key(first + 63) - 1) / KEYS);
    const int all_from = mask.first_key(first + 63);
    const int all_to = mask.end_key(first);
    const int row = first + row_in_group;
    float sum[WIDTH / 8][4];
    clear(sum);
    int held = -1;  // stage whose keys are still being multiplied

    const int64_t at = args.stats_at(work.batch, work.head) + row;
    const int64_t lse_at =
        (static_cast<int64_t>(work.batch) * args.q_heads + work.head) * args.time + row;
    const RowOutput<T, WIDTH> output(out, args, work.batch, work.head, row);
    float lse[2], delta[2];
    // Rows that do not exist get probability exp2(-inf) = 0.
    lse[0] = row < args.time ? LOG2_E * __ldg(out.lse + lse_at) : INFINITY;
    lse[1] = row + 8 < args.time ? LOG2_E * __ldg(out.lse + lse_at + 8) : INFINITY;
    barrier_wait(shared.q_full(), q_phase);
    q_phase ^= 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = output.dot(half, d_o + (row_in_group + 8 * half) * PANEL_ROW_BYTES);
      if (lane % 4 == 0) {
        out.stats[at + 8 * half] = lse[half];
        out.stats[args.stats_half() + at + 8 * half] = delta[half];
      }
    }
    Held<L::HELD_Q> held_q;
    Held<L::HELD_DO> held_do;
    load_operand<QUERIES>(held_q, q);
    load_operand<QUERIES>(held_do, d_o);
    if constexpr (L::ALL_HELD) warp_arrive(shared.q_empty());

    // Tiles that only the other warpgroup needs. They are waited for all the same: arriving
    // a round early would be taken for the current round.
    const auto skip = [&](int from, int to) {
#pragma unroll 1
      for (int tile = from; tile > to; --tile) {
        barrier_wait(shared.k_full(k_ring.stage), k_ring.phase);
        barrier_wait(shared.v_full(v_ring.stage), v_ring.phase);
        warp_arrive(shared.k_empty(k_ring.stage));
        warp_arrive(shared.v_empty(v_ring.stage));
        k_ring.advance();
        v_ring.advance();
      }
    };

    skip(work.last_tile, share_last);
#pragma unroll 1
    for (int tile = share_last; tile >= share_first; --tile) {
      const int stage = k_ring.stage;
      float s[KEYS / 8][4];
      float d_p[KEYS / 8][4];
      uint32_t d_s[KEYS / 16][4];

      barrier_wait(shared.k_full(stage), k_ring.phase);
      wgmma_fence();
      multiply_rows<T, KEYS, WIDTH, L::HELD_Q, QUERIES, KEYS>(s, held_q, q, shared.k(stage));
      wgmma_commit();
      barrier_wait(shared.v_full(v_ring.stage), v_ring.phase);
      wgmma_fence();
      multiply_rows<T, KEYS, WIDTH, L::HELD_DO, QUERIES, KEYS>(d_p, held_do, d_o,
                                                               shared.v(v_ring.stage));
      wgmma_commit();
      wgmma_wait<1>();
      pin(s);
      pin(sum);
      if (held >= 0) warp_arrive(shared.k_empty(held));
      held = stage;

      if (tile * KEYS < all_from || (tile + 1) * KEYS > all_to)
        hide<KEYS>(s, mask, row, tile * KEYS);
#pragma unroll
      for (int t = 0; t < KEYS / 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][i] = exp2_fast(s[t][i] * factor - lse[i / 2]);
      wgmma_wait<0>();
      pin(d_p);
      warp_arrive(shared.v_empty(v_ring.stage));
      v_ring.advance();
#pragma unroll
      for (int t = 0; t < KEYS / 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][i] *= d_p[t][i] - delta[i / 2];
      pack_operand<T>(d_s, s);
      wgmma_fence();
      multiply_columns<T, KEYS, WIDTH>(sum, d_s, shared.k(stage));
      wgmma_commit();
      k_ring.advance();
    }
    wgmma_wait<0>();
    pin(sum);
    if (held >= 0) warp_arrive(shared.k_empty(held));
    if constexpr (!L::ALL_HELD) warp_arrive(shared.q_empty());
    skip(share_first - 1, work.first_tile - 1);

    T* rows = out.d_q + (static_cast<int64_t>(work.batch) * args.time + first) * out.dq_stride +
              static_cast<int64_t>(work.head) * args.head_dim;
    store_rows<T, WIDTH>(rows, out.dq_stride, args.time - first, args.head_dim, sum, args.scale,
                         args.scale);
  }
}

template <typename T, int WIDTH>
__device__ __forceinline__ void backward_q(const BackwardMaps& maps,
                                           const BackwardArguments& args,
                                           const QueryRows<T>& out) {
  extern __shared__ uint8_t dynamic_shared[];
  const QLayout<WIDTH> shared{(shared_address(dynamic_shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    maps.prefetch<WIDTH>();
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) q_copy_loop<T, WIDTH>(shared, args, maps);
  } else {
    take_registers<240>();
    q_compute_loop<T, WIDTH>(shared, args, warpgroup - 1, out);
  }
}

}  // namespace

#define MAP(NAME) const __grid_constant__ TensorMap map_##NAME
#define PARAMETERS(TYPE)                                                                        \
  const TYPE *o, int64_t o_stride, const float *lse, float *stats, TYPE *d_q,                   \
      int64_t dq_stride, int batch, int time, int q_heads, int kv_heads, int head_dim,          \
      float scale, int causal, int window, const int *seg_start, const int *seg_end,            \
      int *schedule
#define ARGUMENTS                                                                               \
  {batch,  time,   q_heads,   kv_heads, head_dim, scale,                                        \
   causal, window, seg_start, seg_end,  schedule},                                              \
      {o, o_stride, lse, stats, d_q, dq_stride}

#define ATTENTION_BACKWARD_Q(NAME, TYPE, WIDTH)                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
      attention_backward_q_##NAME##_d##WIDTH(MAP(q), MAP(k), MAP(v), MAP(do),                   \
                                             PARAMETERS(TYPE)) {                                \
    backward_q<TYPE, WIDTH>(                                                                    \
        {{map_q, map_q}, {map_k, map_k}, {map_v, map_v}, {map_do, map_do}}, ARGUMENTS);         \
  }
#define ATTENTION_BACKWARD_Q_TAIL(NAME, TYPE, WIDTH)                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
      attention_backward_q_##NAME##_d##WIDTH(MAP(q), MAP(k), MAP(v), MAP(do), MAP(q_tail),      \
                                             MAP(k_tail), MAP(v_tail), MAP(do_tail),            \
                                             PARAMETERS(TYPE)) {                                \
    backward_q<TYPE, WIDTH>({{map_q, map_q_tail},                                               \
                             {map_k, map_k_tail},                                               \
                             {map_v, map_v_tail},                                               \
                             {map_do, map_do_tail}},                                            \
                            ARGUMENTS);                                                         \
  }

ATTENTION_BACKWARD_Q(bf16, __nv_bfloat16, 64)
ATTENTION_BACKWARD_Q(bf16, __nv_bfloat16, 96)
ATTENTION_BACKWARD_Q(bf16, __nv_bfloat16, 128)
ATTENTION_BACKWARD_Q_TAIL(bf16, __nv_bfloat16, 144)
ATTENTION_BACKWARD_Q(bf16, __nv_bfloat16, 192)
ATTENTION_BACKWARD_Q(bf16, __nv_bfloat16, 256)
ATTENTION_BACKWARD_Q(f16, __half, 64)
ATTENTION_BACKWARD_Q(f16, __half, 96)
ATTENTION_BACKWARD_Q(f16, __half, 128)
ATTENTION_BACKWARD_Q_TAIL(f16, __half, 144)
ATTENTION_BACKWARD_Q(f16, __half, 192)
ATTENTION_BACKWARD_Q(f16, __half, 256)
