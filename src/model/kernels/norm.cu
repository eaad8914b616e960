// Layer normalisation (Ba et al., 2016) and RMS normalisation (Zhang and Sennrich, 2019) over the rows of a matrix, and
// sums over columns for the gradients of weights and biases.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                          grid    block
// layer_norm_forward    const T* x, const T* weight, const T* bias, T* y, float2* stats,                any     [1]
//                       uint64_t rows, int cols, float eps                                              [1]
// rms_norm_forward      const T* x, const T* weight, T* y, float* stats, uint64_t rows, int cols,       any     [1]
//                       float eps                                                                       [1]
// layer_norm_backward   const T* dy, const T* x, const T* weight, const float2* stats,                  P       [2]
//                       const T* residual, T* dx, float* partial_dw, float* partial_db,
//                       uint64_t rows, int cols, int P
// rms_norm_backward     const T* dy, const T* x, const T* weight, const float* stats,                   P       [2]
//                       const T* residual, T* dx, float* partial_dw, uint64_t rows, int cols, int P
// column_sums           const T* dy, float* partial, uint64_t rows, int cols, T* gradient,              [3], P  256
//                       unsigned* counters
// accumulate_columns    const float* partial, T* gradient, const float* partial2, T* gradient2,         [4]     512
//                       int P, int cols
//
// A pack is 16 bytes of a row.
// [1] W warps, the power of two from which 256 W is at least a row's packs, but at most 8. For W = 1 any number of
// warps, of which each takes a row: 4, and a grid of ceil(rows / 4), are good. Else a block takes a row: a grid of rows.
// [2] 512 up to 512 packs a row, else 1024.   [3] ceil(cols / (512 / sizeof(T))).
// [4] x: ceil(cols / 32), y: 1, or 2 for both pairs of partial sums and gradient. Its blocks may come early.
// Dynamic shared memory: 98304 bytes for the backward kernels. Scratch: partial_dw, partial_db and partial are
// float[P * cols], wholly written; then accumulate_columns adds them to the gradients. column_sums does that itself if
// `counters`, a zero for each of [3], left so, is not null. P decides the order of the sums, so it must be the same
// number on every GPU: 128 is good for the backward kernels, 32 for column_sums.
// stats is (mean, 1 / standard deviation) a row, or the second alone for RMS. residual may be null; dx may be any of
// dy, x and residual. y may be x.

#include "columns.cuh"
#include "common.cuh"

constexpr int ROW_PACKS = 8;              // of a row that a thread of the forward kernels keeps
constexpr int MOST_FORWARD_THREADS = 256; // threads a block
constexpr int FORWARD_RESIDENT = 4;       // blocks of as many threads that must fit on a multiprocessor
constexpr int NARROW_BLOCK = 512;         // threads a block of the backward kernels, up to as many packs a row
constexpr int WIDE_BLOCK = 1024;
constexpr int MAX_WARPS = WIDE_BLOCK / WARP;
constexpr int MOST_ROWS = 2; // that a group of threads of the backward kernels works on at once
constexpr int MOST_STAGES = 2, INPUTS = 3;

// Sums over a block, or a warp of it, the same in all of its threads. The two halves of `shared` take turns, so that
// one barrier a sum is enough: whoever writes to a half has passed the barrier after its last reading.
template <int K, bool ONE_WARP, int WARPS> struct BlockSum {
    float (*shared)[WARPS][K];
    int half = 0;

    __device__ __forceinline__ void operator()(float (&values)[K]) {
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = warp_sum(values[k]);
        if (ONE_WARP) return;
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int k = 0; k < K; k++) shared[half][threadIdx.x / WARP][k] = values[k];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = 0.0f;
        for (int w = 0; w < blockDim.x / WARP; w++) {
#pragma unroll
            for (int k = 0; k < K; k++) values[k] += shared[half][w][k];
        }
        half ^= 1;
    }
};

