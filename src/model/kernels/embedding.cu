// Rows of embedding tables, and their gradients in a fixed order.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                             grid      block
// embedding_forward        const T* table, const uint32_t* ids, T* y, uint64_t rows, int width,            any [1]   256
//                          uint64_t first_row, uint64_t table_rows, int accumulate
// add_positions            const T* x, const T* table, T* y, uint64_t batch, int time, int width,          any [1]   256
//                          int first, int count
// embedding_backward       const T* dy, const uint32_t* order, const uint32_t* starts,                     any [2]   256
//                          const uint32_t* targets, T* gradient, float* partial, int segments, int width
// embedding_backward_long  const float* partial, const uint32_t* runs, T* gradient, int count, int width   any [3],  256
//                                                                                                          any [3]
// positions_backward       const T* dy, T* gradient, uint64_t batch, int time, int width, int first,       any [4]   256
//                          int count
//
// No dynamic shared memory. Where a grid is good, a warp takes so many bytes of a row:
// [1] 2048.   [2] 2048: two pieces of 1024.   [4] 512.   [3] x: count, y: ceil(width / 1024).
// For embedding_forward and embedding_backward no more blocks than fit on the GPU at once are better.
//
// `table` and `gradient` begin at the first row of a tile: table row `first_row` for tokens, position `first` for
// positions. embedding_forward writes y[r] = table[ids[r] - first_row], or adds it to y[r] if accumulate is not 0, where
// the id is inside [first_row, first_row + table_rows), and leaves the other rows alone. add_positions writes
// y[b, t] = x[b, t] + table[t - first] for t in [first, first + count) and leaves the others alone; y may be x.
//
// embedding_backward: `order` lists positions (rows of dy) sorted by token and then by position. The positions of one
// token, a run, are cut into segments of at most 32, counted from the run's own start, so the bits do not depend on
// tiling. Segment i is order[starts[i] .. starts[i + 1]]; starts has segments + 1 entries. The sum of a run of one segment
// is added to row targets[i] of the gradient. Of a longer run each segment's sum goes to the row of `partial` that
// targets[i] names, with its highest bit set; places of one run are neighbours, in order. embedding_backward_long,
// launched after it where there are such runs, adds them up: runs[3 i], runs[3 i + 1] and runs[3 i + 2] are the first
// place, the number of places, and the row of the gradient. `partial` need not be cleared.

#include "common.cuh"

constexpr uint32_t PARTIAL = 1u << 31; // marks a target in `partial`

template <typename T> constexpr int TILE = WARP * Pack<T>::LANES; // columns that a warp covers at once

constexpr int COPY_PACKS = 4;  // of a row that a lane copies at once
constexpr int SUM_PACKS = 2;   // of a row that a lane of embedding_backward sums at once
constexpr int SUMMED_ROWS = 2; // that it loads at once: most segments are not longer

// Parts of a row that are work of their own, so that a warp has all of its loads under way at once.
template <int PACKS, typename T> __device__ __forceinline__ int parts_of(int width) {
    return (width + PACKS * TILE<T> - 1) / (PACKS * TILE<T>);
}

