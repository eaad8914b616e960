// Layer normalisation (Ba et al., 2016) and RMS normalisation (Zhang and Sennrich, 2019) over the rows of a matrix, and
// sums over columns for the gradients of weights and biases.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                          grid    block
// layer_norm_forward    const T* x, const T* weight, const T* bias, T* y, float2* stats,                any     256
//                       uint64_t rows, int cols, float eps                                              [1]
// rms_norm_forward      const T* x, const T* weight, T* y, float* stats, uint64_t rows, int cols,       any     256
//                       float eps                                                                       [1]
// layer_norm_backward   const T* dy, const T* x, const T* weight, const float2* stats,                  P       512
//                       const T* residual, T* dx, float* partial_dw, float* partial_db,
//                       uint64_t rows, int cols, int P
// rms_norm_backward     const T* dy, const T* x, const T* weight, const float* stats,                   P       512
//                       const T* residual, T* dx, float* partial_dw, uint64_t rows, int cols, int P
// column_sums           const T* dy, float* partial, uint64_t rows, int cols, int P                     [2], P  256
// accumulate_columns    const float* partial, int P, int cols, T* gradient                              ceil(cols / 32)  512
//
// [1] min(rows, 2048) is good.   [2] x: ceil(cols / (512 / sizeof(T))), y: P.
// No dynamic shared memory. Scratch: partial_dw, partial_db and partial are float[P * cols], wholly written; then
// accumulate_columns adds them to the gradient. P decides the order of the sums, so it must be the same number on every
// GPU: 128 is good for both.
// stats is (mean, 1 / standard deviation) a row, or the second alone for RMS. residual may be null; dx may be any of
// dy, x and residual. y may be x.

#include "common.cuh"

constexpr int NORM_BLOCK = 512; // threads a block of the backward kernels
// Of a row in a thread's registers: 32 elements, so that a block holds 8192.
template <typename T> constexpr int FORWARD_PACKS = 32 / Pack<T>::LANES;
// Blocks a multiprocessor that leave the registers for them.
template <typename T> constexpr int FORWARD_RESIDENT = sizeof(T) == sizeof(float) ? 2 : 4;
constexpr int MAX_WARPS = NORM_BLOCK / WARP;

// Threads that work on one row. Groups of a block do not wait for each other.
struct RowGroup {
    int size, index, count, thread;

    __device__ __forceinline__ RowGroup(int wanted, int block) {
        size = WARP;
        while (size < wanted && size < block) size *= 2;
        index = threadIdx.x / size;
        count = block / size;
        thread = threadIdx.x % size;
    }

    __device__ __forceinline__ void barrier() const {
        // Barrier 0 is that of the whole block.
        asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(size) : "memory");
    }
};

// Sums over a group, the same in all of its threads. The two halves of `shared` take turns, so that one barrier a sum
// is enough: whoever writes to a half has passed the barrier after its last reading.
template <int K> struct GroupSum {
    float (*shared)[MAX_WARPS][K];
    int half = 0;

    __device__ __forceinline__ void operator()(const RowGroup& group, float (&values)[K]) {
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = warp_sum(values[k]);
        if (group.size == WARP) return;
        const int warp = threadIdx.x / WARP;
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int k = 0; k < K; k++) shared[half][warp][k] = values[k];
        }
        group.barrier();
        const int first = group.index * (group.size / WARP);
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = 0.0f;
        for (int w = 0; w < group.size / WARP; w++) {
#pragma unroll
            for (int k = 0; k < K; k++) values[k] += shared[half][first + w][k];
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

template <typename Stats, bool VECTOR, typename T>
__device__ __forceinline__ void norm_forward(
    const T* x, const T* weight, const T* bias, T* y, Stats* stats, uint64_t rows, int cols, float eps,
    float (*shared)[MAX_WARPS][1]
) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int PACKS = FORWARD_PACKS<T>;
    const int packs = (cols + LANES - 1) / LANES;
    const RowGroup group((packs + PACKS - 1) / PACKS, BLOCK);
    const bool vector_weight = VECTOR && aligned(weight) && (!CENTERED<Stats> || aligned(bias));
    GroupSum<1> group_sum{shared};
    for (uint64_t row = uint64_t(blockIdx.x) * group.count + group.index; row < rows;
         row += uint64_t(gridDim.x) * group.count) {
        const T* x_row = x + row * cols;
        T* y_row = y + row * cols;
        Pack<T> loaded[PACKS];
        // Calls f(column, count, pack) for this thread's packs: the first ones from registers, those of a row that is
        // too wide for them from memory again.
        auto for_packs = [&](auto f) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                forget_values(loaded[p]);
                const int column = (p * group.size + group.thread) * LANES;
                if (column < cols) f(column, cols - column, loaded[p]);
            }
            for (int pack = PACKS * group.size + group.thread; pack < packs; pack += group.size) {
                const int column = pack * LANES;
                f(column, cols - column, load_pack<VECTOR>(x_row + column, cols - column));
            }
        };
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int column = (p * group.size + group.thread) * LANES;
            loaded[p] = load_pack<VECTOR>(x_row + column, cols - column);
        }

        float mean = 0.0f;
        if (CENTERED<Stats>) {
            float sum[1] = {0.0f};
            for_packs([&](int, int, const Pack<T>& pack) {
                float values[LANES];
                unpack(pack, values);
#pragma unroll
                for (int k = 0; k < LANES; k++) sum[0] += values[k];
            });
            group_sum(group, sum);
            mean = sum[0] / cols;
        }
        float squares[1] = {0.0f};
        for_packs([&](int, int count, const Pack<T>& pack) {
            float values[LANES];
            unpack(pack, values);
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                const float centered = values[k] - mean;
                if (VECTOR || k < count) squares[0] += centered * centered;
            }
        });
        group_sum(group, squares);
        const float rstd = rsqrtf(squares[0] / cols + eps);
        if (group.thread == 0) write_stats(stats, row, mean, rstd);

        for_packs([&](int column, int count, const Pack<T>& pack) {
            float values[LANES], w[LANES], b[LANES];
            unpack(pack, values);
            load_floats(weight + column, count, vector_weight, w);
            if (CENTERED<Stats>) load_floats(bias + column, count, vector_weight, b);
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                values[k] = (values[k] - mean) * rstd * w[k];
                if (CENTERED<Stats>) values[k] += b[k];
            }
            store_pack<VECTOR>(y_row + column, count, pack_of<T>(values));
        });
    }
}

