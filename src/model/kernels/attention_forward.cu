// Attention forward on 16-bit inputs: warp-specialised wgmma with bulk tensor copies.
//
// kernels   attention_forward_{bf16,f16}_d{64,96,128,144,192,256}
//           Take the narrowest width >= head_dim; head_dim is any multiple of 8 up to 256.
// grid      x = min(tiles, multiprocessors), tiles = ceil(time / 128) * batch * q_heads; any
//           x from 1 to tiles gives the same bits
// block     384 (one copying warpgroup, two computing ones)
// shared    bytes, dynamic: d64 99 456, d96 197 760, d128 197 760, d144 222 336, d192 222 336,
//           d256 230 528
// arguments
//   map_q, map_k, map_v  128-byte tensor maps by value: 16-bit type, rank 4, sizes
//                        {head_dim, time, heads, batch}, byte strides {token_stride * 2,
//                        head_dim * 2, time * token_stride * 2}, box {64, rows, 1, 1},
//                        element strides 1, swizzle 128B, no interleave, zero fill; base and
//                        strides are multiples of 16 bytes. rows: 64, but of keys and values
//                        the KEYS of a tile if that is no multiple of 64: d144 112, d192 112,
//                        d256 80. Backward's maps all have 64
//   map_q_tail, map_k_tail, map_v_tail   d144 only: the same with 16 columns in a box
//   o                    T*, [batch, time, q_heads, head_dim], 16-byte aligned
//   o_stride             i64, elements from one token to the next, multiple of 8
//   lse                  f32*, [batch, q_heads, time], natural logarithm
//   batch, time, q_heads, kv_heads, head_dim   i32; q_heads % kv_heads == 0
//   scale                f32, > 0
//   causal               i32, 0 or 1
//   window               i32, 0 for none, else query i sees keys j > i - window
//   seg_start, seg_end   i32*, [batch, time], or both null. They cut every sequence into
//                        contiguous segments: seg_start[i] <= i < seg_end[i]
//   schedule             i32*, [2], zeroed once when allocated; every launch leaves it zero.
//                        Launches that may run at the same time need one each

#include "attention_wgmma.cuh"

using namespace attention;

namespace {

constexpr int QUERIES = 64 * COMPUTE_GROUPS;
constexpr int TURN_BARRIER = 1;  // named barriers 1 and 2: whose turn it is to multiply

template <int WIDTH>
struct Layout {
  // Above 128 as many keys as shared memory holds beside the queries. At 144 and 192, tiles of
  // 80 with a second buffer of queries, or of 96, are not faster.
  static constexpr int KEYS = WIDTH > 192 ? 80 : WIDTH > 128 ? 112 : 128;
  static constexpr int STAGES = 2;                     // of keys and of values
  static constexpr int BUFFERS = WIDTH > 128 ? 1 : 2;  // of queries: the next tile loads early
  static constexpr int Q_BYTES = PANELS<WIDTH> * QUERIES * PANEL_ROW_BYTES;
  static constexpr int KV_BYTES = PANELS<WIDTH> * KEYS * PANEL_ROW_BYTES;
  static constexpr int K_OFFSET = BUFFERS * Q_BYTES;
  static constexpr int V_OFFSET = K_OFFSET + STAGES * KV_BYTES;
  static constexpr int BARRIERS = V_OFFSET + STAGES * KV_BYTES;
  static constexpr int BYTES = BARRIERS + 128 + 1024;  // the base is aligned to 1024
  static_assert(BYTES <= MAX_SHARED_BYTES);

