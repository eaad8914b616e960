// Sums in fp32 on their way to the type of a tensor.
//
// kernel                        arguments                                                   grid
// cast_f32_to_T                 const float* x, T* y, uint64_t n                            any [1]
// read_through                  const uint4* x, uint64_t n, unsigned* never                 any [1]
//
// T is f32, bf16 or f16. Block: 256 threads. No dynamic shared memory, no scratch.
// [1] ceil(n / 8192) is good.
// Casts round to nearest, ties to even. read_through only reads 16 n bytes: `never` is written if they are all ones, which is
// for the compiler to believe in.

#include "common.cuh"

constexpr int GROUP = 8;  // consecutive elements of a thread: a pack of the narrow type, two of the wide one
constexpr int GROUPS = 2; // in flight

// A group of elements of any type.
template <typename T> struct Group {
    static constexpr int PACKS = GROUP / Pack<T>::LANES;
    Pack<T> pack[PACKS];

    __device__ __forceinline__ void load(const T* pointer) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) pack[p] = load_aligned(pointer + p * Pack<T>::LANES);
    }

    __device__ __forceinline__ float value(int k) const {
        return to_float(pack[k / Pack<T>::LANES].lane[k % Pack<T>::LANES]);
    }

    __device__ __forceinline__ void store(T* pointer, const float (&values)[GROUP]) {
        constexpr int LANES = Pack<T>::LANES;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            float part[LANES];
#pragma unroll
            for (int k = 0; k < LANES; k++) part[k] = values[p * LANES + k];
            store_aligned(pointer + p * LANES, pack_of<T>(part));
        }
    }
};

template <typename X, typename Y> __device__ __forceinline__ void convert(const X* x, Y* y, uint64_t n) {
    const uint64_t groups = aligned(x) && aligned(y) ? n / GROUP : 0;
    const uint64_t tile = uint64_t(blockDim.x) * GROUPS;
    for (uint64_t base = blockIdx.x * tile + threadIdx.x; base < groups; base += gridDim.x * tile) {
        Group<X> from[GROUPS];
        Group<Y> to[GROUPS];
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
            const uint64_t group = base + u * blockDim.x;
            if (group < groups) from[u].load(x + group * GROUP);
        }
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
            const uint64_t group = base + u * blockDim.x;
            if (group < groups) {
                float values[GROUP];
#pragma unroll
                for (int k = 0; k < GROUP; k++) values[k] = from[u].value(k);
                to[u].store(y + group * GROUP, values);
            }
        }
    }
    for (uint64_t i = groups * GROUP + global_thread(); i < n; i += grid_threads()) y[i] = from_float<Y>(to_float(x[i]));
}

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)

#define CAST_KERNEL(T) \
    KERNEL cast_f32_to_##T(const float* x, T* y, uint64_t n) { convert(x, y, n); }

FOR_EACH_TYPE(CAST_KERNEL)

// By plain loads: data that is marked as read once would leave the rest of the cache as it was.
KERNEL read_through(const uint4* x, uint64_t n, unsigned* never) {
    uint4 all = make_uint4(~0u, ~0u, ~0u, ~0u);
    for (uint64_t i = global_thread(); i < n; i += grid_threads()) {
        const uint4 v = x[i];
        all = make_uint4(all.x & v.x, all.y & v.y, all.z & v.z, all.w & v.w);
    }
    if ((all.x & all.y & all.z & all.w) == ~0u && n > 0) *never = 1;
}