// Columns of a row are kept PACKS packs a thread, ROWS rows are in flight at once, and each thread sums the gradients
// of weight and bias of its columns over all of its block's rows.
template <typename Stats, int PACKS, int ROWS, bool VECTOR, typename T>
__device__ __forceinline__ void norm_backward(
    const T* dy, const T* x, const T* weight, const Stats* stats, const T* residual, T* dx, float* partial_dw,
    float* partial_db, uint64_t rows, int cols, int partials, const RowGroup& group, float* scratch
) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int SUMS = 2 * ROWS;
    const bool vector_weight = VECTOR && aligned(weight);
    const float scale = 1.0f / cols;
    GroupSum<SUMS> group_sum{reinterpret_cast<float(*)[MAX_WARPS][SUMS]>(scratch)};
    int column[PACKS], count[PACKS];
    Pack<T> weights[PACKS];
    float dw[PACKS][LANES], db[PACKS][LANES];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        column[p] = (p * group.size + group.thread) * LANES;
        count[p] = cols - column[p];
        weights[p] = vector_weight ? load_pack<true>(weight + column[p], count[p])
                                   : load_pack<false>(weight + column[p], count[p]);
#pragma unroll
        for (int k = 0; k < LANES; k++) dw[p][k] = db[p][k] = 0.0f;
    }

    const uint64_t stride = uint64_t(partials) * group.count * ROWS;
    for (uint64_t first = (uint64_t(blockIdx.x) * group.count + group.index) * ROWS; first < rows; first += stride) {
        Pack<T> dy_pack[ROWS][PACKS], x_pack[ROWS][PACKS], residual_pack[ROWS][PACKS];
        float2 moments[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool exists = first + r < rows;
            const uint64_t start = (first + r) * cols;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const int n = exists ? count[p] : 0;
                dy_pack[r][p] = load_pack<VECTOR>(dy + start + column[p], n);
                x_pack[r][p] = load_pack<VECTOR>(x + start + column[p], n);
                residual_pack[r][p] = load_pack<VECTOR>(residual + start + column[p], residual ? n : 0);
            }
            moments[r] = exists ? read_stats(stats, first + r) : make_float2(0.0f, 0.0f);
        }
        float sums[SUMS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            sums[2 * r] = sums[2 * r + 1] = 0.0f;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                float d[LANES], v[LANES], w[LANES];
                unpack(weights[p], w);
                unpack(dy_pack[r][p], d);
                unpack(x_pack[r][p], v);
#pragma unroll
                for (int k = 0; k < LANES; k++) {
                    // Lanes beyond the row have d = 0 and add nothing.
                    const float normalized = (v[k] - moments[r].x) * moments[r].y;
                    const float scaled = d[k] * w[k];
                    sums[2 * r] += scaled;
                    sums[2 * r + 1] += scaled * normalized;
                    dw[p][k] += d[k] * normalized;
                    db[p][k] += d[k];
                }
            }
        }
        group_sum(group, sums);