__device__ __forceinline__ void write_stats(float2* stats, uint64_t row, float mean, float rstd) {
    stats[row] = make_float2(mean, rstd);
}
__device__ __forceinline__ void write_stats(float* stats, uint64_t row, float, float rstd) { stats[row] = rstd; }
__device__ __forceinline__ float2 read_stats(const float2* stats, uint64_t row) { return stats[row]; }
__device__ __forceinline__ float2 read_stats(const float* stats, uint64_t row) { return make_float2(0.0f, stats[row]); }

// Stats is float2 for layer norm and float for RMS norm.
template <typename Stats> constexpr bool CENTERED = sizeof(Stats) == sizeof(float2);

// (x - mean) / standard deviation. One fused operation is enough for 16 bits; in fp32 it would lose what a large mean has in
// common with x.
template <typename Stats, typename T> __device__ __forceinline__ float normalized_of(float x, float2 moments) {
    if (!CENTERED<Stats>) return x * moments.y;
    if (sizeof(T) == sizeof(float)) return (x - moments.x) * moments.y;
    return fmaf(x, moments.y, -moments.x * moments.y);
}

// A row belongs to a warp, or to the whole block where it has more packs than a warp keeps. PACKS of a thread's packs stay
// in registers; those of a row that is too wide for them, or where addresses are not aligned, are read again.
template <typename Stats, int PACKS, bool ONE_WARP, bool VECTOR, typename T>
__device__ __forceinline__ void norm_forward(
    const T* x, const T* weight, const T* bias, T* y, Stats* stats, uint64_t rows, int cols, float eps,
    float (*shared)[MOST_FORWARD_THREADS / WARP][1]
) {
    constexpr int LANES = Pack<T>::LANES, KEPT = VECTOR ? PACKS : 0;
    const int threads = ONE_WARP ? WARP : blockDim.x, thread = ONE_WARP ? threadIdx.x % WARP : threadIdx.x;
    const int stride = threads * LANES, first_column = thread * LANES;
    BlockSum<1, ONE_WARP, MOST_FORWARD_THREADS / WARP> block_sum{shared};
    for (uint64_t row = ONE_WARP ? global_thread() / WARP : blockIdx.x; row < rows;
         row += ONE_WARP ? grid_threads() / WARP : gridDim.x) {
        const T* x_row = x + row * cols;
        T* y_row = y + row * cols;
        Pack<T> loaded[PACKS];
#pragma unroll
        for (int p = 0; p < KEPT; p++)
            loaded[p] = load_pack<VECTOR>(x_row + first_column + p * stride, cols - first_column - p * stride);
        // Calls f(column, count, pack) for this thread's packs in order; count may be negative.
        auto for_packs = [&](auto f) {
#pragma unroll
            for (int p = 0; p < KEPT; p++) {
                // The same for all threads, other than whether a pack exists.
                if (p * stride >= cols) break;
                forget_values(loaded[p]);
                f(first_column + p * stride, cols - first_column - p * stride, loaded[p]);
            }
            for (int column = first_column + KEPT * stride; column < cols; column += stride)
                f(column, cols - column, load_pack<VECTOR>(x_row + column, cols - column));
        };
        float mean = 0.0f;
        if (CENTERED<Stats>) {
            float sum[1] = {0.0f};
            for_packs([&](int, int, const Pack<T>& pack) {
                float values[LANES];
                unpack(pack, values);
#pragma unroll
                for (int k = 0; k < LANES; k++) sum[0] += values[k];
            });
            block_sum(sum);
            mean = sum[0] / cols;
        }
        float squares[1] = {0.0f};
        for_packs([&](int, int count, const Pack<T>& pack) {
            float values[LANES];
            unpack(pack, values);
            if (VECTOR && count <= 0) return;
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                const float centered = values[k] - mean;
                if (VECTOR || k < count) squares[0] = fmaf(centered, centered, squares[0]);
            }
        });
        block_sum(squares);
        const float rstd = rsqrtf(squares[0] / cols + eps);
        if (thread == 0) write_stats(stats, row, mean, rstd);
        for_packs([&](int column, int count, const Pack<T>& pack) {
            float values[LANES], w[LANES], b[LANES];
            unpack(load_pack<VECTOR>(weight + column, count), w);
            if (CENTERED<Stats>) unpack(load_pack<VECTOR>(bias + column, count), b);
            unpack(pack, values);
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                const float normalized = normalized_of<Stats, T>(values[k], make_float2(mean, rstd));
                values[k] = CENTERED<Stats> ? fmaf(normalized, w[k], b[k]) : normalized * w[k];
            }
            store_pack<VECTOR>(y_row + column, count, pack_of<T>(values));
        });
    }
}

