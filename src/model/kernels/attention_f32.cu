// Attention forward and backward in fp32, on ordinary cores: for checks and small models.
//
// kernels   attention_forward_f32_d{64,128,256}
//           attention_backward_q_f32_d{64,128,256}    dq and the row sums of do * o
//           attention_backward_kv_f32_d{64,128,256}   dk, dv; after backward_q, on its stream
//           Take the narrowest width >= head_dim; head_dim is any multiple of 4 up to 256.
// grid      forward, backward_q: ceil(time / 32), q_heads, batch
//           backward_kv:         ceil(time / 32), kv_heads, batch
// block     256
// shared    bytes, dynamic: (TILES * 32 * (width + 4) + 2 * 32 * 33) * 4, TILES = 3 in forward
//           and 4 in backward:  forward d64 34 560, d128 59 136, d256 108 288;
//           backward d64 43 264, d128 76 032, d256 141 568
// arguments forward:     q, q_stride, k, k_stride, v, v_stride, o, o_stride, lse, COMMON
//           backward_q:  q, q_stride, k, k_stride, v, v_stride, o, o_stride, d_o, do_stride,
//                        lse, delta, d_q, dq_stride, COMMON
//           backward_kv: q, q_stride, k, k_stride, v, v_stride, d_o, do_stride, lse, delta,
//                        d_k, dk_stride, d_v, dv_stride, COMMON
//           COMMON:      batch, time, q_heads, kv_heads, head_dim (i32), scale (f32), causal,
//                        window (i32), seg_start, seg_end (i32*)
//           Tensors are f32*, strides i64 elements between tokens (multiples of 4, pointers
//           16-byte aligned), lse and the scratch delta f32[batch, q_heads, time].
//           Masks and scale as in attention_forward.cu.

#include "attention_common.cuh"

using namespace attention;

namespace {

constexpr int TILE = 32;                      // rows of queries and of keys
constexpr int LANES = 8;                      // threads of one row
constexpr int BLOCK = TILE * LANES;
constexpr int PER_LANE = TILE / LANES;        // scores of one thread
constexpr int SCORE_STRIDE = TILE + 1;

struct Rows {
  const float* base;
  int64_t stride;
};

struct Common {
  int batch, time, q_heads, kv_heads, head_dim;
  float scale;
  int causal, window;
  const int* seg_start;
  const int* seg_end;

  __device__ Mask mask() const {
    return Mask(time, causal, window, seg_start, seg_end, blockIdx.z);
  }
  __device__ int64_t token(int row) const {
    return static_cast<int64_t>(blockIdx.z) * time + row;
  }
  __device__ int64_t row_of(int head, int row) const {  // in lse and delta
    return (static_cast<int64_t>(blockIdx.z) * q_heads + head) * time + row;
  }
};

template <int WIDTH>
struct Tile {
  static constexpr int STRIDE = WIDTH + 4;  // the lanes of a row read different banks
  static constexpr int FLOATS = TILE * STRIDE;
  float* data;

  __device__ const float4& at(int row, int column) const {
    return *reinterpret_cast<const float4*>(data + row * STRIDE + column);
  }

  // Rows past the sequence and columns past the head dimension become zeros.
  __device__ void load(const Rows& rows, const Common& common, int head, int first) const {
    for (int i = threadIdx.x; i < TILE * WIDTH / 4; i += BLOCK) {
      const int row = i / (WIDTH / 4);
      const int column = i % (WIDTH / 4) * 4;
      float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first + row < common.time && column < common.head_dim)
        value = *reinterpret_cast<const float4*>(
            rows.base + common.token(first + row) * rows.stride +
            static_cast<int64_t>(head) * common.head_dim + column);
      *reinterpret_cast<float4*>(data + row * STRIDE + column) = value;
    }
  }
};

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

