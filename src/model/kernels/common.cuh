// What the memory-bound kernels share: element types, 16-byte packs, reductions and the shapes that threads take.
//
// Rules of all kernels here:
// - Arithmetic is fp32; T is only how activations, weights and gradients are stored.
// - Two runs give the same bits, also on a GPU with another number of multiprocessors: no floating-point atomics, and
//   the order of every sum follows from sizes and types alone, neither from the grid nor from alignment.
// - Pointers need the alignment of their element only. Where addresses and widths allow, accesses take 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = __half;

// Instantiates a kernel for the three element types.
#define FOR_EACH_TYPE(KERNEL) KERNEL(f32) KERNEL(bf16) KERNEL(f16)

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
// Threads a block of every kernel that its table does not give another number.
constexpr int BLOCK = 256;
// Blocks of that size that must fit on a multiprocessor, so that enough bytes are under way while others compute.
constexpr int RESIDENT = 4;
constexpr int PACK_BYTES = 16;

__device__ __forceinline__ float to_float(f32 x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ f32 from_float<f32>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// 16 bytes of consecutive elements. Kept unconverted until they are used: half the registers, and loads that nobody
// waits for.
template <typename T> struct alignas(PACK_BYTES) Pack {
    static constexpr int LANES = PACK_BYTES / sizeof(T);
    T lane[LANES];
};

template <typename T> __device__ __forceinline__ void unpack(const Pack<T>& pack, float (&values)[Pack<T>::LANES]) {
#pragma unroll
    for (int k = 0; k < Pack<T>::LANES; k++) values[k] = to_float(pack.lane[k]);
}

// By one instruction an element: the compiler cuts words into halves before it widens them.
template <> __device__ __forceinline__ void unpack<bf16>(const Pack<bf16>& pack, float (&values)[8]) {
    const uint4& raw = *reinterpret_cast<const uint4*>(&pack);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        values[2 * k] = __uint_as_float(words[k] << 16);
        values[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
}

// Makes the compiler convert a pack again at its next use, instead of keeping twice the registers alive until then.
template <typename T> __device__ __forceinline__ void forget_values(Pack<T>& pack) {
    uint4& raw = *reinterpret_cast<uint4*>(&pack);
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

__device__ __forceinline__ Pack<f32> pack_values(const float (&v)[4], f32) { return {{v[0], v[1], v[2], v[3]}}; }

// Pairs are converted by one instruction.
__device__ __forceinline__ Pack<bf16> pack_values(const float (&v)[8], bf16) {
    Pack<bf16> pack;
#pragma unroll
    for (int k = 0; k < 8; k += 2)
        *reinterpret_cast<__nv_bfloat162*>(&pack.lane[k]) = __floats2bfloat162_rn(v[k], v[k + 1]);
    return pack;
}

__device__ __forceinline__ Pack<f16> pack_values(const float (&v)[8], f16) {
    Pack<f16> pack;
#pragma unroll
    for (int k = 0; k < 8; k += 2) *reinterpret_cast<__half2*>(&pack.lane[k]) = __floats2half2_rn(v[k], v[k + 1]);
    return pack;
}

template <typename T> __device__ __forceinline__ Pack<T> pack_of(const float (&values)[Pack<T>::LANES]) {
    return pack_values(values, T());
}

__device__ __forceinline__ bool aligned(const void* pointer, int bytes = PACK_BYTES) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether every row of a matrix with these rows begins at a pack.
template <typename T> __device__ __forceinline__ bool rows_aligned(const T* pointer, uint64_t row_elements) {
    return aligned(pointer) && row_elements % Pack<T>::LANES == 0;
}

template <typename T> __device__ __forceinline__ Pack<T> load_aligned(const T* pointer) {
    Pack<T> pack;
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(pointer);
    return pack;
}

template <typename T> __device__ __forceinline__ void store_aligned(T* pointer, const Pack<T>& pack) {
    *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&pack);
}

// Up to a pack of elements: `count` may be negative or beyond a pack; lanes that do not exist are zero. VECTOR says that
// the address is aligned and that `count` is no part of a pack.
template <bool VECTOR, typename T> __device__ __forceinline__ Pack<T> load_pack(const T* pointer, int count) {
    Pack<T> pack;
    if (VECTOR) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (count > 0) raw = *reinterpret_cast<const uint4*>(pointer);
        *reinterpret_cast<uint4*>(&pack) = raw;
    } else {
#pragma unroll
        for (int k = 0; k < Pack<T>::LANES; k++) pack.lane[k] = k < count ? pointer[k] : from_float<T>(0.0f);
    }
    return pack;
}

// The same of what is read once: it leaves the cache first, so that what other kernels have just written stays in it.
template <bool VECTOR, typename T> __device__ __forceinline__ Pack<T> load_once(const T* pointer, int count) {
    if (!VECTOR) return load_pack<false>(pointer, count);
    Pack<T> pack;
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (count > 0) raw = __ldcs(reinterpret_cast<const uint4*>(pointer));
    *reinterpret_cast<uint4*>(&pack) = raw;
    return pack;
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void store_pack(T* pointer, int count, const Pack<T>& pack) {
    if (VECTOR) {
        if (count > 0) store_aligned(pointer, pack);
    } else {
#pragma unroll
        for (int k = 0; k < Pack<T>::LANES; k++) {
            if (k < count) pointer[k] = pack.lane[k];
        }
    }
}

// Writes up to N floats.
template <int N> __device__ __forceinline__ void store_floats(float* pointer, int count, const float (&values)[N]) {
    if (count >= N && aligned(pointer)) {
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            *reinterpret_cast<float4*>(pointer + k) = make_float4(
                values[k], values[k + 1], values[k + 2], values[k + 3]
            );
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (k < count) pointer[k] = values[k];
        }
    }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

// The sums of N values over a warp, N a power of two: lane l gets that of value l / (32 / N). Every step halves the
// values that a lane carries, so that all take about as many steps as one.
template <int N> __device__ __forceinline__ float warp_sums(float (&values)[N]) {
    int offset = WARP / 2;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2, offset /= 2) {
        const bool upper = threadIdx.x & offset;
#pragma unroll
        for (int k = 0; k < half; k++) {
            const float given = upper ? values[k] : values[k + half];
            const float kept = upper ? values[k + half] : values[k];
            values[k] = kept + __shfl_xor_sync(ALL_LANES, given, offset);
        }
    }
    float sum = values[0];
#pragma unroll
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    return sum;
}

// Starts a copy of 4, 8 or 16 bytes to shared memory, both addresses aligned to as many. Nobody waits for it before
// wait_for_copies, and only the thread that started it may then count on the bytes.
template <int BYTES> __device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == PACK_BYTES)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(BYTES) : "memory");
}

