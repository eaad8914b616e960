// Shared pieces of the attention kernels: which keys a query may see, the order in which
// tiles are worked on, barriers, bulk tensor copies and the store of accumulators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "schedule.cuh"

namespace attention {

// One warpgroup copies, the others compute 64 rows each.
constexpr int COMPUTE_GROUPS = 2;
constexpr int COMPUTE_WARPS = 4 * COMPUTE_GROUPS;
constexpr int THREADS = 128 * (COMPUTE_GROUPS + 1);

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---------------------------------------------------------------------------------------
// Visibility. Every mask (causal, sliding window, packed segments, end of the sequence) lets
// query i see one interval of keys [first, end). Both bounds never decrease with i, so a
// tile of queries is described by its first and its last row.
// ---------------------------------------------------------------------------------------
struct Mask {
  int time;
  int causal;
  int window;            // 0: unlimited
  const int* seg_start;  // of this batch entry, or null
  const int* seg_end;

  __device__ __forceinline__ Mask(int time_, int causal_, int window_, const int* start,
                                  const int* end, int batch)
      : time(time_), causal(causal_), window(window_) {
    const int64_t offset = static_cast<int64_t>(batch) * time_;
    seg_start = start ? start + offset : nullptr;
    seg_end = start ? end + offset : nullptr;
  }

  __device__ __forceinline__ int first_key(int query) const {
    const int row = min(query, time - 1);
    int first = window > 0 ? max(row - window + 1, 0) : 0;
    if (seg_start) first = max(first, __ldg(seg_start + row));
    return first;
  }

  __device__ __forceinline__ int end_key(int query) const {
    const int row = min(query, time - 1);
    int end = causal ? row + 1 : time;
    if (seg_start) end = min(end, __ldg(seg_end + row));
    return end;
  }

  // The queries that see at least one of the keys [key, key_end), as [first, end).
  // A token belongs to its own segment, so a key's segment bounds its readers too.
  __device__ __forceinline__ int first_query(int key) const {
    int first = causal ? key : 0;
    if (seg_start) first = max(first, __ldg(seg_start + key));
    return first;
  }

  __device__ __forceinline__ int end_query(int key_end) const {
    int end = window > 0 ? min(time, key_end - 1 + window) : time;
    if (seg_start) end = min(end, __ldg(seg_end + key_end - 1));
    return end;
  }
};

// ---------------------------------------------------------------------------------------
// Tile order. Heads are taken in sections whose re-read operands fit in the L2 cache; within
// a section the tiles with most work come first. Which block takes a tile does not matter for
// the result, so blocks help themselves: the first tile of a block is its index, the copying
// thread draws further ones.
// ---------------------------------------------------------------------------------------
constexpr int64_t SECTION_BYTES = 20 << 20;

struct TileList {
  int heads;     // batch * heads
  int rows;      // tiles of one head
  int section;   // heads in one section
  int total;

  __device__ __forceinline__ TileList(int heads_, int rows_, int64_t bytes_per_head)
      : heads(heads_), rows(rows_) {
    const int64_t fitting = SECTION_BYTES / bytes_per_head;
    section = static_cast<int>(fitting < 1 ? 1 : (fitting > heads_ ? heads_ : fitting));
    total = heads_ * rows_;
  }

  // `rank` is 0 for the heaviest tiles of a section.
  __device__ __forceinline__ void decode(int tile, int& head, int& rank) const {
    const int per_section = section * rows;
    const int number = tile / per_section;
    const int rest = tile - number * per_section;
    const int here = min(section, heads - number * section);
    rank = rest / here;
    head = number * section + rest - rank * here;
  }
};

template <int QUERIES, typename Arguments>
__device__ __forceinline__ TileList query_tiles(const Arguments& args) {
  const int64_t kv_bytes = static_cast<int64_t>(args.time) * args.head_dim * 4;
  return TileList(args.batch * args.q_heads, (args.time + QUERIES - 1) / QUERIES,
                  max(kv_bytes * args.kv_heads / args.q_heads, static_cast<int64_t>(1)));
}

// One tile of queries and the key tiles it needs, [first_tile, last_tile], taken downwards.
template <int QUERIES, int KEYS>
struct QueryTile {
  int batch, head, row;
  int first_tile, last_tile;
  int all_from, all_to;  // keys that every row of the tile sees

