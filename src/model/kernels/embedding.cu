// Rows of embedding tables, and their gradients in a fixed order.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                             grid      block
// embedding_forward        const T* table, const uint32_t* ids, T* y, uint64_t rows, int width,            any [1]   256
//                          uint64_t first_row, uint64_t table_rows, int accumulate
// add_positions            const T* x, const T* table, T* y, uint64_t batch, int time, int width,          any [1]   256
//                          int first, int count
// embedding_backward       const T* dy, const uint32_t* order, const uint32_t* run_start,                  windows,  256
//                          const uint32_t* run_row, T* gradient, float* partial, int runs, int width       any [2]
// embedding_backward_long  const float* partial, const uint32_t* run_start, const uint32_t* run_row,       any [3],  256
//                          T* gradient, int runs, int width                                                any [3]
// positions_backward       const T* dy, T* gradient, uint64_t batch, int time, int width, int first,       any [1]   256
//                          int count
//
// No dynamic shared memory.
// [1] min(number of rows to write / 8, rounded up, 4096) is good.   [2] y: ceil(width / 512) is good.
// [3] x: min(runs, 4096), y: ceil(width / 1024) are good.
//
// `table` and `gradient` begin at the first row of a tile: table row `first_row` for tokens, position `first` for
// positions. embedding_forward writes y[r] = table[ids[r] - first_row], or adds it to y[r] if accumulate is not 0, where
// the id is inside [first_row, first_row + table_rows), and leaves the other rows alone. add_positions writes
// y[b, t] = x[b, t] + table[t - first] for t in [first, first + count) and leaves the others alone; y may be x.
//
// embedding_backward: `order` lists positions (rows of dy) sorted by token and then by position; run i is
// order[run_start[i] .. run_start[i + 1]], all of one token, and belongs to row run_row[i] of the gradient. run_start
// has runs + 1 entries. For a tile pass run_start and run_row from its first run on, with `order` as it is. A run is cut
// into segments of 32 positions, counted from its own start, so the bits do not depend on tiling. Runs of one segment go
// straight to the gradient; longer ones leave a sum a segment in `partial`, which embedding_backward_long, launched
// after it with the same arguments, adds up. windows = ceil((run_start[runs] - run_start[0]) / 32); `partial` is
// float[2 * windows * width] and need not be cleared.

#include "common.cuh"

constexpr int SEGMENT = 32; // positions that one warp sums
constexpr int WARPS = BLOCK / WARP;

template <typename T> constexpr int TILE = WARP * Pack<T>::LANES; // columns that a warp covers at once