// Ends a group of copies; groups may be empty.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the last LEFT groups of this thread are under way.
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// 2^x to about two units in the last place; results below the normal numbers are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// e^x to about two units in the last place for results that matter next to 1.
__device__ __forceinline__ float fast_exp(float x) { return exp2_approximate(x * 1.4426950409f); }

// Until the kernel before is done and what it wrote is there: for kernels whose blocks may come while that one ends.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on, when all blocks have come to it, those of such a kernel may come.
__device__ __forceinline__ void let_next_kernel_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint64_t global_thread() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ uint64_t grid_threads() { return uint64_t(gridDim.x) * blockDim.x; }

// A number that the compiler knows, as an argument.
template <int N> struct Constant {
    static constexpr int value = N;
};

// Calls f with Constant<1> or Constant<0>: kernels are compiled for aligned rows and for any.
template <typename F> __device__ __forceinline__ void by_alignment(bool vector, F f) {
    if (vector) f(Constant<1>());
    else f(Constant<0>());
}
// The template argument that such a constant stands for.
#define VECTOR_OF(constant) (decltype(constant)::value != 0)

// Element by element over arrays of one length: `op(values, first)` turns values[input][k] of elements first + k into
// results in values[0]. Outputs may be inputs: a thread writes only where it has read.
template <int INPUTS, typename T, typename Op>
__device__ __forceinline__ void map_elements(const T* const (&in)[INPUTS], T* out, uint64_t n, Op op) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = 4;
    bool vector = aligned(out);