  template <typename Arguments>
  __device__ __forceinline__ QueryTile(const Arguments& args, const TileList& list, int tile) {
    int batch_head, rank;
    list.decode(tile, batch_head, rank);
    batch = batch_head / args.q_heads;
    head = batch_head - batch * args.q_heads;
    row = (args.causal ? list.rows - 1 - rank : rank) * QUERIES;
    const Mask mask(args.time, args.causal, args.window, args.seg_start, args.seg_end, batch);
    first_tile = mask.first_key(row) / KEYS;
    last_tile = (mask.end_key(row + QUERIES - 1) - 1) / KEYS;
    all_from = mask.first_key(row + QUERIES - 1);
    all_to = mask.end_key(row);
  }
};

// Scores of keys that a row does not see become -inf. `row` is the first of the thread's two.
template <int KEYS>
__device__ __forceinline__ void hide(float (&s)[KEYS / 8][4], const Mask& mask, int row,
                                     int key_of_tile) {
  const int key = key_of_tile + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = mask.first_key(row + 8 * half) - key;
    const int end = mask.end_key(row + 8 * half) - key;
#pragma unroll
    for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = tile * 8 + i;
        if (column < first || column >= end) s[tile][half * 2 + i] = -INFINITY;
      }
  }
}

// ---------------------------------------------------------------------------------------
// Barriers in shared memory
// ---------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A warp's one arrival at a barrier that counts warps. What its other lanes have read from the
// buffer comes before it: instructions that merely gather the lanes do not order their memory.
__device__ __forceinline__ void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// For a value that all threads of a warp agree on: the reduction leaves it in a uniform
// register, so the compiler knows, and keeps loops and descriptors uniform too.
__device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(x)));
}

// Tile numbers travel from the copying thread to the computing ones through these.
constexpr int NO_TILE = -1;

__device__ __forceinline__ void store_tile(uint32_t slot, int tile) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(slot), "r"(tile) : "memory");
}

__device__ __forceinline__ int load_tile(uint32_t slot) {
  int tile;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(tile) : "r"(slot) : "memory");
  return uniform(tile);
}

// Position in a ring of buffers. A consumer waits for `phase`, a producer for `phase ^ 1`.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---------------------------------------------------------------------------------------
// Bulk copies into shared memory
// ---------------------------------------------------------------------------------------
struct alignas(64) TensorMap {  // same size and alignment as the driver's CUtensorMap
  unsigned char opaque[128];
};

constexpr int PANEL = 64;             // 16-bit columns in one 128-byte swizzled row
constexpr int PANEL_ROW_BYTES = 128;

template <int WIDTH>
constexpr int PANELS = (WIDTH + PANEL - 1) / PANEL;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

constexpr int MAX_SHARED_BYTES = 227 * 1024;  // of a block

// Rows of a box, which has 64 columns: 64, or the whole tile if it is no multiple of 64.
template <int ROWS>
constexpr int BOX_ROWS = ROWS % 64 == 0 ? 64 : ROWS;

// At width 144 the last panel holds 16 columns and has maps of its own, with boxes that narrow:
// nothing is written that nobody reads. Its rows are 128 bytes apart all the same.
constexpr int TAIL_COLUMNS = 16;
template <int WIDTH>
constexpr bool HAS_TAIL = WIDTH % PANEL == TAIL_COLUMNS;

// The maps of one operand: of whole panels, and of the tail where a width has one.
struct OperandMap {
  const TensorMap &whole, &tail;
};

template <int WIDTH>
__device__ __forceinline__ void prefetch_maps(const OperandMap& maps) {
  prefetch_map(maps.whole);
  if constexpr (HAS_TAIL<WIDTH>) prefetch_map(maps.tail);
}