__device__ __forceinline__ float row_sum(float x) {
  for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ float row_max(float x) {
  for (int step = 1; step < LANES; step *= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// products[i] = left[row] . right[lane + 8 i]
template <int WIDTH>
__device__ __forceinline__ void dots(float (&products)[PER_LANE], const Tile<WIDTH>& left,
                                     const Tile<WIDTH>& right, int row, int lane,
                                     int head_dim) {
  for (float& product : products) product = 0.0f;
  for (int column = 0; column < head_dim; column += 4) {
    const float4 a = left.at(row, column);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      products[i] = dot(a, right.at(lane + LANES * i, column), products[i]);
  }
}

// A thread's share of one row of a result: columns lane * 4 + 32 j.
template <int WIDTH>
struct Row {
  float4 part[WIDTH / 32];

  __device__ __forceinline__ Row() {
#pragma unroll
    for (float4& x : part) x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (float4& x : part) {
      x.x *= factor;
      x.y *= factor;
      x.z *= factor;
      x.w *= factor;
    }
  }

  // += weights . tile
  __device__ __forceinline__ void add(const float* weights, const Tile<WIDTH>& tile, int lane) {
#pragma unroll 4
    for (int other = 0; other < TILE; ++other) {
      const float weight = weights[other];
#pragma unroll
      for (int j = 0; j < WIDTH / 32; ++j) {
        const float4 x = tile.at(other, lane * 4 + 32 * j);
        part[j].x = fmaf(weight, x.x, part[j].x);
        part[j].y = fmaf(weight, x.y, part[j].y);
        part[j].z = fmaf(weight, x.z, part[j].z);
        part[j].w = fmaf(weight, x.w, part[j].w);
      }
    }
  }

  __device__ __forceinline__ void store(float* base, int64_t stride, const Common& common,
                                        int head, int row, int lane) const {
    if (row >= common.time) return;
    float* to =
        base + common.token(row) * stride + static_cast<int64_t>(head) * common.head_dim;
#pragma unroll
    for (int j = 0; j < WIDTH / 32; ++j)
      if (lane * 4 + 32 * j < common.head_dim)
        *reinterpret_cast<float4*>(to + lane * 4 + 32 * j) = part[j];
  }
};

template <int WIDTH>
__device__ void forward(Rows q_rows, Rows k_rows, Rows v_rows, float* o, int64_t o_stride,
                        float* lse, const Common& common) {
  extern __shared__ __align__(16) float shared[];
  const Tile<WIDTH> q{shared}, k{q.data + q.FLOATS}, v{k.data + k.FLOATS};
  float* scores = v.data + v.FLOATS;
  const int row_in_tile = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int first = blockIdx.x * TILE, row = first + row_in_tile, head = blockIdx.y;
  const int kv_head = head / (common.q_heads / common.kv_heads);
  const Mask mask = common.mask();
  const int from = mask.first_key(row), end = mask.end_key(row);
  Row<WIDTH> result;
  float peak = -INFINITY, sum = 0.0f;

  q.load(q_rows, common, head, first);
  for (int key = mask.first_key(first) / TILE * TILE; key < mask.end_key(first + TILE - 1);
       key += TILE) {
    __syncthreads();
    k.load(k_rows, common, kv_head, key);
    v.load(v_rows, common, kv_head, key);
    __syncthreads();
    float s[PER_LANE];
    dots(s, q, k, row_in_tile, lane, common.head_dim);
    float top = peak;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int at = key + lane + LANES * i;
      s[i] = at >= from && at < end ? s[i] * common.scale : -INFINITY;
      top = fmaxf(top, s[i]);
    }
    top = row_max(top);
    const float base = top == -INFINITY ? 0.0f : top;  // nothing visible so far
    const float shrink = expf(peak - base);
    peak = top;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const float p = expf(s[i] - base);
      total += p;
      scores[row_in_tile * SCORE_STRIDE + lane + LANES * i] = p;
    }
    sum = sum * shrink + total;
    result.scale(shrink);
    __syncwarp();  // a row belongs to one warp
    result.add(scores + row_in_tile * SCORE_STRIDE, v, lane);
  }
  sum = row_sum(sum);
  result.scale(1.0f / sum);
  result.store(o, o_stride, common, head, row, lane);
  if (lane == 0 && row < common.time) lse[common.row_of(head, row)] = peak + logf(sum);
}

template <int WIDTH>
__device__ void backward_q(Rows q_rows, Rows k_rows, Rows v_rows, Rows o_rows, Rows do_rows,
                           const float* lse, float* delta, float* d_q, int64_t dq_stride,
                           const Common& common) {
  extern __shared__ __align__(16) float shared[];
  const Tile<WIDTH> q{shared}, d_o{q.data + q.FLOATS}, k{d_o.data + q.FLOATS},
      v{k.data + k.FLOATS};
  float* scores = v.data + v.FLOATS;
  const int row_in_tile = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int first = blockIdx.x * TILE, row = first + row_in_tile, head = blockIdx.y;
  const int kv_head = head / (common.q_heads / common.kv_heads);
  const Mask mask = common.mask();
  const int from = mask.first_key(row), end = mask.end_key(row);
  Row<WIDTH> result;

  q.load(q_rows, common, head, first);
  d_o.load(do_rows, common, head, first);
  k.load(o_rows, common, head, first);
  __syncthreads();
  float row_delta = 0.0f;
  for (int column = lane * 4; column < common.head_dim; column += LANES * 4)
    row_delta = dot(k.at(row_in_tile, column), d_o.at(row_in_tile, column), row_delta);
  row_delta = row_sum(row_delta);
  const float row_lse = row < common.time ? lse[common.row_of(head, row)] : INFINITY;
  if (lane == 0 && row < common.time) delta[common.row_of(head, row)] = row_delta;

  for (int key = mask.first_key(first) / TILE * TILE; key < mask.end_key(first + TILE - 1);
       key += TILE) {
    __syncthreads();
    k.load(k_rows, common, kv_head, key);
    v.load(v_rows, common, kv_head, key);
    __syncthreads();
    float s[PER_LANE], d_p[PER_LANE];
    dots(s, q, k, row_in_tile, lane, common.head_dim);
    dots(d_p, d_o, v, row_in_tile, lane, common.head_dim);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int at = key + lane + LANES * i;
      const float p = at >= from && at < end ? expf(s[i] * common.scale - row_lse) : 0.0f;
      scores[row_in_tile * SCORE_STRIDE + lane + LANES * i] = p * (d_p[i] - row_delta);
    }
    __syncwarp();
    result.add(scores + row_in_tile * SCORE_STRIDE, k, lane);
  }
  result.scale(common.scale);
  result.store(d_q, dq_stride, common, head, row, lane);
}