#pragma unroll
        for (int p = 0; p < PACKS; p++) forget_values(weights[p]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float mean_scaled = CENTERED<Stats> ? sums[2 * r] * scale : 0.0f;
            const float mean_product = sums[2 * r + 1] * scale;
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                forget_values(dy_pack[r][p]);
                forget_values(x_pack[r][p]);
                float d[LANES], v[LANES], w[LANES], out[LANES];
                unpack(weights[p], w);
                unpack(dy_pack[r][p], d);
                unpack(x_pack[r][p], v);
                unpack(residual_pack[r][p], out);
#pragma unroll
                for (int k = 0; k < LANES; k++) {
                    const float normalized = (v[k] - moments[r].x) * moments[r].y;
                    out[k] += moments[r].y * (d[k] * w[k] - mean_scaled - normalized * mean_product);
                }
                const int n = first + r < rows ? count[p] : 0;
                store_pack<VECTOR>(dx + (first + r) * cols + column[p], n, pack_of<T>(out));
            }
        }
    }

    // The groups' sums, in order of the groups. Several groups mean one pack a thread.
    auto write = [&](const float(&values)[PACKS][LANES], float* out) {
        if (group.count == 1) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) store_floats(out + column[p], count[p], values[p]);
            return;
        }
        const int width = group.size * LANES;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < LANES; k++) scratch[group.index * width + k * group.size + group.thread] = values[0][k];
        __syncthreads();
        for (int c = threadIdx.x; c < cols; c += NORM_BLOCK) {
            float sum = 0.0f;
            for (int g = 0; g < group.count; g++) sum += scratch[g * width + c % LANES * group.size + c / LANES];
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
    float* partial_db, uint64_t rows, int cols, int partials, const RowGroup& group, float* scratch
) {
    GroupSum<2> group_sum{reinterpret_cast<float(*)[MAX_WARPS][2]>(scratch)};
    float* dw = partial_dw + uint64_t(blockIdx.x) * cols;
    float* db = CENTERED<Stats> ? partial_db + uint64_t(blockIdx.x) * cols : nullptr;
    for (int c = threadIdx.x; c < cols; c += NORM_BLOCK) {
        dw[c] = 0.0f;
        if (CENTERED<Stats>) db[c] = 0.0f;
    }
    for (uint64_t row = blockIdx.x; row < rows; row += partials) {
        const uint64_t start = row * cols;
        const float2 moments = read_stats(stats, row);
        float sums[2] = {0.0f, 0.0f};
        for (int c = threadIdx.x; c < cols; c += NORM_BLOCK) {
            const float d = to_float(dy[start + c]);
            const float normalized = (to_float(x[start + c]) - moments.x) * moments.y;
            const float scaled = d * to_float(weight[c]);
            sums[0] += scaled;
            sums[1] += scaled * normalized;
            dw[c] += d * normalized;
            if (CENTERED<Stats>) db[c] += d;
        }
        group_sum(group, sums);
        const float mean_scaled = CENTERED<Stats> ? sums[0] / cols : 0.0f, mean_product = sums[1] / cols;
        for (int c = threadIdx.x; c < cols; c += NORM_BLOCK) {
            const float normalized = (to_float(x[start + c]) - moments.x) * moments.y;
            float out = residual ? to_float(residual[start + c]) : 0.0f;
            out += moments.y *
                   (to_float(dy[start + c]) * to_float(weight[c]) - mean_scaled - normalized * mean_product);
            dx[start + c] = from_float<T>(out);
        }
    }
}

// As many rows at once as the registers hold.
template <typename Stats, bool VECTOR, typename T, typename... Args>
__device__ __forceinline__ void norm_backward_sized(
    const RowGroup& group, int packs, float* scratch, const T* dy, Args... args
) {
    if (packs <= NORM_BLOCK) norm_backward<Stats, 1, 4, VECTOR, T>(dy, args..., group, scratch);
    else if (packs <= 2 * NORM_BLOCK)
        norm_backward<Stats, 2, CENTERED<Stats> ? 1 : 2, VECTOR, T>(dy, args..., group, scratch);
    else if (packs <= 4 * NORM_BLOCK) norm_backward<Stats, 4, 1, VECTOR, T>(dy, args..., group, scratch);
    else norm_backward_wide<Stats, T>(dy, args..., group, scratch);
}