  uint32_t base;
  __device__ __forceinline__ uint32_t q(int buffer) const { return base + buffer * Q_BYTES; }
  __device__ __forceinline__ uint32_t k(int stage) const {
    return base + K_OFFSET + stage * KV_BYTES;
  }
  __device__ __forceinline__ uint32_t v(int stage) const {
    return base + V_OFFSET + stage * KV_BYTES;
  }
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + BARRIERS + 8 * index;
  }
  __device__ __forceinline__ uint32_t q_full(int b) const { return barrier(b); }
  __device__ __forceinline__ uint32_t q_empty(int b) const { return barrier(2 + b); }
  __device__ __forceinline__ uint32_t k_full(int stage) const { return barrier(4 + stage); }
  __device__ __forceinline__ uint32_t k_empty(int stage) const { return barrier(6 + stage); }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return barrier(8 + stage); }
  __device__ __forceinline__ uint32_t v_empty(int stage) const { return barrier(10 + stage); }

  __device__ __forceinline__ uint32_t tile_full(int b) const { return barrier(12 + b); }
  __device__ __forceinline__ uint32_t tile_slot(int b) const { return barrier(14) + 4 * b; }

  __device__ __forceinline__ void init_barriers() const {
    for (int b = 0; b < BUFFERS; ++b) {
      barrier_init(q_full(b), 1);
      barrier_init(tile_full(b), 1);
      barrier_init(q_empty(b), COMPUTE_WARPS);
    }
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(k_full(stage), 1);
      barrier_init(v_full(stage), 1);
      barrier_init(k_empty(stage), COMPUTE_WARPS);
      barrier_init(v_empty(stage), COMPUTE_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

struct Maps {
  OperandMap q, k, v;
};

struct Arguments {
  void* o;
  int64_t o_stride;
  float* lse;
  int batch, time, q_heads, kv_heads, head_dim;
  float scale;
  int causal, window;
  const int* seg_start;
  const int* seg_end;
  int* schedule;
};

// The two computing warpgroups take turns in issuing products, so that the softmax of one
// runs under the products of the other.
__device__ __forceinline__ void wait_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(TURN_BARRIER + group) : "memory");
}

__device__ __forceinline__ void pass_turn(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(TURN_BARRIER + (group ^ 1)) : "memory");
}

// Softmax state of the two rows that a thread holds.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Turns raw scores into exp2(score * factor - peak * factor), updates the state and returns
  // in `shrink` what earlier results must be multiplied with.
  template <int TILES>
  __device__ __forceinline__ void update(float (&s)[TILES][4], float factor,
                                         float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = s[0][half * 2];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        top = fmaxf(top, fmaxf(s[tile][half * 2], s[tile][half * 2 + 1]));
      top = quad_max(top);
      const float before = peak[half];
      top = fmaxf(top, before);
      peak[half] = top;
      const float base = top == -INFINITY ? 0.0f : top * factor;  // nothing visible so far
      shrink[half] = exp2_fast(before * factor - base);
      float total = 0.0f;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        s[tile][half * 2] = exp2_fast(s[tile][half * 2] * factor - base);
        s[tile][half * 2 + 1] = exp2_fast(s[tile][half * 2 + 1] * factor - base);
        total += s[tile][half * 2] + s[tile][half * 2 + 1];
      }
      sum[half] = sum[half] * shrink[half] + total;
    }
  }
};

template <typename T, int WIDTH>
__device__ __forceinline__ void copy_loop(const Layout<WIDTH>& shared,
                                          const Arguments& args, const Maps& maps) {
  using L = Layout<WIDTH>;
  constexpr int KEYS = L::KEYS;
  const TileList list = query_tiles<QUERIES>(args);
  Ring<L::STAGES> ring;
  Ring<L::BUFFERS> q_ring;
  const int group = args.q_heads / args.kv_heads;
  for (int drawn = blockIdx.x;;) {
    const int b = q_ring.stage;
    barrier_wait(shared.q_empty(b), q_ring.phase ^ 1);
    store_tile(shared.tile_slot(b), drawn < list.total ? drawn : NO_TILE);
    barrier_arrive(shared.tile_full(b));
    if (drawn >= list.total) break;
    const QueryTile<QUERIES, KEYS> work(args, list, drawn);
    drawn = draw_piece(args.schedule);  // arrives while this tile is copied
    const int kv_head = work.head / group;
    barrier_expect(shared.q_full(b), COPIED_BYTES<QUERIES, WIDTH>);
    copy_tile<QUERIES, WIDTH>(shared.q(b), maps.q, shared.q_full(b), work.row, work.head,
                              work.batch);
    q_ring.advance();
#pragma unroll 1
    for (int tile = work.last_tile; tile >= work.first_tile; --tile) {
      const int s = ring.stage;
      barrier_wait(shared.k_empty(s), ring.phase ^ 1);
      barrier_expect(shared.k_full(s), COPIED_BYTES<KEYS, WIDTH>);
      copy_tile<KEYS, WIDTH>(shared.k(s), maps.k, shared.k_full(s), tile * KEYS, kv_head,
                             work.batch);
      barrier_wait(shared.v_empty(s), ring.phase ^ 1);
      barrier_expect(shared.v_full(s), COPIED_BYTES<KEYS, WIDTH>);
      copy_tile<KEYS, WIDTH>(shared.v(s), maps.v, shared.v_full(s), tile * KEYS, kv_head,
                             work.batch);
      ring.advance();
    }
  }
  leave_schedule(args.schedule);
}