// What the blocks of the backward kernels keep in shared memory besides the stages.
struct BackwardShared {
    float sums[2][MAX_WARPS][2 * MOST_ROWS];
    // A copy for each warp, so that warps do not wait for each other.
    alignas(8) float2 stats[MOST_STAGES][MAX_WARPS][MOST_ROWS];
};

// Columns of a row are kept PACKS packs a thread, each group of threads works on ROWS rows at once, and each thread sums
// the gradients of weight and bias of its columns over all of its rows.
//
// Inputs come through STAGES stages of shared memory. Every thread copies what it alone reads later, so the pipeline
// needs no barrier; those of the sums of a row are the only ones, and whole blocks take part in them.
template <typename Stats, int THREADS, int PACKS, int ROWS, int STAGES, bool VECTOR, typename T>
__device__ __forceinline__ void norm_backward(
    const T* dy, const T* x, const T* weight, const Stats* stats, const T* residual, T* dx, float* partial_dw,
    float* partial_db, uint64_t rows, int cols, int partials, Pack<T>* stages, BackwardShared& shared
) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int SUMS = CENTERED<Stats> ? 2 * ROWS : ROWS;
    constexpr int SUM_LANES = WARP / SUMS; // lanes that share a sum
    int size = WARP;
    while (size * LANES * PACKS < cols && size < THREADS) size *= 2;
    const int groups = THREADS / size, index = threadIdx.x / size, thread = threadIdx.x % size;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int group_warps = size / WARP, first_warp = index * group_warps;
    const float scale = 1.0f / cols;
    float w[PACKS][LANES], dw[PACKS][LANES], db[PACKS][LANES];
    auto column = [&](int p) { return (p * size + thread) * LANES; };
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        unpack(load_pack<VECTOR>(weight + column(p), cols - column(p)), w[p]);
#pragma unroll
        for (int k = 0; k < LANES; k++) dw[p][k] = db[p][k] = 0.0f;
    }

    auto staged = [&](int stage, int input, int r, int p) -> Pack<T>& {
        return stages[(((stage * INPUTS + input) * ROWS + r) * PACKS + p) * THREADS + threadIdx.x];
    };
    if (VECTOR) {
        // What lies beyond the row is never copied, and adds nothing.
#pragma unroll
        for (int i = 0; i < STAGES * INPUTS * ROWS; i++) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                if (column(p) >= cols) stages[(i * PACKS + p) * THREADS + threadIdx.x] = load_pack<false>(dy, 0);
            }
        }
    }
    // `at` is where this thread's first pack of row `first` begins.
    auto fetch = [&](int stage, uint64_t first, uint64_t at) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (first + r >= rows) break;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const uint64_t from = at + uint32_t(r * cols + p * size * LANES);
                const int count = cols - column(p);
                if (VECTOR) {
                    if (count > 0) {
                        copy_async<PACK_BYTES>(&staged(stage, 0, r, p), dy + from);
                        copy_async<PACK_BYTES>(&staged(stage, 1, r, p), x + from);
                        if (residual) copy_async<PACK_BYTES>(&staged(stage, 2, r, p), residual + from);
                    }
                } else {
                    staged(stage, 0, r, p) = load_pack<false>(dy + from, count);
                    staged(stage, 1, r, p) = load_pack<false>(x + from, count);
                    if (residual) staged(stage, 2, r, p) = load_pack<false>(residual + from, count);
                }
            }
        }
        if (lane < ROWS && first + lane < rows)
            copy_async<sizeof(Stats)>(&shared.stats[stage][warp][lane], stats + first + lane);
        end_copies();
    };

    const uint64_t tile = uint64_t(groups) * ROWS, stride = partials * tile;
    uint64_t first = blockIdx.x * tile + index * ROWS, at = first * cols + column(0);
    const uint64_t at_stride = stride * cols;
