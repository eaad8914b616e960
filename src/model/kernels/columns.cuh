// Sums over the rows of a matrix, in an order that follows from sizes alone: partial sums of slices of rows, then the sum of
// the partials.
#pragma once

#include "common.cuh"

// Threads a block of accumulate_columns.
constexpr int ACCUMULATE_BLOCK = 512;

template <bool VECTOR, typename T>
__device__ __forceinline__ void column_sums(
    const T* dy, float* partial, uint64_t rows, int cols, T* gradient, unsigned* counters
) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = 16;
    const ColumnTile<T> tile(cols);
    const RowSlice slice(rows, blockIdx.y, gridDim.y);
    float sums[LANES] = {};
    for (uint64_t first = slice.first + tile.warp; first < slice.end; first += UNROLL * tile.WARPS) {
        Pack<T> loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const uint64_t row = first + u * tile.WARPS;
            loaded[u] = load_once<VECTOR>(dy + row * cols + tile.column, row < slice.end ? tile.count : 0);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float values[LANES];
            unpack(loaded[u], values);
#pragma unroll
            for (int k = 0; k < LANES; k++) sums[k] += values[k];
        }
    }
    write_column_sums(tile, sums, partial + uint64_t(blockIdx.y) * cols);
    if (counters) finish_columns(tile, partial, gridDim.y, cols, gradient, counters);
}

// A warp takes every sixteenth partial of 32 columns; then the warps' sums are added in order.
template <typename T>
__device__ __forceinline__ void accumulate_columns(const float* partial, int partials, int cols, T* gradient) {
    constexpr int WARPS = ACCUMULATE_BLOCK / WARP;
    __shared__ float shared[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < cols) {
#pragma unroll 16
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
