// Conversions between element types, and what is done to whole arrays.
//
// kernel                        arguments                                                   grid
// cast_X_to_Y                   const X* x, Y* y, uint64_t n                                any [1]
// accumulate_f32_to_T           const float* source, T* gradient, uint64_t n                any [1]
// scale_add_T                   const T* x, T* y, uint64_t n, float alpha, float beta       any [1]
// fill_T                        T* y, uint64_t n, float value                               any [1]
// read_through                  const uint4* x, uint64_t n, unsigned* never                 any [1]
//
// X, Y and T are f32, bf16 or f16; X and Y differ. Block: 256 threads. No dynamic shared memory, no scratch.
// [1] ceil(n / 8192) is good.
// Casts round to nearest, ties to even. accumulate: gradient = T(float(gradient) + source). scale_add: y = T(alpha * x +
// beta * y), where beta = 0 does not read y; x may be y. read_through only reads 16 n bytes: `never` is written if they are
// all ones, which is for the compiler to believe in.

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

// y = op(x, y), where y is read only if READ_Y.
template <bool READ_Y, typename X, typename Y, typename Op>
__device__ __forceinline__ void convert(const X* x, Y* y, uint64_t n, Op op) {
    const uint64_t groups = aligned(x) && aligned(y) ? n / GROUP : 0;
    const uint64_t tile = uint64_t(blockDim.x) * GROUPS;
    for (uint64_t base = blockIdx.x * tile + threadIdx.x; base < groups; base += gridDim.x * tile) {
        Group<X> from[GROUPS];
        Group<Y> to[GROUPS];
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
            const uint64_t group = base + u * blockDim.x;
            if (group < groups) {
                from[u].load(x + group * GROUP);
                if (READ_Y) to[u].load(y + group * GROUP);
            }
        }
#pragma unroll
        for (int u = 0; u < GROUPS; u++) {
            const uint64_t group = base + u * blockDim.x;
            if (group < groups) {
                float values[GROUP];
#pragma unroll
                for (int k = 0; k < GROUP; k++) values[k] = op(from[u].value(k), READ_Y ? to[u].value(k) : 0.0f);
                to[u].store(y + group * GROUP, values);
            }
        }
    }
    for (uint64_t i = groups * GROUP + global_thread(); i < n; i += grid_threads()) {
        y[i] = from_float<Y>(op(to_float(x[i]), READ_Y ? to_float(y[i]) : 0.0f));
    }
}

template <typename T> __device__ __forceinline__ void fill(T* y, uint64_t n, float value) {
    constexpr int LANES = Pack<T>::LANES;
    const T element = from_float<T>(value);
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < LANES; k++) pack.lane[k] = element;
    const uint64_t packs = aligned(y) ? n / LANES : 0;
    for (uint64_t i = global_thread(); i < packs; i += grid_threads()) store_aligned(y + i * LANES, pack);
    for (uint64_t i = packs * LANES + global_thread(); i < n; i += grid_threads()) y[i] = element;
}

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)

#define CAST_KERNEL(X, Y)                                                  \
    KERNEL cast_##X##_to_##Y(const X* x, Y* y, uint64_t n) {               \
        convert<false>(x, y, n, [](float value, float) { return value; }); \
    }

CAST_KERNEL(f32, bf16)
CAST_KERNEL(f32, f16)
CAST_KERNEL(bf16, f32)
CAST_KERNEL(bf16, f16)
CAST_KERNEL(f16, f32)
CAST_KERNEL(f16, bf16)

#define ARRAY_KERNELS(T)                                                                      \
    KERNEL accumulate_f32_to_##T(const float* source, T* gradient, uint64_t n) {              \
        convert<true>(source, gradient, n, [](float x, float y) { return y + x; });           \
    }                                                                                         \
    KERNEL scale_add_##T(const T* x, T* y, uint64_t n, float alpha, float beta) {             \
        if (beta == 0.0f) convert<false>(x, y, n, [=](float a, float) { return alpha * a; }); \
        else convert<true>(x, y, n, [=](float a, float b) { return alpha * a + beta * b; });  \
    }                                                                                         \
    KERNEL fill_##T(T* y, uint64_t n, float value) { fill(y, n, value); }

FOR_EACH_TYPE(ARRAY_KERNELS)

// By plain loads: data that is marked as read once would leave the rest of the cache as it was.
KERNEL read_through(const uint4* x, uint64_t n, unsigned* never) {
    uint4 all = make_uint4(~0u, ~0u, ~0u, ~0u);
    for (uint64_t i = global_thread(); i < n; i += grid_threads()) {
        const uint4 v = x[i];
        all = make_uint4(all.x & v.x, all.y & v.y, all.z & v.z, all.w & v.w);
    }
    if ((all.x & all.y & all.z & all.w) == ~0u && n > 0) *never = 1;
}
