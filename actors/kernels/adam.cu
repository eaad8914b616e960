// Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019), and sums of squares, with the bits of the host's
// code in src/adam: every operation is rounded by itself, in the same order, denormal numbers are kept, and nothing is
// contracted. Only what a NaN of momentum, variance or an fp32 weight carries besides being one may differ.
//
// kernel         arguments                                                                       grid                 block
// adam_fp32      float* weight, float* momentum, float* variance, const float* gradient,         any [1]              256
//                uint64_t n, SCALARS
// adam_bf16      uint16_t* weight, uint16_t* low, float* momentum, float* variance,              any [1]              256
//                const uint16_t* gradient, uint64_t n, SCALARS
// adam_fp16      uint16_t* weight, float* master, float* momentum, float* variance,              any [1]              256
//                const __half* gradient, uint64_t n, SCALARS
// row_sums_f32   const float* gradient, double* sums, uint64_t rows, uint64_t columns            ceil(rows / 32) [2]  128
// row_sums_bf16  const uint16_t* gradient, double* sums, uint64_t rows, uint64_t columns         ceil(rows / 32) [2]  128
// row_sums_fp16  const __half* gradient, double* sums, uint64_t rows, uint64_t columns           ceil(rows / 32) [2]  128
//
// SCALARS = float gradient_scale, float shrink, float l2, float lerp, float beta2, float one_minus_beta2,
//           float sqrt_correction2, float eps, float negative_step_size, int use_l2, int lerp_from_gradient
// They are those of StepScalars. For parameters without decay pass shrink = 1 and use_l2 = 0; else use_l2 says whether l2
// is not 0, and where it is used shrink is not.
// sums[r] is the sum of the squares of row r, for all rows in sequence.
// [1] ceil(n / 1024) is good.  [2] Any grid works.  No dynamic shared memory, no scratch.
// Every address needs the alignment of its element only. Vector accesses are used where weight, low, momentum and
// variance become aligned at the same element, as they do in chunks of one group, and where the gradient is aligned too.

#include "stored.cuh"

constexpr int BLOCK = 256;
constexpr int LANES = 4; // consecutive elements of a thread: 16 bytes of fp32, 8 of 16 bits

struct Scalars {
    float gradient_scale, shrink, l2, lerp, beta2, one_minus_beta2, sqrt_correction2, eps, negative_step_size;
};

// The order of operations of `update` on the host.
template <bool L2, bool FROM_GRADIENT>
__device__ __forceinline__ void update(
    const Scalars& s, float& weight, float& momentum, float& variance, float gradient
) {
    gradient = __fmul_rn(gradient, s.gradient_scale);
    if (L2) gradient = __fadd_rn(gradient, __fmul_rn(s.l2, weight));
    else weight = __fmul_rn(weight, s.shrink);
    const float base = FROM_GRADIENT ? gradient : momentum;
    momentum = __fadd_rn(base, __fmul_rn(s.lerp, __fsub_rn(gradient, momentum)));
    variance = __fadd_rn(__fmul_rn(variance, s.beta2), __fmul_rn(__fmul_rn(s.one_minus_beta2, gradient), gradient));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(variance), s.sqrt_correction2), s.eps);
    weight = __fadd_rn(weight, __fdiv_rn(__fmul_rn(s.negative_step_size, momentum), denominator));
}

__device__ __forceinline__ float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(float value) { return value; }

// LANES elements, read and written by one access.
template <typename T> struct alignas(LANES * sizeof(T)) Quad {
    T lane[LANES];
};

template <typename T> __device__ __forceinline__ Quad<T> load_quad(const T* p) {
    return *reinterpret_cast<const Quad<T>*>(p);
}
template <typename T> __device__ __forceinline__ void store_quad(T* p, const Quad<T>& q) {
    *reinterpret_cast<Quad<T>*>(p) = q;
}

template <typename T> __device__ __forceinline__ bool aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Quad<T>) == 0;
}

// Elements before the first aligned one.
template <typename T> __device__ __forceinline__ uint64_t elements_before_quad(const T* pointer) {
    const uint64_t beyond = reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % LANES;
    return beyond == 0 ? 0 : LANES - beyond;
}

// An element's weight: fp32, or bf16 with its low bits.
struct WeightFp32 {
    using Gradient = float;
    float* weight;

    __device__ __forceinline__ uint64_t before_quad() const { return elements_before_quad(weight); }
    __device__ __forceinline__ bool aligned_at(uint64_t i) const { return aligned(weight + i); }
    __device__ __forceinline__ float load(uint64_t i) const { return weight[i]; }
    __device__ __forceinline__ void store(uint64_t i, float value) const { weight[i] = value; }