#pragma unroll
    for (int s = 0; s < STAGES; s++) fetch(s, first + s * stride, at + s * at_stride);
    int stage = 0, half = 0; // of the stages, and of the two places for sums
    // As many steps for all groups of a block: barriers are for all of its threads.
    for (uint64_t base = blockIdx.x * tile; base < rows; base += stride, first += stride, at += at_stride) {
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        const float2* moments = shared.stats[stage][warp];
        auto moments_of = [&](int r) { return read_stats(reinterpret_cast<const Stats*>(moments + r), 0); };
        float sums[SUMS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (first + r >= rows) break;
            const float2 m = moments_of(r);
            float sum = 0.0f, product = 0.0f;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                float d[LANES], v[LANES];
                unpack(staged(stage, 0, r, p), d);
                unpack(staged(stage, 1, r, p), v);
#pragma unroll
                for (int k = 0; k < LANES; k++) {
                    const float normalized = normalized_of<Stats, T>(v[k], m);
                    const float scaled = d[k] * w[p][k];
                    sum += scaled;
                    product = fmaf(scaled, normalized, product);
                    dw[p][k] = fmaf(d[k], normalized, dw[p][k]);
                    db[p][k] += d[k];
                }
            }
            if (CENTERED<Stats>) sums[ROWS + r] = sum;
            sums[r] = product;
        }
        // Each warp adds the sums of all warps of its group, lanes in turns, and hands them round.
        const float mine = warp_sums(sums);
        if (lane % SUM_LANES == 0) shared.sums[half][warp][lane / SUM_LANES] = mine;
        __syncthreads();
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < THREADS / WARP; i += SUM_LANES) {
            const int other = i + lane % SUM_LANES;
            if (other < group_warps) total += shared.sums[half][first_warp + other][lane / SUM_LANES];
        }
#pragma unroll
        for (int offset = SUM_LANES / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(ALL_LANES, total, offset);
        total *= scale;
#pragma unroll
        for (int k = 0; k < SUMS; k++) sums[k] = __shfl_sync(ALL_LANES, total, k * SUM_LANES);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (first + r >= rows) break;
            // rstd * (d * w - mean(d * w) - normalized * mean(d * w * normalized)); for 16 bits as a function of d * w and x.
            const float2 m = moments_of(r);
            const float slope = -m.y * m.y * sums[r];
            const float constant = CENTERED<Stats> ? fmaf(-m.x, slope, -m.y * sums[ROWS + r]) : 0.0f;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                float d[LANES], v[LANES], out[LANES];
                unpack(residual ? staged(stage, 2, r, p) : load_pack<false>(residual, 0), out);
                unpack(staged(stage, 0, r, p), d);
                unpack(staged(stage, 1, r, p), v);
#pragma unroll
                for (int k = 0; k < LANES; k++) {
                    if (sizeof(T) == sizeof(float)) {
                        const float centered = CENTERED<Stats> ? d[k] * w[p][k] - sums[ROWS + r] : d[k] * w[p][k];
                        out[k] += m.y * (centered - normalized_of<Stats, T>(v[k], m) * sums[r]);
                    } else {
                        if (CENTERED<Stats>) out[k] += constant;
                        out[k] = fmaf(d[k] * w[p][k], m.y, fmaf(v[k], slope, out[k]));
                    }
                }
                store_pack<VECTOR>(dx + at + uint32_t(r * cols + p * size * LANES), cols - column(p), pack_of<T>(out));
            }
        }
        __syncwarp(); // all lanes have read the moments; the rest of the stage is this thread's own
        fetch(stage, first + STAGES * stride, at + STAGES * at_stride);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        half ^= 1;
    }
    wait_for_copies<0>();

    let_next_kernel_come();
    // The groups' sums, in order of the groups. Several groups mean one pack a thread.
    float* scratch = reinterpret_cast<float*>(stages);
    auto write = [&](const float(&values)[PACKS][LANES], float* out) {
        if (groups == 1) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) store_floats(out + column(p), cols - column(p), values[p]);
            return;
        }
        const int width = size * LANES;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < LANES; k++) scratch[index * width + k * size + thread] = values[0][k];
        __syncthreads();
        for (int c = threadIdx.x; c < cols; c += THREADS) {
            float sum = 0.0f;
            for (int g = 0; g < groups; g++) sum += scratch[g * width + c % LANES * size + c / LANES];
            out[c] = sum;
        }
    };
    write(dw, partial_dw + uint64_t(blockIdx.x) * cols);
    if (CENTERED<Stats>) write(db, partial_db + uint64_t(blockIdx.x) * cols);
}

