// What the kernels of attention_backward_kv.cu share: layout, order of work, copies, and the
// arithmetic of one tile.
#pragma once

#include "attention_backward.cuh"

namespace attention {

// ---------------------------------------------------------------------------------------
// dk and dv. Scores are computed transposed (keys down, queries across), so probabilities
// and their gradients already lie in registers as left operands of the second products.
//
// Up to width 128 each warpgroup owns 64 of 128 keys. Above, two accumulators do not fit in
// one warpgroup's registers: both work on the same 64 keys. The first computes probabilities
// and dv and hands the probabilities, in fp32, through shared memory to the second, which
// computes their gradients and dk.
// ---------------------------------------------------------------------------------------
template <int WIDTH>
struct KvLayout {
  static constexpr bool PAIRED = WIDTH > 128;
  static constexpr int KEYS = PAIRED ? 64 : 128;
  static constexpr int QUERIES = 64;
  static constexpr int STAGES = WIDTH > 192 ? 2 : 3;   // of queries
  static constexpr int BUFFERS = PAIRED ? 1 : 2;       // of keys: the next tile loads early
  // Columns of keys or values that a warpgroup of a pair holds in registers: products then
  // read less shared memory, and the next tile loads early into the buffer.
  static constexpr int HELD = PAIRED && WIDTH <= 192 ? WIDTH : 0;
  static constexpr int HANDED = PAIRED ? 2 : 0;        // buffers of probabilities on their way
  static constexpr int KV_BYTES = PANELS<WIDTH> * KEYS * PANEL_ROW_BYTES;
  static constexpr int Q_BYTES = PANELS<WIDTH> * QUERIES * PANEL_ROW_BYTES;
  static constexpr int HANDED_BYTES = KEYS * QUERIES * 4;
  static constexpr int STATS_BYTES = QUERIES * 4;
  static constexpr int Q_OFFSET = 2 * BUFFERS * KV_BYTES;
  static constexpr int DO_OFFSET = Q_OFFSET + STAGES * Q_BYTES;
  static constexpr int HANDED_OFFSET = DO_OFFSET + STAGES * Q_BYTES;
  static constexpr int LSE_OFFSET = HANDED_OFFSET + HANDED * HANDED_BYTES;
  static constexpr int DELTA_OFFSET = LSE_OFFSET + STAGES * STATS_BYTES;
  static constexpr int BARRIERS = DELTA_OFFSET + STAGES * STATS_BYTES;
  static constexpr int BYTES = BARRIERS + (PAIRED ? 256 : 128) + 1024;
  static_assert(BYTES <= MAX_SHARED_BYTES);

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

  // A tile of probabilities goes from each warp of the first group to one of the second, and
  // from thread to thread: both hold the same places of the same matrix.
  __device__ __forceinline__ uint32_t handed(int i) const {
    return base + HANDED_OFFSET + i * HANDED_BYTES + threadIdx.x % 128 * 16;
  }
  __device__ __forceinline__ uint32_t handed_full(int i) const {
    return q_full(3 * STAGES + 1 + 4 * i) + threadIdx.x / 32 % 4 * 8;
  }
  __device__ __forceinline__ uint32_t handed_empty(int i) const {
    return handed_full(HANDED + i);
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
    for (int i = 0; i < 8 * HANDED; ++i) barrier_init(q_full(3 * STAGES + 1 + i), 1);
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
  constexpr int copied = COPIED_BYTES<L::QUERIES, WIDTH> + L::STATS_BYTES;
  for (int drawn = blockIdx.x;;) {
    const int b = kv_ring.stage;
    barrier_wait(shared.kv_empty(b), kv_ring.phase ^ 1);
    store_tile(shared.tile_slot(b), drawn < list.total ? drawn : NO_TILE);
    barrier_arrive(shared.tile_full(b));
    if (drawn >= list.total) break;
    const KvWork<WIDTH> work(args, list, drawn);
    drawn = draw_piece(args.schedule);  // arrives while this tile is copied
    barrier_expect(shared.kv_full(b), 2 * COPIED_BYTES<L::KEYS, WIDTH>);
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
        barrier_expect(shared.q_full(s), copied);
        copy_tile<L::QUERIES, WIDTH>(shared.q(s), maps.q, shared.q_full(s), row, head,
                                     work.batch);
        const int64_t at = args.stats_at(work.batch, head) + row;
        copy_linear(shared.lse(s), stats + at, L::STATS_BYTES, shared.q_full(s));
        barrier_expect(shared.do_full(s), copied);
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

// Of a tile's queries' statistics at `address`, those of a thread's two in the t-th eight.
__device__ __forceinline__ float2 pair_of_tile(uint32_t address, int t) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address + (t * 8 + 2 * (threadIdx.x % 4)) * 4));
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

// exp2(score * factor - lse), with the logsumexps of a tile's queries at `lse`.
template <int QUERIES>
__device__ __forceinline__ void probabilities(float (&s)[QUERIES / 8][4], float factor,
                                              uint32_t lse) {
#pragma unroll
  for (int t = 0; t < QUERIES / 8; ++t) {
    const float2 of = pair_of_tile(lse, t);
    s[t][0] = exp2_fast(s[t][0] * factor - of.x);
    s[t][1] = exp2_fast(s[t][1] * factor - of.y);
    s[t][2] = exp2_fast(s[t][2] * factor - of.x);
    s[t][3] = exp2_fast(s[t][3] * factor - of.y);
  }
}

__device__ __forceinline__ void score_gradients(float (&d_p)[4], const float (&p)[4],
                                                float2 delta) {
  d_p[0] = p[0] * (d_p[0] - delta.x);
  d_p[1] = p[1] * (d_p[1] - delta.y);
  d_p[2] = p[2] * (d_p[2] - delta.x);
  d_p[3] = p[3] * (d_p[3] - delta.y);
}

__device__ __forceinline__ void store_16_bytes(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

__device__ __forceinline__ void load_16_bytes(float (&x)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

// Where the gradient of keys or values goes.
template <typename T>
struct KeyRows {
  T* rows;
  int64_t stride;
};

template <typename T, int WIDTH>
__device__ __forceinline__ void store_keys(const KeyRows<T>& to, const KvWork<WIDTH>& work,
                                           const BackwardArguments& args, int key_of_group,
                                           const float (&sum)[WIDTH / 8][4], float scale) {
  const int first = work.key + key_of_group;
  const int64_t token = static_cast<int64_t>(work.batch) * args.time + first;
  T* rows = to.rows + token * to.stride + static_cast<int64_t>(work.head) * args.head_dim;
  store_rows<T, WIDTH>(rows, to.stride, args.time - first, args.head_dim, sum, scale, scale);
}

}  // namespace attention