template <typename T, int WIDTH>
__device__ __forceinline__ void compute_loop(const Layout<WIDTH>& shared,
                                             const Arguments& args, int group) {
  using L = Layout<WIDTH>;
  constexpr int KEYS = L::KEYS;
  const TileList list = query_tiles<QUERIES>(args);
  const int lane = threadIdx.x % 32;
  const int row_in_group = (threadIdx.x / 32 % 4) * 16 + lane / 4;
  const float factor = args.scale * LOG2_E;
  Ring<L::STAGES> k_ring, v_ring;
  Ring<L::BUFFERS> q_ring;
  if (group == 1) pass_turn(group);  // group 0 starts

  for (;;) {
    const int buffer = q_ring.stage;
    barrier_wait(shared.tile_full(buffer), q_ring.phase);
    const int drawn = load_tile(shared.tile_slot(buffer));
    if (drawn == NO_TILE) break;
    const QueryTile<QUERIES, KEYS> work(args, list, drawn);
    const Mask mask(args.time, args.causal, args.window, args.seg_start, args.seg_end,
                    work.batch);
    const int row = work.row + group * 64 + row_in_group;
    float o[WIDTH / 8][4];
    float s[KEYS / 8][4];
    uint32_t p[KEYS / 16][4];
    float shrink[2];
    Softmax softmax;
#pragma unroll
    for (int tile = 0; tile < WIDTH / 8; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[tile][i] = 0.0f;

    const auto hide_if_needed = [&](int tile) {
      if (tile * KEYS < work.all_from || (tile + 1) * KEYS > work.all_to)
        hide<KEYS>(s, mask, row, tile * KEYS);
    };

    const uint32_t q = shared.q(buffer) + group * 64 * PANEL_ROW_BYTES;
    barrier_wait(shared.q_full(buffer), q_ring.phase);
    q_ring.advance();
    barrier_wait(shared.k_full(k_ring.stage), k_ring.phase);
    wait_turn(group);
    wgmma_fence();
    multiply_rows<T, KEYS, WIDTH, 0, QUERIES, KEYS>(s, {}, q, shared.k(k_ring.stage));
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<0>();
    pin(s);
    warp_arrive(shared.k_empty(k_ring.stage));
    k_ring.advance();
    hide_if_needed(work.last_tile);
    softmax.update(s, factor, shrink);
    pack_operand<T>(p, s);

    for (int tile = work.last_tile - 1; tile >= work.first_tile; --tile) {
      // The scores of this tile and the values of the one before run together; the softmax
      // below overlaps with the latter and with the other group's products.
      barrier_wait(shared.k_full(k_ring.stage), k_ring.phase);
      wait_turn(group);
      pin(s);
      pin(o);
      wgmma_fence();
      multiply_rows<T, KEYS, WIDTH, 0, QUERIES, KEYS>(s, {}, q, shared.k(k_ring.stage));
      wgmma_commit();
      barrier_wait(shared.v_full(v_ring.stage), v_ring.phase);
      multiply_columns<T, KEYS, WIDTH>(o, p, shared.v(v_ring.stage));
      wgmma_commit();
      pass_turn(group);
      wgmma_wait<1>();
      pin(s);
      warp_arrive(shared.k_empty(k_ring.stage));
      k_ring.advance();
      hide_if_needed(tile);
      softmax.update(s, factor, shrink);
      wgmma_wait<0>();
      pin(o);
      warp_arrive(shared.v_empty(v_ring.stage));
      v_ring.advance();
#pragma unroll
      for (int i = 0; i < WIDTH / 8; ++i) {
        o[i][0] *= shrink[0];
        o[i][1] *= shrink[0];
        o[i][2] *= shrink[1];
        o[i][3] *= shrink[1];
      }
      pack_operand<T>(p, s);
    }
    warp_arrive(shared.q_empty(buffer));

    barrier_wait(shared.v_full(v_ring.stage), v_ring.phase);
    pin(o);
    wgmma_fence();
    multiply_columns<T, KEYS, WIDTH>(o, p, shared.v(v_ring.stage));
    wgmma_commit();
    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    wgmma_wait<0>();
    pin(o);
    warp_arrive(shared.v_empty(v_ring.stage));
    v_ring.advance();

    const int first_row = work.row + group * 64;
    T* rows = static_cast<T*>(args.o) +
              (static_cast<int64_t>(work.batch) * args.time + first_row) * args.o_stride +
              static_cast<int64_t>(work.head) * args.head_dim;
    store_rows<T, WIDTH>(rows, args.o_stride, args.time - first_row, args.head_dim, o,
                         1.0f / sum[0], 1.0f / sum[1]);
    if (lane % 4 == 0) {
      float* lse = args.lse +
                   (static_cast<int64_t>(work.batch) * args.q_heads + work.head) * args.time;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + 8 * half < args.time)
          lse[row + 8 * half] = softmax.peak[half] * args.scale + logf(sum[half]);
    }
  }
}