template <typename Stats, typename T>
__device__ __forceinline__ void norm_backward_any(
    const T* dy, const T* x, const T* weight, const Stats* stats, const T* residual, T* dx, float* partial_dw,
    float* partial_db, uint64_t rows, int cols, int partials
) {
    constexpr int LANES = Pack<T>::LANES;
    __shared__ float scratch[NORM_BLOCK * LANES];
    const int packs = (cols + LANES - 1) / LANES;
    const RowGroup group(packs, NORM_BLOCK);
    const bool vector = rows_aligned(dy, cols) && aligned(x) && aligned(residual) && aligned(dx);
    by_alignment(vector, [&](auto v) {
        norm_backward_sized<Stats, VECTOR_OF(v)>(
            group, packs, scratch, dy, x, weight, stats, residual, dx, partial_dw, partial_db, rows, cols, partials
        );
    });
}

template <typename Stats, typename T>
__device__ __forceinline__ void norm_forward_any(
    const T* x, const T* weight, const T* bias, T* y, Stats* stats, uint64_t rows, int cols, float eps
) {
    __shared__ float shared[2][MAX_WARPS][1];
    by_alignment(rows_aligned(x, cols) && aligned(y), [&](auto v) {
        norm_forward<Stats, VECTOR_OF(v)>(x, weight, bias, y, stats, rows, cols, eps, shared);
    });
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void column_sums(const T* dy, float* partial, uint64_t rows, int cols, int partials) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = 8;
    const ColumnTile<T> tile(cols);
    for (int part = blockIdx.y; part < partials; part += gridDim.y) {
        const RowSlice slice(rows, part, partials);
        float sums[LANES] = {};
        for (uint64_t first = slice.first + tile.warp; first < slice.end; first += UNROLL * tile.WARPS) {
            Pack<T> loaded[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const uint64_t row = first + u * tile.WARPS;
                loaded[u] = load_pack<VECTOR>(dy + row * cols + tile.column, row < slice.end ? tile.count : 0);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float values[LANES];
                unpack(loaded[u], values);
#pragma unroll
                for (int k = 0; k < LANES; k++) sums[k] += values[k];
            }
        }
        write_column_sums(tile, sums, partial + uint64_t(part) * cols);
    }
}

// A warp takes every sixteenth partial of 32 columns; then the warps' sums are added in order.
template <typename T>
__device__ __forceinline__ void accumulate_columns(const float* partial, int partials, int cols, T* gradient) {
    constexpr int WARPS = NORM_BLOCK / WARP;
    __shared__ float shared[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < cols) {
#pragma unroll 8
        for (int p = warp; p < partials; p += WARPS) sum += partial[uint64_t(p) * cols + column];
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < cols) {
        float total = shared[0][lane];
#pragma unroll
        for (int w = 1; w < WARPS; w++) total += shared[w][lane];
        gradient[column] = from_float<T>(to_float(gradient[column]) + total);
    }
}

#define NORM_KERNELS(T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_RESIDENT<T>) layer_norm_forward_##T(                  \
        const T* x, const T* weight, const T* bias, T* y, float2* stats, uint64_t rows, int cols, float eps           \
    ) {                                                                                                               \
        norm_forward_any(x, weight, bias, y, stats, rows, cols, eps);                                                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_RESIDENT<T>)                                          \
        rms_norm_forward_##T(const T* x, const T* weight, T* y, float* stats, uint64_t rows, int cols, float eps) {   \
        norm_forward_any(x, weight, static_cast<const T*>(nullptr), y, stats, rows, cols, eps);                       \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_BLOCK, 1) layer_norm_backward_##T(                              \
        const T* dy, const T* x, const T* weight, const float2* stats, const T* residual, T* dx, float* partial_dw,   \
        float* partial_db, uint64_t rows, int cols, int P                                                             \
    ) {                                                                                                               \
        norm_backward_any(dy, x, weight, stats, residual, dx, partial_dw, partial_db, rows, cols, P);                 \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_BLOCK, 1) rms_norm_backward_##T(                                \
        const T* dy, const T* x, const T* weight, const float* stats, const T* residual, T* dx, float* partial_dw,    \
        uint64_t rows, int cols, int P                                                                                \
    ) {                                                                                                               \
        norm_backward_any(                                                                                            \
            dy, x, weight, stats, residual, dx, partial_dw, static_cast<float*>(nullptr), rows, cols, P               \
        );                                                                                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                               \
        column_sums_##T(const T* dy, float* partial, uint64_t rows, int cols, int P) {                                \
        by_alignment(rows_aligned(dy, cols), [&](auto v) { column_sums<VECTOR_OF(v)>(dy, partial, rows, cols, P); }); \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_BLOCK)                                                          \
        accumulate_columns_##T(const float* partial, int P, int cols, T* gradient) {                                  \
        accumulate_columns(partial, P, cols, gradient);                                                               \
    }

FOR_EACH_TYPE(NORM_KERNELS)