    struct Loaded {
        Quad<float> weight;
        __device__ __forceinline__ float value(int k) const { return weight.lane[k]; }
        __device__ __forceinline__ void set(int k, float value) { weight.lane[k] = value; }
    };
    __device__ __forceinline__ Loaded load_quads(uint64_t i) const { return {load_quad(weight + i)}; }
    __device__ __forceinline__ void store_quads(uint64_t i, const Loaded& q) const { store_quad(weight + i, q.weight); }
};

struct WeightBf16 {
    using Gradient = uint16_t;
    uint16_t *weight, *low;

    __device__ __forceinline__ uint64_t before_quad() const { return elements_before_quad(weight); }
    __device__ __forceinline__ bool aligned_at(uint64_t i) const { return aligned(weight + i) && aligned(low + i); }
    __device__ __forceinline__ float load(uint64_t i) const { return join(weight[i], low[i]); }
    __device__ __forceinline__ void store(uint64_t i, float value) const { split(value, weight[i], low[i]); }

    struct Loaded {
        Quad<uint16_t> weight, low;
        __device__ __forceinline__ float value(int k) const { return join(weight.lane[k], low.lane[k]); }
        __device__ __forceinline__ void set(int k, float value) { split(value, weight.lane[k], low.lane[k]); }
    };
    __device__ __forceinline__ Loaded load_quads(uint64_t i) const {
        return {load_quad(weight + i), load_quad(low + i)};
    }
    __device__ __forceinline__ void store_quads(uint64_t i, const Loaded& q) const {
        store_quad(weight + i, q.weight);
        store_quad(low + i, q.low);
    }
};

// An fp32 weight beside its fp16 rounding, which is written only.
struct WeightFp16 {
    using Gradient = __half;
    uint16_t* weight;
    float* master;

    __device__ __forceinline__ uint64_t before_quad() const { return elements_before_quad(master); }
    __device__ __forceinline__ bool aligned_at(uint64_t i) const { return aligned(weight + i) && aligned(master + i); }
    __device__ __forceinline__ float load(uint64_t i) const { return master[i]; }
    __device__ __forceinline__ void store(uint64_t i, float value) const {
        master[i] = value;
        weight[i] = narrow(value);
    }

    struct Loaded {
        Quad<float> master;
        __device__ __forceinline__ float value(int k) const { return master.lane[k]; }
        __device__ __forceinline__ void set(int k, float value) { master.lane[k] = value; }
    };
    __device__ __forceinline__ Loaded load_quads(uint64_t i) const { return {load_quad(master + i)}; }
    __device__ __forceinline__ void store_quads(uint64_t i, const Loaded& q) const {
        store_quad(master + i, q.master);
        Quad<uint16_t> rounded;
#pragma unroll
        for (int k = 0; k < LANES; k++) rounded.lane[k] = narrow(q.master.lane[k]);
        store_quad(weight + i, rounded);
    }
};

template <bool L2, bool FROM_GRADIENT, typename Weight>
__device__ __forceinline__ void adam(
    const Scalars& s, const Weight& weight, float* momentum, float* variance, const typename Weight::Gradient* gradient,
    uint64_t n
) {
    const uint64_t thread = uint64_t(blockIdx.x) * BLOCK + threadIdx.x, threads = uint64_t(gridDim.x) * BLOCK;
    const uint64_t lead = min(n, weight.before_quad());
    const bool vector = weight.aligned_at(lead) && aligned(momentum + lead) && aligned(variance + lead);
    const bool vector_gradient = aligned(gradient + lead);
    const uint64_t quads = vector ? (n - lead) / LANES : 0;
    for (uint64_t quad = thread; quad < quads; quad += threads) {
        const uint64_t i = lead + quad * LANES;
        auto w = weight.load_quads(i);
        Quad<float> m = load_quad(momentum + i), v = load_quad(variance + i);
        Quad<typename Weight::Gradient> g;
        if (vector_gradient) {
            g = load_quad(gradient + i);
        } else {
#pragma unroll
            for (int k = 0; k < LANES; k++) g.lane[k] = gradient[i + k];
        }
#pragma unroll
        for (int k = 0; k < LANES; k++) {
            float value = w.value(k);
            update<L2, FROM_GRADIENT>(s, value, m.lane[k], v.lane[k], widen(g.lane[k]));
            w.set(k, value);
        }
        weight.store_quads(i, w);
        store_quad(momentum + i, m);
        store_quad(variance + i, v);
    }
    // What lies before the first quad and after the last.
    const uint64_t first = vector ? lead : 0;
    for (uint64_t rest = thread; rest < n - quads * LANES; rest += threads) {
        const uint64_t i = rest < first ? rest : rest + quads * LANES;
        float value = weight.load(i);
        update<L2, FROM_GRADIENT>(s, value, momentum[i], variance[i], widen(gradient[i]));
        weight.store(i, value);
    }
}