template <typename T, int WIDTH>
__device__ __forceinline__ void forward(const Maps& maps, const Arguments& args) {
  extern __shared__ uint8_t dynamic_shared[];
  const Layout<WIDTH> shared{(shared_address(dynamic_shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    prefetch_maps<WIDTH>(maps.q);
    prefetch_maps<WIDTH>(maps.k);
    prefetch_maps<WIDTH>(maps.v);
    shared.init_barriers();
  }
  __syncthreads();
  // Uniform over a warpgroup, and known to be so by the compiler.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) copy_loop<T, WIDTH>(shared, args, maps);
  } else {
    take_registers<240>();
    compute_loop<T, WIDTH>(shared, args, warpgroup - 1);
  }
}

}  // namespace

#define MAP(NAME) const __grid_constant__ TensorMap map_##NAME
#define PARAMETERS(TYPE)                                                                        \
  TYPE *o, int64_t o_stride, float *lse, int batch, int time, int q_heads, int kv_heads,        \
      int head_dim, float scale, int causal, int window, const int *seg_start,                  \
      const int *seg_end, int *schedule
#define ARGUMENTS                                                                               \
  {o,     o_stride, lse,    batch,  time,      q_heads, kv_heads,                               \
   head_dim, scale, causal, window, seg_start, seg_end, schedule}

#define ATTENTION_FORWARD(NAME, TYPE, WIDTH)                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward_##NAME##_d##WIDTH( \
      MAP(q), MAP(k), MAP(v), PARAMETERS(TYPE)) {                                               \
    forward<TYPE, WIDTH>({{map_q, map_q}, {map_k, map_k}, {map_v, map_v}}, ARGUMENTS);          \
  }
#define ATTENTION_FORWARD_TAIL(NAME, TYPE, WIDTH)                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward_##NAME##_d##WIDTH( \
      MAP(q), MAP(k), MAP(v), MAP(q_tail), MAP(k_tail), MAP(v_tail), PARAMETERS(TYPE)) {        \
    forward<TYPE, WIDTH>({{map_q, map_q_tail}, {map_k, map_k_tail}, {map_v, map_v_tail}},       \
                         ARGUMENTS);                                                            \
  }

ATTENTION_FORWARD(bf16, __nv_bfloat16, 64)
ATTENTION_FORWARD(bf16, __nv_bfloat16, 96)
ATTENTION_FORWARD(bf16, __nv_bfloat16, 128)
ATTENTION_FORWARD_TAIL(bf16, __nv_bfloat16, 144)
ATTENTION_FORWARD(bf16, __nv_bfloat16, 192)
ATTENTION_FORWARD(bf16, __nv_bfloat16, 256)
ATTENTION_FORWARD(f16, __half, 64)
ATTENTION_FORWARD(f16, __half, 96)
ATTENTION_FORWARD(f16, __half, 128)
ATTENTION_FORWARD_TAIL(f16, __half, 144)
ATTENTION_FORWARD(f16, __half, 192)
ATTENTION_FORWARD(f16, __half, 256)