#pragma unroll
    for (int k = 0; k < INPUTS; k++) vector = vector && aligned(in[k]);
    const uint64_t packs = vector ? n / LANES : 0;
    const uint64_t tile = uint64_t(blockDim.x) * UNROLL;
    auto work = [&](auto unroll, uint64_t first) {
        Pack<T> loaded[unroll.value][INPUTS];
#pragma unroll
        for (int u = 0; u < unroll.value; u++) {
#pragma unroll
            for (int k = 0; k < INPUTS; k++) loaded[u][k] = load_aligned(in[k] + (first + u * blockDim.x) * LANES);
        }
#pragma unroll
        for (int u = 0; u < unroll.value; u++) {
            const uint64_t element = (first + u * blockDim.x) * LANES;
            float values[INPUTS][LANES];
#pragma unroll
            for (int k = 0; k < INPUTS; k++) unpack(loaded[u][k], values[k]);
            op(values, element);
            store_aligned(out + element, pack_of<T>(values[0]));
        }
    };
    const uint64_t whole = packs / tile * tile;
    for (uint64_t base = blockIdx.x * tile; base < whole; base += gridDim.x * tile)
        work(Constant<UNROLL>(), base + threadIdx.x);
    for (uint64_t pack = whole + global_thread(); pack < packs; pack += grid_threads()) work(Constant<1>(), pack);
    for (uint64_t i = packs * LANES + global_thread(); i < n; i += grid_threads()) {
        float values[INPUTS][1];
#pragma unroll
        for (int k = 0; k < INPUTS; k++) values[k][0] = to_float(in[k][i]);
        op(values, i);
        out[i] = from_float<T>(values[0][0]);
    }
}

// A block of BLOCK threads over a tile of a matrix: every lane of a warp keeps one pack of columns, every warp takes
// another row.
template <typename T> struct ColumnTile {
    static constexpr int COLUMNS = WARP * Pack<T>::LANES;
    static constexpr int WARPS = BLOCK / WARP;
    int column; // the first of this thread's pack
    int count;  // columns from there to the end of the row; may be negative
    int warp;

    __device__ __forceinline__ explicit ColumnTile(int cols) {
        column = int(blockIdx.x) * COLUMNS + int(threadIdx.x % WARP) * Pack<T>::LANES;
        count = cols - column;
        warp = threadIdx.x / WARP;
    }
};

// Adds the warps' sums of one column tile in order of the warps and writes them.
template <typename T>
__device__ __forceinline__ void write_column_sums(
    const ColumnTile<T>& tile, const float (&sums)[Pack<T>::LANES], float* out
) {
    constexpr int LANES = Pack<T>::LANES;
    __shared__ float shared[ColumnTile<T>::WARPS][ColumnTile<T>::COLUMNS];
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < LANES; k++) shared[tile.warp][k * WARP + lane] = sums[k];
    __syncthreads();
    for (int i = threadIdx.x; i < ColumnTile<T>::COLUMNS; i += BLOCK) {
        const int column = blockIdx.x * ColumnTile<T>::COLUMNS + i;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < ColumnTile<T>::WARPS; w++) sum += shared[w][i % LANES * WARP + i / LANES];
        if (column < tile.column + tile.count) out[column] = sum;
    }
    __syncthreads();
}

// Adds the partial sums of a column tile, in order, to the gradient, in the last of the blocks that write them.
// `counters` has a zero for every tile and is left so. Every block of the tile calls this once, after its partial sums.
template <typename T>
__device__ __forceinline__ void finish_columns(
    const ColumnTile<T>& tile, const float* partial, int partials, int cols, T* gradient, unsigned* counters
) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // The sums of all threads, which the barrier has put before this, must be seen by whoever sees the count.
        __threadfence();
        is_last = atomicAdd(&counters[blockIdx.x], 1u) == gridDim.y - 1;
        if (is_last) counters[blockIdx.x] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    constexpr int UNROLL = 16;
    for (int i = threadIdx.x; i < ColumnTile<T>::COLUMNS; i += BLOCK) {
        const int column = blockIdx.x * ColumnTile<T>::COLUMNS + i;
        if (column >= cols) continue;
        const float before = to_float(gradient[column]);
        float sum = 0.0f;
        for (int first = 0; first < partials; first += UNROLL) {
            float part[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                // Other multiprocessors wrote these: not from this one's cache.
                part[u] = first + u < partials ? __ldcg(partial + uint64_t(first + u) * cols + column) : 0.0f;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) sum += part[u];
        }
        gradient[column] = from_float<T>(before + sum);
    }
}

// Rows [first, end) of slice `index` of `slices` equal ones.
struct RowSlice {
    uint64_t first, end;

    __device__ __forceinline__ RowSlice(uint64_t rows, int index, int slices) {
        const uint64_t length = (rows + slices - 1) / slices;
        first = min(rows, index * length);
        end = min(rows, first + length);
    }
};