// What a copy of ROWS rows adds to its barrier.
template <int ROWS, int WIDTH>
constexpr int COPIED_BYTES =
    HAS_TAIL<WIDTH> ? ROWS * WIDTH * 2 : ROWS * PANELS<WIDTH> * PANEL_ROW_BYTES;

// Copies rows [row, row + ROWS) of one head as ceil(WIDTH / 64) panels of ROWS x 128 bytes.
// Rows past the end of the sequence and columns past the head dimension arrive as zeros, but
// behind the columns of a tail lies what was there before.
template <int ROWS, int WIDTH>
__device__ __forceinline__ void copy_tile(uint32_t target, const OperandMap& maps,
                                          uint32_t barrier, int row, int head, int batch) {
#pragma unroll
  for (int column = 0; column < WIDTH; column += PANEL) {
    const TensorMap& map = HAS_TAIL<WIDTH> && column + PANEL > WIDTH ? maps.tail : maps.whole;
#pragma unroll
    for (int box = 0; box < ROWS; box += BOX_ROWS<ROWS>) {
      const uint32_t place = target + (column / PANEL * ROWS + box) * PANEL_ROW_BYTES;
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
          "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(place),
          "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row + box), "r"(head),
          "r"(batch), "r"(barrier)
          : "memory");
    }
  }
}

__device__ __forceinline__ void copy_linear(uint32_t target, const void* source, int bytes,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint4 load_16_bytes(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

// Offset of a 16-byte piece in a panel row: the swizzle permutes pieces by the row's address.
__device__ __forceinline__ uint32_t swizzled(uint32_t piece, uint32_t row_address) {
  return (piece ^ (row_address / PANEL_ROW_BYTES % 8)) * 16;
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename T>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint32_t packed, float& low, float& high) {
  low = __uint_as_float(packed << 16);
  high = __uint_as_float(packed & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack<__half>(uint32_t packed, float& low, float& high) {
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&packed));
  low = pair.x;
  high = pair.y;
}

// Accumulator columns of one row become the left operand of the next product.
template <typename T, int TILES>
__device__ __forceinline__ void pack_operand(uint32_t (&operand)[TILES / 2][4],
                                             const float (&values)[TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    operand[tile / 2][(tile % 2) * 2] = pack<T>(values[tile][0], values[tile][1]);
    operand[tile / 2][(tile % 2) * 2 + 1] = pack<T>(values[tile][2], values[tile][3]);
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The four lanes of a quad hold a 4 x 4 matrix, one column each; afterwards one row each.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4], int lane) {
  const bool odd = lane & 1;
  const bool upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + 2], 2);
    (upper ? v[i] : v[i + 2]) = other;
  }
}

// Stores a warpgroup's 64 x WIDTH accumulator, scaled per row half, as 16-byte pieces.
// `rows` points at row 0 of the warpgroup, `rows_left` of its 64 rows exist.
template <typename T, int WIDTH>
__device__ __forceinline__ void store_rows(T* rows, int64_t stride, int rows_left, int head_dim,
                                           const float (&values)[WIDTH / 8][4], float scale_low,
                                           float scale_high) {
  const int lane = threadIdx.x % 32;
  const int row_in_half = (threadIdx.x / 32 % 4) * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_in_half + half * 8;
    const float scale = half ? scale_high : scale_low;
#pragma unroll
    for (int tile = 0; tile < WIDTH / 8; tile += 4) {
      uint32_t piece[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&value)[4] = values[min(tile + i, WIDTH / 8 - 1)];  // past the end: unused
        piece[i] = pack<T>(value[half * 2] * scale, value[half * 2 + 1] * scale);
      }
      quad_transpose(piece, lane);
      const int column = (tile + lane % 4) * 8;
      if (row < rows_left && column < head_dim)
        *reinterpret_cast<uint4*>(rows + row * stride + column) =
            make_uint4(piece[0], piece[1], piece[2], piece[3]);
    }
  }
}

}  // namespace attention