template <typename Weight>
__device__ __forceinline__ void adam_any(
    const Scalars& s, const Weight& weight, float* momentum, float* variance, const typename Weight::Gradient* gradient,
    uint64_t n, bool l2, bool from_gradient
) {
    if (l2 && from_gradient) adam<true, true>(s, weight, momentum, variance, gradient, n);
    else if (l2) adam<true, false>(s, weight, momentum, variance, gradient, n);
    else if (from_gradient) adam<false, true>(s, weight, momentum, variance, gradient, n);
    else adam<false, false>(s, weight, momentum, variance, gradient, n);
}

#define SCALAR_ARGUMENTS                                                                          \
    float gradient_scale, float shrink, float l2, float lerp, float beta2, float one_minus_beta2, \
        float sqrt_correction2, float eps, float negative_step_size, int use_l2, int lerp_from_gradient
#define SCALARS {gradient_scale, shrink, l2, lerp, beta2, one_minus_beta2, sqrt_correction2, eps, negative_step_size}

extern "C" __global__ void __launch_bounds__(BLOCK)
    adam_fp32(float* weight, float* momentum, float* variance, const float* gradient, uint64_t n, SCALAR_ARGUMENTS) {
    const Scalars scalars = SCALARS;
    adam_any(scalars, WeightFp32{weight}, momentum, variance, gradient, n, use_l2 != 0, lerp_from_gradient != 0);
}

extern "C" __global__ void __launch_bounds__(BLOCK) adam_bf16(
    uint16_t* weight, uint16_t* low, float* momentum, float* variance, const uint16_t* gradient, uint64_t n,
    SCALAR_ARGUMENTS
) {
    const Scalars scalars = SCALARS;
    adam_any(scalars, WeightBf16{weight, low}, momentum, variance, gradient, n, use_l2 != 0, lerp_from_gradient != 0);
}

extern "C" __global__ void __launch_bounds__(BLOCK) adam_fp16(
    uint16_t* weight, float* master, float* momentum, float* variance, const __half* gradient, uint64_t n,
    SCALAR_ARGUMENTS
) {
    const Scalars scalars = SCALARS;
    adam_any(scalars, WeightFp16{weight, master}, momentum, variance, gradient, n, use_l2 != 0, lerp_from_gradient != 0);
}

// Sums of squares: element i of a row belongs to lane i % 16, each lane adds in double in order, and the lanes are added
// as a tree. Four threads share a row, each with four of its lanes, so eight rows share a warp.
constexpr int ROW_LANES = 16;
constexpr int ROW_THREADS = ROW_LANES / LANES;
constexpr int ROW_BLOCK = 128;
constexpr int ROWS_A_BLOCK = ROW_BLOCK / ROW_THREADS;
constexpr int ROW_RESIDENT = 4;      // blocks a multiprocessor
constexpr int NARROW_RESIDENT = 6;   // of numbers of 16 bits, which are under way to shared memory instead of registers
constexpr int BYTES_IN_FLIGHT = 128; // of one thread that loads to registers

// A quad as it was loaded: bf16 stays packed in two words until it is used.
template <typename T> struct RowQuad;

template <> struct RowQuad<float> {
    Quad<float> raw;

    __device__ __forceinline__ void load(const float* p) { raw = load_quad(p); }
    __device__ __forceinline__ void load_elements(const float* p) { raw = {{p[0], p[1], p[2], p[3]}}; }
    __device__ __forceinline__ float value(int k) const { return raw.lane[k]; }
};

template <> struct RowQuad<uint16_t> {
    uint2 raw;

    __device__ __forceinline__ void load(const uint16_t* p) { raw = *reinterpret_cast<const uint2*>(p); }
    __device__ __forceinline__ void load_elements(const uint16_t* p) {
        raw = make_uint2(p[0] | uint32_t(p[1]) << 16, p[2] | uint32_t(p[3]) << 16);
    }
    __device__ __forceinline__ float value(int k) const {
        const uint32_t word = k < 2 ? raw.x : raw.y;
        return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000);
    }
};