// Rows too wide for registers: every row is read twice, and the block adds to its partial sums in memory.
template <typename Stats, typename T>
__device__ void norm_backward_wide(
    const T* dy, const T* x, const T* weight, const Stats* stats, const T* residual, T* dx, float* partial_dw,
    float* partial_db, uint64_t rows, int cols, int partials, BackwardShared& shared
) {
    BlockSum<2, false, MAX_WARPS> block_sum{reinterpret_cast<float(*)[MAX_WARPS][2]>(shared.sums)};
    float* dw = partial_dw + uint64_t(blockIdx.x) * cols;
    float* db = CENTERED<Stats> ? partial_db + uint64_t(blockIdx.x) * cols : nullptr;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        dw[c] = 0.0f;
        if (CENTERED<Stats>) db[c] = 0.0f;
    }
    for (uint64_t row = blockIdx.x; row < rows; row += partials) {
        const uint64_t start = row * cols;
        const float2 moments = read_stats(stats, row);
        float sums[2] = {0.0f, 0.0f};
        for (int c = threadIdx.x; c < cols; c += blockDim.x) {
            const float d = to_float(dy[start + c]);
            const float normalized = (to_float(x[start + c]) - moments.x) * moments.y;
            const float scaled = d * to_float(weight[c]);
            sums[0] += scaled;
            sums[1] += scaled * normalized;
            dw[c] += d * normalized;
            if (CENTERED<Stats>) db[c] += d;
        }
        block_sum(sums);
        const float mean_scaled = CENTERED<Stats> ? sums[0] / cols : 0.0f, mean_product = sums[1] / cols;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) {
            const float normalized = (to_float(x[start + c]) - moments.x) * moments.y;
            float out = residual ? to_float(residual[start + c]) : 0.0f;
            out += moments.y *
                   (to_float(dy[start + c]) * to_float(weight[c]) - mean_scaled - normalized * mean_product);
            dx[start + c] = from_float<T>(out);
        }
    }
}

template <typename Stats, typename T>
__device__ __forceinline__ void norm_backward_any(
    const T* dy, const T* x, const T* weight, const Stats* stats, const T* residual, T* dx, float* partial_dw,
    float* partial_db, uint64_t rows, int cols, int partials
) {
    constexpr int LANES = Pack<T>::LANES;
    extern __shared__ uint4 dynamic_shared[];
    __shared__ BackwardShared shared;
    Pack<T>* stages = reinterpret_cast<Pack<T>*>(dynamic_shared);
    const int packs = (cols + LANES - 1) / LANES;
    const bool vector =
        rows_aligned(dy, cols) && aligned(x) && aligned(residual) && aligned(dx) && aligned(weight);
    by_alignment(vector, [&](auto v) {
#define WORK(THREADS, PACKS, ROWS, STAGES)                                                               \
    norm_backward<Stats, THREADS, PACKS, ROWS, STAGES, VECTOR_OF(v)>(                                     \
        dy, x, weight, stats, residual, dx, partial_dw, partial_db, rows, cols, partials, stages, shared \
    )
        if (packs <= NARROW_BLOCK) WORK(NARROW_BLOCK, 1, MOST_ROWS, MOST_STAGES);
        else if (packs <= WIDE_BLOCK) WORK(WIDE_BLOCK, 1, 1, MOST_STAGES);
        else if (packs <= 2 * WIDE_BLOCK) WORK(WIDE_BLOCK, 2, 1, 1);
        else
            norm_backward_wide(
                dy, x, weight, stats, residual, dx, partial_dw, partial_db, rows, cols, partials, shared
            );
#undef WORK
    });
}