template <int WIDTH>
__device__ void backward_kv(Rows q_rows, Rows k_rows, Rows v_rows, Rows do_rows,
                            const float* lse, const float* delta, float* d_k,
                            int64_t dk_stride, float* d_v, int64_t dv_stride,
                            const Common& common) {
  extern __shared__ __align__(16) float shared[];
  const Tile<WIDTH> k{shared}, v{k.data + k.FLOATS}, q{v.data + v.FLOATS},
      d_o{q.data + q.FLOATS};
  float* weights = d_o.data + d_o.FLOATS;
  float* d_scores = weights + TILE * SCORE_STRIDE;
  const int row_in_tile = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int first = blockIdx.x * TILE, key = first + row_in_tile, kv_head = blockIdx.y;
  const int group = common.q_heads / common.kv_heads;
  const Mask mask = common.mask();
  const int query_end = mask.end_query(min(first + TILE, common.time));
  Row<WIDTH> sum_k, sum_v;

  k.load(k_rows, common, kv_head, first);
  v.load(v_rows, common, kv_head, first);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int query = mask.first_query(first) / TILE * TILE; query < query_end; query += TILE) {
      __syncthreads();
      q.load(q_rows, common, head, query);
      d_o.load(do_rows, common, head, query);
      __syncthreads();
      float s[PER_LANE], d_p[PER_LANE];
      dots(s, k, q, row_in_tile, lane, common.head_dim);
      dots(d_p, v, d_o, row_in_tile, lane, common.head_dim);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        const int at = query + lane + LANES * i;
        float p = 0.0f, d_s = 0.0f;
        if (at < common.time && key >= mask.first_key(at) && key < mask.end_key(at)) {
          p = expf(s[i] * common.scale - lse[common.row_of(head, at)]);
          d_s = p * (d_p[i] - delta[common.row_of(head, at)]);
        }
        weights[row_in_tile * SCORE_STRIDE + lane + LANES * i] = p;
        d_scores[row_in_tile * SCORE_STRIDE + lane + LANES * i] = d_s;
      }
      __syncwarp();
      sum_v.add(weights + row_in_tile * SCORE_STRIDE, d_o, lane);
      sum_k.add(d_scores + row_in_tile * SCORE_STRIDE, q, lane);
    }
  }
  sum_k.scale(common.scale);
  sum_k.store(d_k, dk_stride, common, kv_head, key, lane);
  sum_v.store(d_v, dv_stride, common, kv_head, key, lane);
}

}  // namespace

#define COMMON_PARAMETERS                                                                      \
  int batch, int time, int q_heads, int kv_heads, int head_dim, float scale, int causal,       \
      int window, const int *seg_start, const int *seg_end
#define COMMON_VALUES                                                                          \
  Common { batch, time, q_heads, kv_heads, head_dim, scale, causal, window, seg_start, seg_end }

#define ATTENTION_F32(WIDTH)                                                                   \
  extern "C" __global__ void __launch_bounds__(BLOCK) attention_forward_f32_d##WIDTH(          \
      const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,      \
      int64_t v_stride, float* o, int64_t o_stride, float* lse, COMMON_PARAMETERS) {           \
    forward<WIDTH>({q, q_stride}, {k, k_stride}, {v, v_stride}, o, o_stride, lse,              \
                   COMMON_VALUES);                                                             \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(BLOCK) attention_backward_q_f32_d##WIDTH(       \
      const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,      \
      int64_t v_stride, const float* o, int64_t o_stride, const float* d_o, int64_t do_stride, \
      const float* lse, float* delta, float* d_q, int64_t dq_stride, COMMON_PARAMETERS) {      \
    backward_q<WIDTH>({q, q_stride}, {k, k_stride}, {v, v_stride}, {o, o_stride},              \
                      {d_o, do_stride}, lse, delta, d_q, dq_stride, COMMON_VALUES);            \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(BLOCK) attention_backward_kv_f32_d##WIDTH(      \
      const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,      \
      int64_t v_stride, const float* d_o, int64_t do_stride, const float* lse,                 \
      const float* delta, float* d_k, int64_t dk_stride, float* d_v, int64_t dv_stride,        \
      COMMON_PARAMETERS) {                                                                     \
    backward_kv<WIDTH>({q, q_stride}, {k, k_stride}, {v, v_stride}, {d_o, do_stride}, lse,     \
                       delta, d_k, dk_stride, d_v, dv_stride, COMMON_VALUES);                  \
  }

ATTENTION_F32(64)
ATTENTION_F32(128)
ATTENTION_F32(256)