// One row by a warp: y = a, or a + b.
template <bool ADD, bool VECTOR, typename T>
__device__ __forceinline__ void copy_row(const T* a, const T* b, T* y, int width) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = 4;
    for (int first = threadIdx.x % WARP * LANES; first < width; first += UNROLL * TILE<T>) {
        Pack<T> a_pack[UNROLL], b_pack[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int column = first + u * TILE<T>;
            a_pack[u] = load_pack<VECTOR>(a + column, width - column);
            if (ADD) b_pack[u] = load_pack<VECTOR>(b + column, width - column);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int column = first + u * TILE<T>;
            if (ADD) {
                float values[LANES], other[LANES];
                unpack(a_pack[u], values);
                unpack(b_pack[u], other);
#pragma unroll
                for (int k = 0; k < LANES; k++) values[k] += other[k];
                a_pack[u] = pack_of<T>(values);
            }
            store_pack<VECTOR>(y + column, width - column, a_pack[u]);
        }
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void embedding_forward(
    const T* table, const uint32_t* ids, T* y, uint64_t rows, int width, uint64_t first_row, uint64_t table_rows,
    bool accumulate
) {
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP;
    for (uint64_t row = warp; row < rows; row += warps) {
        // An id before the tile wraps around and is out of range as well.
        const uint64_t table_row = ids[row] - first_row;
        if (table_row >= table_rows) continue;
        const T* source = table + table_row * width;
        T* target = y + row * width;
        if (accumulate) copy_row<true, VECTOR>(target, source, target, width);
        else copy_row<false, VECTOR>(source, source, target, width);
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void add_positions(
    const T* x, const T* table, T* y, uint64_t batch, int time, int width, int first, int count
) {
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP;
    for (uint64_t i = warp; i < batch * count; i += warps) {
        const uint64_t offset = i % count;
        const uint64_t row = i / count * time + first + offset;
        copy_row<true, VECTOR>(x + row * width, table + offset * width, y + row * width, width);
    }
}

// The sum of `count` rows of dy, `row(i)` being the i-th, for one pack of columns of a thread.
template <bool VECTOR, typename T, typename Row>
__device__ __forceinline__ void sum_rows(
    const T* dy, int width, int column, int count, Row row, float (&sums)[Pack<T>::LANES]
) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = 8;
#pragma unroll
    for (int k = 0; k < LANES; k++) sums[k] = 0.0f;
    for (int first = 0; first < count; first += UNROLL) {
        Pack<T> loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const bool exists = first + u < count;
            const uint64_t start = exists ? row(first + u) * width : 0;
            loaded[u] = load_pack<VECTOR>(dy + start + column, exists ? width - column : 0);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float values[LANES];
            unpack(loaded[u], values);
#pragma unroll
            for (int k = 0; k < LANES; k++) sums[k] += values[k];
        }
    }
}

// `before` is what the gradient holds; it is loaded early, so that its way and that of the rows overlap.
template <bool VECTOR, typename T>
__device__ __forceinline__ void add_to_gradient(
    T* gradient, int count, const Pack<T>& before, const float (&sums)[Pack<T>::LANES]
) {
    float values[Pack<T>::LANES];
    unpack(before, values);
#pragma unroll
    for (int k = 0; k < Pack<T>::LANES; k++) values[k] += sums[k];
    store_pack<VECTOR>(gradient, count, pack_of<T>(values));
}

// The last run that begins at or before `position`, found by one warp that cuts the range in 32 a step.
__device__ __forceinline__ int run_of(const uint32_t* run_start, int runs, uint32_t position) {
    const int lane = threadIdx.x % WARP;
    int low = 0, high = runs; // run_start[low] <= position, and run `high` begins later
    while (high - low > 1) {
        const int step = (high - low + WARP - 1) / WARP;
        const int probe = low + lane * step;
        const bool before = probe < high && run_start[probe] <= position;
        const int last = WARP - 1 - __clz(__ballot_sync(ALL_LANES, before));
        high = min(high, low + (last + 1) * step);
        low += last * step;
    }
    return low;
}

// Window w takes the segments that begin in order[base + 32 w .. base + 32 (w + 1)]. Of a run at most one segment begins
// there. Only segments of long runs need a place in `partial`, and at most two of those begin in one window: a later
// segment of one run, and the first of the next.
__device__ __forceinline__ uint64_t partial_row(uint32_t start, uint32_t base, bool is_first) {
    return 2 * uint64_t((start - base) / SEGMENT) + (is_first ? 1 : 0);
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void embedding_backward(
    const T* dy, const uint32_t* order, const uint32_t* run_start, const uint32_t* run_row, T* gradient, float* partial,
    int runs, int width
) {
    constexpr int LANES = Pack<T>::LANES;
    // What the window needs to know: where its runs begin, their rows, and the positions of its segments. No more than
    // SEGMENT runs begin inside of it, and no segment ends more than a segment behind it.
    __shared__ uint32_t starts[SEGMENT + 2], rows[SEGMENT + 1], positions[2 * SEGMENT];
    __shared__ int shared_first_run;
    const uint32_t base = run_start[0], last = run_start[runs];
    const uint32_t begin = base + blockIdx.x * SEGMENT, end = begin + SEGMENT;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (begin >= last) return;
    if (warp == 0) {
        const int run = run_of(run_start, runs, begin);
        if (lane == 0) shared_first_run = run;
    } else if (threadIdx.x - WARP < 2 * SEGMENT) {
        const uint32_t i = threadIdx.x - WARP;
        if (begin + i < last) positions[i] = order[begin + i];
    }
    __syncthreads();
    const int first_run = shared_first_run;
    const int runs_here = min(SEGMENT + 1, runs - first_run);
    if (threadIdx.x <= runs_here) starts[threadIdx.x] = run_start[first_run + threadIdx.x];
    if (threadIdx.x < runs_here) rows[threadIdx.x] = run_row[first_run + threadIdx.x];
    __syncthreads();
    const int tiles = (width + TILE<T> - 1) / TILE<T>;
    const int tiles_here = (tiles - int(blockIdx.y) + int(gridDim.y) - 1) / int(gridDim.y);
    for (int item = warp; item < runs_here * tiles_here; item += WARPS) {
        const int run = item / tiles_here;
        const int column = (int(blockIdx.y) + item % tiles_here * int(gridDim.y)) * TILE<T> + lane * LANES;
        const uint32_t run_begin = starts[run], run_end = starts[run + 1];
        if (run_begin >= end) break;
        uint32_t start = run_begin;
        if (start < begin) start += (begin - start + SEGMENT - 1) / SEGMENT * SEGMENT;
        if (start >= end || start >= run_end || column >= width) continue;
        const bool is_short = run_end - run_begin <= SEGMENT;
        T* target = gradient + uint64_t(rows[run]) * width + column;
        const Pack<T> before = load_pack<VECTOR>(target, is_short ? width - column : 0);
        float sums[LANES];
        const int count = min(uint32_t(SEGMENT), run_end - start);
        sum_rows<VECTOR>(dy, width, column, count, [&](int i) { return uint64_t(positions[start - begin + i]); }, sums);
        if (is_short) {
            add_to_gradient<VECTOR>(target, width - column, before, sums);
        } else {
            store_floats(partial + partial_row(start, base, start == run_begin) * width + column, width - column, sums);
        }
    }
}

template <typename T>
__device__ __forceinline__ void embedding_backward_long(
    const float* partial, const uint32_t* run_start, const uint32_t* run_row, T* gradient, int runs, int width
) {
    const uint32_t base = run_start[0];
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
        const uint32_t begin = run_start[run], length = run_start[run + 1] - begin;
        if (length <= SEGMENT) continue;
        const uint32_t segments = (length + SEGMENT - 1) / SEGMENT;
        T* row = gradient + uint64_t(run_row[run]) * width;
        for (int column = blockIdx.y * BLOCK + threadIdx.x; column < width; column += gridDim.y * BLOCK) {
            float sum = partial[partial_row(begin, base, true) * width + column];
#pragma unroll 8
            for (uint32_t s = 1; s < segments; s++)
                sum += partial[partial_row(begin + s * SEGMENT, base, false) * width + column];
            row[column] = from_float<T>(to_float(row[column]) + sum);
        }
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void positions_backward(
    const T* dy, T* gradient, uint64_t batch, int time, int width, int first, int count
) {
    constexpr int LANES = Pack<T>::LANES;
    const int tiles = (width + TILE<T> - 1) / TILE<T>;
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP;
    for (uint64_t item = warp; item < uint64_t(count) * tiles; item += warps) {
        const uint64_t offset = item / tiles;
        const int column = int(item % tiles) * TILE<T> + threadIdx.x % WARP * LANES;
        if (column >= width) continue;
        T* target = gradient + offset * width + column;
        const Pack<T> before = load_pack<VECTOR>(target, width - column);
        float sums[LANES];
        sum_rows<VECTOR>(
            dy, width, column, int(batch), [&](int b) { return uint64_t(b) * time + first + offset; }, sums
        );
        add_to_gradient<VECTOR>(target, width - column, before, sums);
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)

#define EMBEDDING_KERNELS(T)                                                                                          \
    KERNEL embedding_forward_##T(                                                                                     \
        const T* table, const uint32_t* ids, T* y, uint64_t rows, int width, uint64_t first_row, uint64_t table_rows, \
        int accumulate                                                                                                \
    ) {                                                                                                               \
        by_alignment(rows_aligned(table, width) && aligned(y), [&](auto v) {                                          \
            embedding_forward<VECTOR_OF(v)>(table, ids, y, rows, width, first_row, table_rows, accumulate != 0);      \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL add_positions_##T(                                                                                         \
        const T* x, const T* table, T* y, uint64_t batch, int time, int width, int first, int count                   \
    ) {                                                                                                               \
        by_alignment(rows_aligned(x, width) && aligned(table) && aligned(y), [&](auto v) {                            \
            add_positions<VECTOR_OF(v)>(x, table, y, batch, time, width, first, count);                               \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL embedding_backward_##T(                                                                                    \
        const T* dy, const uint32_t* order, const uint32_t* run_start, const uint32_t* run_row, T* gradient,          \
        float* partial, int runs, int width                                                                           \
    ) {                                                                                                               \
        by_alignment(rows_aligned(dy, width) && aligned(gradient), [&](auto v) {                                      \
            embedding_backward<VECTOR_OF(v)>(dy, order, run_start, run_row, gradient, partial, runs, width);          \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL embedding_backward_long_##T(                                                                               \
        const float* partial, const uint32_t* run_start, const uint32_t* run_row, T* gradient, int runs, int width    \
    ) {                                                                                                               \
        embedding_backward_long(partial, run_start, run_row, gradient, runs, width);                                  \
    }                                                                                                                 \
    KERNEL positions_backward_##T(                                                                                    \
        const T* dy, T* gradient, uint64_t batch, int time, int width, int first, int count                           \
    ) {                                                                                                               \
        by_alignment(rows_aligned(dy, width) && aligned(gradient), [&](auto v) {                                      \
            positions_backward<VECTOR_OF(v)>(dy, gradient, batch, time, width, first, count);                         \
        });                                                                                                           \
    }

FOR_EACH_TYPE(EMBEDDING_KERNELS)