template <> struct RowQuad<__half> {
    uint2 raw;

    __device__ __forceinline__ void load(const __half* p) { raw = *reinterpret_cast<const uint2*>(p); }
    __device__ __forceinline__ void load_elements(const __half* p) {
        const auto bits = [p](int k) { return uint32_t(__half_as_ushort(p[k])); };
        raw = make_uint2(bits(0) | bits(1) << 16, bits(2) | bits(3) << 16);
    }
    __device__ __forceinline__ float value(int k) const {
        const uint32_t word = k < 2 ? raw.x : raw.y;
        return __half2float(__ushort_as_half(uint16_t(k % 2 == 0 ? word : word >> 16)));
    }
};

template <typename T> __device__ __forceinline__ void add_squares(double (&lanes)[LANES], const RowQuad<T>& quad) {
#pragma unroll
    for (int k = 0; k < LANES; k++) {
        // The square of an fp32 number is exact in double: a fused operation rounds as two would.
        const double value = double(quad.value(k));
        lanes[k] = fma(value, value, lanes[k]);
    }
}

template <bool VECTOR, typename T> __device__ __forceinline__ RowQuad<T> load_row_quad(const T* p) {
    RowQuad<T> quad;
    if constexpr (VECTOR) quad.load(p);
    else quad.load_elements(p);
    return quad;
}

// Of rows of 16-bit numbers the four threads of a row would take only 32 bytes at a time. So a warp brings its eight rows
// to shared memory, a piece of each at a time, in whole lines, and its threads read them there in the order of their sums.
constexpr int WARP = 32;
constexpr int ROWS_A_WARP = WARP / ROW_THREADS;
constexpr int COPY_BYTES = 16;
constexpr int PIECE = 512; // bytes of a row in a stage
constexpr int STAGES = 2;
// Keeps the rows of a warp in different banks.
template <typename T> constexpr int PIECE_STRIDE = PIECE + ROW_LANES * sizeof(T);
template <typename T> constexpr int STAGE_BYTES = ROWS_A_WARP * PIECE_STRIDE<T>;

// Starts a copy of 16 bytes that are read once, so that they leave the cache first.
__device__ __forceinline__ void copy_once(void* shared, const void* global) {
    const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "l"(policy)
                 : "memory");
}