template <typename Stats, typename T>
__device__ __forceinline__ void norm_forward_any(
    const T* x, const T* weight, const T* bias, T* y, Stats* stats, uint64_t rows, int cols, float eps
) {
    constexpr int WARP_COLUMNS = WARP * ROW_PACKS * Pack<T>::LANES;
    __shared__ float shared[2][MOST_FORWARD_THREADS / WARP][1];
    const bool vector = rows_aligned(x, cols) && aligned(y) && aligned(weight) && aligned(bias);
    by_alignment(vector, [&](auto v) {
        auto work = [&](auto packs, auto one_warp) {
            norm_forward<Stats, decltype(packs)::value, decltype(one_warp)::value != 0, VECTOR_OF(v)>(
                x, weight, bias, y, stats, rows, cols, eps, shared
            );
        };
        if (cols <= WARP_COLUMNS / 2) work(Constant<ROW_PACKS / 2>(), Constant<1>());
        else if (cols <= WARP_COLUMNS) work(Constant<ROW_PACKS>(), Constant<1>());
        else work(Constant<ROW_PACKS>(), Constant<0>());
    });
}

#define NORM_KERNELS(T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(MOST_FORWARD_THREADS, FORWARD_RESIDENT) layer_norm_forward_##T(      \
        const T* x, const T* weight, const T* bias, T* y, float2* stats, uint64_t rows, int cols, float eps           \
    ) {                                                                                                               \
        norm_forward_any(x, weight, bias, y, stats, rows, cols, eps);                                                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(MOST_FORWARD_THREADS, FORWARD_RESIDENT)                              \
        rms_norm_forward_##T(const T* x, const T* weight, T* y, float* stats, uint64_t rows, int cols, float eps) {   \
        norm_forward_any(x, weight, static_cast<const T*>(nullptr), y, stats, rows, cols, eps);                       \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) layer_norm_backward_##T(                              \
        const T* dy, const T* x, const T* weight, const float2* stats, const T* residual, T* dx, float* partial_dw,   \
        float* partial_db, uint64_t rows, int cols, int P                                                             \
    ) {                                                                                                               \
        norm_backward_any(dy, x, weight, stats, residual, dx, partial_dw, partial_db, rows, cols, P);                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) rms_norm_backward_##T(                                \
        const T* dy, const T* x, const T* weight, const float* stats, const T* residual, T* dx, float* partial_dw,    \
        uint64_t rows, int cols, int P                                                                                \
    ) {                                                                                                               \
        norm_backward_any(                                                                                            \
            dy, x, weight, stats, residual, dx, partial_dw, static_cast<float*>(nullptr), rows, cols, P               \
        );                                                                                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                               \
        column_sums_##T(const T* dy, float* partial, uint64_t rows, int cols, T* gradient, unsigned* counters) {      \
        by_alignment(rows_aligned(dy, cols), [&](auto v) {                                                            \
            column_sums<VECTOR_OF(v)>(dy, partial, rows, cols, gradient, counters);                                   \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ACCUMULATE_BLOCK) accumulate_columns_##T(                                \
        const float* partial, T* gradient, const float* partial2, T* gradient2, int P, int cols                       \
    ) {                                                                                                               \
        wait_for_kernel_before();                                                                                     \
        accumulate_columns(blockIdx.y == 0 ? partial : partial2, P, cols, blockIdx.y == 0 ? gradient : gradient2);    \
    }

FOR_EACH_TYPE(NORM_KERNELS)