// PACKS packs a lane of a row from column `first` on: y = a, or a + b.
template <int PACKS, bool ADD, bool VECTOR, typename T>
__device__ __forceinline__ void copy_part(const T* a, const T* b, T* y, int first, int width) {
    constexpr int LANES = Pack<T>::LANES;
    Pack<T> a_pack[PACKS], b_pack[PACKS];
#pragma unroll
    for (int u = 0; u < PACKS; u++) {
        const int column = first + u * TILE<T>;
        a_pack[u] = load_pack<VECTOR>(a + column, width - column);
        if (ADD) b_pack[u] = load_pack<VECTOR>(b + column, width - column);
    }
#pragma unroll
    for (int u = 0; u < PACKS; u++) {
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

template <bool ADD, bool VECTOR, typename T>
__device__ __forceinline__ void embedding_forward(
    const T* table, const uint32_t* ids, T* y, uint64_t rows, int width, uint64_t first_row, uint64_t table_rows
) {
    constexpr int PACKS = COPY_PACKS;
    const int parts = parts_of<PACKS, T>(width);
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP, items = rows * parts;
    // The next id is on its way while this one's row is.
    uint32_t id = warp < items ? ids[warp / parts] : 0;
    for (uint64_t item = warp; item < items; item += warps) {
        const uint64_t row = item / parts, next = item + warps;
        const int first = int(item % parts) * PACKS * TILE<T> + threadIdx.x % WARP * Pack<T>::LANES;
        // An id before the tile wraps around and is out of range as well.
        const uint64_t table_row = id - first_row;
        id = next < items ? ids[next / parts] : 0;
        if (table_row >= table_rows) continue;
        T* target = y + row * width;
        copy_part<PACKS, ADD, VECTOR>(table + table_row * width, target, target, first, width);
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void add_positions(
    const T* x, const T* table, T* y, uint64_t batch, int time, int width, int first, int count
) {
    constexpr int PACKS = COPY_PACKS;
    const int parts = parts_of<PACKS, T>(width);
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP;
    for (uint64_t item = warp; item < batch * count * parts; item += warps) {
        const uint64_t i = item / parts, offset = i % count;
        const uint64_t row = i / count * time + first + offset;
        const int column = int(item % parts) * PACKS * TILE<T> + threadIdx.x % WARP * Pack<T>::LANES;
        copy_part<PACKS, true, VECTOR>(x + row * width, table + offset * width, y + row * width, column, width);
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
            loaded[u] = load_once<VECTOR>(dy + start + column, exists ? width - column : 0);
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

// Positions order[start .. start + count] and where their sum goes.
struct Segment {
    uint32_t start, target;
    int count;
};

// A warp takes a segment, and PACKS packs a lane of its columns. While it waits for rows, the positions of its next
// segment are on their way, and the place of the one after that.
template <bool VECTOR, typename T>
__device__ __forceinline__ void embedding_backward(
    const T* dy, const uint32_t* order, const uint32_t* starts, const uint32_t* targets, T* gradient, float* partial,
    int segments, int width
) {
    constexpr int LANES = Pack<T>::LANES, PACKS = SUM_PACKS, ROWS = SUMMED_ROWS;
    const int parts = parts_of<PACKS, T>(width);
    const int lane = threadIdx.x % WARP;
    const uint64_t warp = global_thread() / WARP, warps = grid_threads() / WARP, items = uint64_t(segments) * parts;
    auto segment_of = [&](uint64_t item) -> Segment {
        if (item >= items) return {0, 0, 0};
        const uint64_t segment = item / parts;
        const uint32_t start = starts[segment];
        return {start, targets[segment], int(starts[segment + 1] - start)};
    };
    auto position_in = [&](const Segment& segment) {
        return lane < segment.count ? order[segment.start + lane] : 0;
    };
    Segment segment = segment_of(warp), next_segment = segment_of(warp + warps);
    uint32_t position = position_in(segment);
    for (uint64_t item = warp; item < items; item += warps) {
        const int column = int(item % parts) * PACKS * TILE<T> + lane * LANES;
        const uint32_t target = segment.target;
        const int count = segment.count;
        const uint32_t next_position = position_in(next_segment);
        segment = next_segment;
        next_segment = segment_of(item + 2 * warps);
        const bool is_whole = (target & PARTIAL) == 0;
        T* row = gradient + uint64_t(target & ~PARTIAL) * width;
        Pack<T> before[PACKS];
        float sums[PACKS][LANES] = {};
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int left = width - column - p * TILE<T>;
            before[p] = load_pack<VECTOR>(row + column + p * TILE<T>, is_whole ? left : 0);
        }
        for (int first = 0; first < count; first += ROWS) {
            Pack<T> loaded[ROWS][PACKS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint64_t from = uint64_t(__shfl_sync(ALL_LANES, position, (first + r) % WARP)) * width;
#pragma unroll
                for (int p = 0; p < PACKS; p++) {
                    const int at = column + p * TILE<T>;
                    loaded[r][p] = load_once<VECTOR>(dy + from + at, first + r < count ? width - at : 0);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int p = 0; p < PACKS; p++) {
                    float values[LANES];
                    unpack(loaded[r][p], values);
#pragma unroll
                    for (int k = 0; k < LANES; k++) sums[p][k] += values[k];
                }
            }
        }
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int at = column + p * TILE<T>;
            if (is_whole) add_to_gradient<VECTOR>(row + at, width - at, before[p], sums[p]);
            else store_floats(partial + uint64_t(target & ~PARTIAL) * width + at, width - at, sums[p]);
        }
        position = next_position;
    }
}

// The segments of long runs, in order.
template <typename T>
__device__ __forceinline__ void embedding_backward_long(
    const float* partial, const uint32_t* runs, T* gradient, int count, int width
) {
    for (int run = blockIdx.x; run < count; run += gridDim.x) {
        const uint32_t first = runs[3 * run], segments = runs[3 * run + 1];
        T* row = gradient + uint64_t(runs[3 * run + 2]) * width;
        for (int column = blockIdx.y * BLOCK + threadIdx.x; column < width; column += gridDim.y * BLOCK) {
            const float* sums = partial + uint64_t(first) * width + column;
            float sum = sums[0];
#pragma unroll 8
            for (uint32_t s = 1; s < segments; s++) sum += sums[uint64_t(s) * width];
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
            if (accumulate) embedding_forward<true, VECTOR_OF(v)>(table, ids, y, rows, width, first_row, table_rows); \
            else embedding_forward<false, VECTOR_OF(v)>(table, ids, y, rows, width, first_row, table_rows);           \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL add_positions_##T(                                                                                         \
        const T* x, const T* table, T* y, uint64_t batch, int time, int width, int first, int count                   \
    ) {                                                                                                               \
        by_alignment(rows_aligned(x, width) && aligned(table) && aligned(y), [&](auto v) {                            \
            add_positions<VECTOR_OF(v)>(x, table, y, batch, time, width, first, count);                               \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL embedding_backward_##T(                                                                           \
        const T* dy, const uint32_t* order, const uint32_t* starts, const uint32_t* targets, T* gradient,             \
        float* partial, int segments, int width                                                                       \
    ) {                                                                                                               \
        by_alignment(rows_aligned(dy, width) && aligned(gradient), [&](auto v) {                                      \
            embedding_backward<VECTOR_OF(v)>(dy, order, starts, targets, gradient, partial, segments, width);         \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL embedding_backward_long_##T(                                                                               \
        const float* partial, const uint32_t* runs, T* gradient, int count, int width                                 \
    ) {                                                                                                               \
        embedding_backward_long(partial, runs, gradient, count, width);                                               \
    }                                                                                                                 \
    KERNEL positions_backward_##T(                                                                                    \
        const T* dy, T* gradient, uint64_t batch, int time, int width, int first, int count                           \
    ) {                                                                                                               \
        by_alignment(rows_aligned(dy, width) && aligned(gradient), [&](auto v) {                                      \
            positions_backward<VECTOR_OF(v)>(dy, gradient, batch, time, width, first, count);                         \
        });                                                                                                           \
    }

FOR_EACH_TYPE(EMBEDDING_KERNELS)