// A warp's eight rows from `first` on, piece by piece: adds to the lanes what whole pieces hold, and returns the blocks of
// ROW_LANES elements that it has added.
template <typename T>
__device__ __forceinline__ uint64_t add_staged(
    double (&lanes)[LANES], const T* gradient, uint64_t first, uint64_t rows, uint64_t columns
) {
    constexpr int PIECE_BLOCKS = PIECE / (ROW_LANES * sizeof(T));
    constexpr int LINE_LANES = PIECE / COPY_BYTES; // lanes that copy a piece
    alignas(COPY_BYTES) __shared__ unsigned char staging[ROW_BLOCK / WARP][STAGES][STAGE_BYTES<T>];
    const int part = threadIdx.x % ROW_THREADS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint64_t pieces = columns / (ROW_LANES * PIECE_BLOCKS);
    auto fetch = [&](uint64_t piece) {
        if (piece < pieces) {
#pragma unroll
            for (int i = 0; i < ROWS_A_WARP * LINE_LANES / WARP; i++) {
                const int r = (i * WARP + lane) / LINE_LANES, at = (i * WARP + lane) % LINE_LANES * COPY_BYTES;
                const char* from = reinterpret_cast<const char*>(gradient + (first + r) * columns);
                if (first + r < rows)
                    copy_once(&staging[warp][piece % STAGES][r * PIECE_STRIDE<T> + at], from + piece * PIECE + at);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch(s);
    for (uint64_t piece = 0; piece < pieces; piece++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        // The piece is there for the whole warp, and the whole warp is done with the piece before.
        __syncwarp();
        fetch(piece + STAGES - 1);
        const unsigned char* at = &staging[warp][piece % STAGES][lane / ROW_THREADS * PIECE_STRIDE<T>];
#pragma unroll
        for (int block = 0; block < PIECE_BLOCKS; block++) {
            const T* quad = reinterpret_cast<const T*>(at) + block * ROW_LANES + part * LANES;
            add_squares(lanes, load_row_quad<true>(quad));
        }
    }
    __syncwarp();
    return pieces * PIECE_BLOCKS;
}

template <bool STAGED, bool VECTOR, typename T>
__device__ __forceinline__ void row_sums(const T* gradient, double* sums, uint64_t rows, uint64_t columns) {
    constexpr int UNROLL = BYTES_IN_FLIGHT / (sizeof(T) < sizeof(float) ? 2 : 1) / sizeof(Quad<T>);
    constexpr unsigned ALL = 0xffffffffu;
    const int part = threadIdx.x % ROW_THREADS;
    const uint64_t blocks = columns / ROW_LANES;
    const int tail = int(columns % ROW_LANES) - part * LANES;
    // Whole warps take part in the shuffles: rows beyond the last are summed as nothing.
    const uint64_t stride = uint64_t(gridDim.x) * ROWS_A_BLOCK;
    for (uint64_t base = uint64_t(blockIdx.x) * ROWS_A_BLOCK; base < rows; base += stride) {
        const uint64_t row = base + threadIdx.x / ROW_THREADS;
        const bool exists = row < rows;
        const T* p = gradient + row * columns + part * LANES;
        double lanes[LANES] = {0.0, 0.0, 0.0, 0.0};
        uint64_t block = 0;
        if constexpr (STAGED)
            block = add_staged(lanes, gradient, base + threadIdx.x / WARP * ROWS_A_WARP, rows, columns);
        // What was staged of a row that does not exist is anything.
        if (!exists) lanes[0] = lanes[1] = lanes[2] = lanes[3] = 0.0;
        if (exists) {
            // The next quads are under way while the current ones are added.
            if constexpr (!STAGED) {
                RowQuad<T> quads[UNROLL];
                if (UNROLL <= blocks) {
#pragma unroll
                    for (int u = 0; u < UNROLL; u++) quads[u] = load_row_quad<VECTOR>(p + u * ROW_LANES);
                }
                for (; block + UNROLL <= blocks; block += UNROLL) {
                    RowQuad<T> next[UNROLL];
                    if (block + 2 * UNROLL <= blocks) {
#pragma unroll
                        for (int u = 0; u < UNROLL; u++)
                            next[u] = load_row_quad<VECTOR>(p + (block + UNROLL + u) * ROW_LANES);
                    }
#pragma unroll
                    for (int u = 0; u < UNROLL; u++) add_squares(lanes, quads[u]);
#pragma unroll
                    for (int u = 0; u < UNROLL; u++) quads[u] = next[u];
                }
            }
            for (; block < blocks; block++) add_squares(lanes, load_row_quad<VECTOR>(p + block * ROW_LANES));
            for (int k = 0; k < LANES; k++) {
                if (k < tail) {
                    const double value = double(widen(p[blocks * ROW_LANES + k]));
                    lanes[k] = fma(value, value, lanes[k]);
                }
            }
        }
        // The tree: halves of 8 lanes, then of 4, lie in other threads; those of 2 and 1 do not.
#pragma unroll
        for (int threads = ROW_THREADS / 2; threads > 0; threads /= 2) {
#pragma unroll
            for (int k = 0; k < LANES; k++)
                lanes[k] = __dadd_rn(lanes[k], __shfl_down_sync(ALL, lanes[k], threads, ROW_THREADS));
        }
        const double sum = __dadd_rn(__dadd_rn(lanes[0], lanes[2]), __dadd_rn(lanes[1], lanes[3]));
        if (exists && part == 0) sums[row] = sum;
    }
}

template <typename T>
__device__ __forceinline__ void row_sums_any(const T* gradient, double* sums, uint64_t rows, uint64_t columns) {
    const bool lines = reinterpret_cast<uintptr_t>(gradient) % COPY_BYTES == 0 && columns * sizeof(T) % COPY_BYTES == 0;
    if constexpr (sizeof(T) < sizeof(float)) {
        if (lines) {
            row_sums<true, true>(gradient, sums, rows, columns);
            return;
        }
    }
    if (aligned(gradient) && columns % LANES == 0) row_sums<false, true>(gradient, sums, rows, columns);
    else row_sums<false, false>(gradient, sums, rows, columns);
}

extern "C" __global__ void __launch_bounds__(ROW_BLOCK, ROW_RESIDENT)
    row_sums_f32(const float* gradient, double* sums, uint64_t rows, uint64_t columns) {
    row_sums_any(gradient, sums, rows, columns);
}

extern "C" __global__ void __launch_bounds__(ROW_BLOCK, NARROW_RESIDENT)
    row_sums_bf16(const uint16_t* gradient, double* sums, uint64_t rows, uint64_t columns) {
    row_sums_any(gradient, sums, rows, columns);
}

extern "C" __global__ void __launch_bounds__(ROW_BLOCK, NARROW_RESIDENT)
    row_sums_fp16(const __half* gradient, double* sums, uint64_t rows, uint64_t columns) {
    row_sums_any(gradient, sums, rows, columns);
}
