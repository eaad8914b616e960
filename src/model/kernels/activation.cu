// Element-wise operations between the matrix products: GELU (Hendrycks and Gimpel, 2016), SwiGLU (Shazeer, 2020),
// sums and dropout.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                               grid
// gelu_forward        const T* u, T* y, uint64_t n, int form                                                 any [1]
// gelu_backward       const T* dy, const T* u, T* du, uint64_t n, int form                                   any [1]
// add                 const T* a, const T* b, T* y, uint64_t n                                               any [1]
// dropout             const T* x, T* y, uint64_t n, uint64_t seed, uint64_t stream, uint64_t threshold,      any [1]
//                     float scale
// dropout_add         const T* x, const T* residual, T* y, uint64_t n, uint64_t seed, uint64_t stream,       any [1]
//                     uint64_t threshold, float scale
// gelu_backward_bias  const T* dy, const T* u, T* du, float* partial_dbias, uint64_t rows, int cols, int P,  [2], P
//                     int form
// swiglu_forward      const T* gate_up, T* y, uint64_t rows, int cols                                        [2], any [3]
// swiglu_backward     const T* dy, const T* gate_up, T* d_gate_up, uint64_t rows, int cols                   [2], any [3]
//
// Block: 256 threads. No dynamic shared memory.
// [1] ceil(n / 8192) is good.  [2] x: ceil(cols / (512 / sizeof(T))).  [3] y: min(ceil(rows / 32), 65535) is good.
// Scratch: partial_dbias is float[P * cols], wholly written; accumulate_columns of norm.cu adds it to the gradient. P
// decides the order of the sums, so it must be the same number on every GPU: 128 is good.
//
// form: 0 = tanh, 1 = erf. gate_up and d_gate_up are [rows, 2 * cols], a row's gate before its up.
// Outputs may be inputs of the same shape: y = x, y = residual, du = dy, du = u, d_gate_up = gate_up, y = a or b.
// dropout: an element is kept, and multiplied by `scale`, where its 16 bits of Philox4x32-10 (Salmon et al., 2011) are at
// least `threshold`: piece element % 8 of the block with counter (element / 8, stream) and key seed, low halves first.

#include "common.cuh"
#include "philox.cuh"

constexpr int ERF_FORM = 1;

constexpr float SQRT_2_OVER_PI = 0.7978845608f;
constexpr float CUBIC = 0.044715f;
constexpr float LOG2_E = 1.4426950409f;
// Keeps powers of two finite, so that no infinity meets a zero.
constexpr float HIGHEST_EXPONENT = 126.0f;

// The logistic function of x, and that of -x, from the exponent of 2 in e^-x. Neither cancels.
struct Logistic {
    float of, of_negative;

    __device__ __forceinline__ explicit Logistic(float exponent) {
        const float power = exp2_approximate(fminf(exponent, HIGHEST_EXPONENT));
        of = __fdividef(1.0f, 1.0f + power);
        of_negative = power * of;
    }
};

// (1 + tanh(z)) / 2 is the logistic function of 2z.
struct GeluTanh {
    static __device__ __forceinline__ Logistic logistic(float x) {
        constexpr float LINEAR = -2.0f * SQRT_2_OVER_PI * LOG2_E;
        return Logistic(x * fmaf(LINEAR * CUBIC, x * x, LINEAR));
    }

    static __device__ __forceinline__ float value(float x) { return x * logistic(x).of; }

    static __device__ __forceinline__ float derivative(float x) {
        const Logistic s = logistic(x);
        const float slope = 2.0f * SQRT_2_OVER_PI * fmaf(3.0f * CUBIC, x * x, 1.0f);
        return fmaf(x * slope, s.of * s.of_negative, s.of);
    }
};

// The normal distribution function by the rational approximation 7.1.26 of Abramowitz and Stegun: an error below 1e-7
// for one exponential, which is the density as well.
struct GeluErf {
    static __device__ __forceinline__ void normal(float x, float& distribution, float& density) {
        constexpr float SCALE = 0.3275911f * 0.7071067812f;
        constexpr float A1 = 0.254829592f, A2 = -0.284496736f, A3 = 1.421413741f, A4 = -1.453152027f, A5 = 1.061405429f;
        const float power = exp2_approximate(-0.5f * LOG2_E * x * x);
        const float t = __fdividef(1.0f, fmaf(SCALE, fabsf(x), 1.0f));
        const float series = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, A5, A4), A3), A2), A1);
        const float tail = 0.5f * series * power;
        distribution = x < 0.0f ? tail : 1.0f - tail;
        density = 0.3989422804f * power;
    }

    static __device__ __forceinline__ float value(float x) {
        float distribution, density;
        normal(x, distribution, density);
        return x * distribution;
    }

    static __device__ __forceinline__ float derivative(float x) {
        float distribution, density;
        normal(x, distribution, density);
        return fmaf(x, density, distribution);
    }
};

template <typename Form> struct GeluValue {
    template <int N> __device__ __forceinline__ void operator()(float (&v)[1][N], uint64_t) const {
#pragma unroll
        for (int k = 0; k < N; k++) v[0][k] = Form::value(v[0][k]);
    }
};

template <typename Form> struct GeluGradient {
    template <int N> __device__ __forceinline__ void operator()(float (&v)[2][N], uint64_t) const {
#pragma unroll
        for (int k = 0; k < N; k++) v[0][k] *= Form::derivative(v[1][k]);
    }
};

struct Sum {
    template <int N> __device__ __forceinline__ void operator()(float (&v)[2][N], uint64_t) const {
#pragma unroll
        for (int k = 0; k < N; k++) v[0][k] += v[1][k];
    }
};

struct Dropout {
    uint64_t seed, stream;
    uint32_t threshold;
    float scale;

    // The numbers of elements 8 * index to 8 * index + 7, two in each.
    __device__ __forceinline__ uint4 bits_of(uint64_t index) const { return philox(seed, stream, index); }

    __device__ __forceinline__ float factor(uint32_t bits) const { return bits >= threshold ? scale : 0.0f; }

    __device__ __forceinline__ void mask_pair(float& low, float& high, uint32_t bits) const {
        low *= factor(bits & 0xFFFF);
        high *= factor(bits >> 16);
    }

    __device__ __forceinline__ void mask(float (&x)[1], uint64_t element) const {
        const uint4 bits = bits_of(element / 8);
        const uint32_t pair = element % 8 / 2;
        const uint32_t both = pair < 2 ? (pair == 0 ? bits.x : bits.y) : (pair == 2 ? bits.z : bits.w);
        x[0] *= factor(element % 2 == 0 ? both & 0xFFFF : both >> 16);
    }

    // Several elements begin at a multiple of their number.
    __device__ __forceinline__ void mask(float (&x)[4], uint64_t first) const {
        const uint4 bits = bits_of(first / 8);
        const bool is_second = first % 8 != 0;
        mask_pair(x[0], x[1], is_second ? bits.z : bits.x);
        mask_pair(x[2], x[3], is_second ? bits.w : bits.y);
    }

    template <int N> __device__ __forceinline__ void mask(float (&x)[N], uint64_t first) const {
#pragma unroll
        for (int k = 0; k < N; k += 8) {
            const uint4 bits = bits_of((first + k) / 8);
            mask_pair(x[k], x[k + 1], bits.x);
            mask_pair(x[k + 2], x[k + 3], bits.y);
            mask_pair(x[k + 4], x[k + 5], bits.z);
            mask_pair(x[k + 6], x[k + 7], bits.w);
        }
    }

    template <int N> __device__ __forceinline__ void operator()(float (&v)[1][N], uint64_t first) const {
        mask(v[0], first);
    }

    template <int N> __device__ __forceinline__ void operator()(float (&v)[2][N], uint64_t first) const {
        mask(v[0], first);
        Sum()(v, first);
    }
};

constexpr int ROW_UNROLL = 4; // rows that a warp has in flight

template <typename Form, bool VECTOR, typename T>
__device__ __forceinline__ void gelu_backward_bias(
    const T* dy, const T* u, T* du, float* partial, uint64_t rows, int cols, int partials
) {
    constexpr int LANES = Pack<T>::LANES;
    const ColumnTile<T> tile(cols);
    for (int part = blockIdx.y; part < partials; part += gridDim.y) {
        const RowSlice slice(rows, part, partials);
        float sums[LANES] = {};
        for (uint64_t first = slice.first + tile.warp; first < slice.end; first += ROW_UNROLL * tile.WARPS) {
            Pack<T> dy_pack[ROW_UNROLL], u_pack[ROW_UNROLL];
#pragma unroll
            for (int i = 0; i < ROW_UNROLL; i++) {
                const uint64_t row = first + i * tile.WARPS;
                const int count = row < slice.end ? tile.count : 0;
                dy_pack[i] = load_pack<VECTOR>(dy + row * cols + tile.column, count);
                u_pack[i] = load_pack<VECTOR>(u + row * cols + tile.column, count);
            }
#pragma unroll
            for (int i = 0; i < ROW_UNROLL; i++) {
                const uint64_t row = first + i * tile.WARPS;
                float values[LANES], x[LANES];
                unpack(dy_pack[i], values);
                unpack(u_pack[i], x);
#pragma unroll
                for (int k = 0; k < LANES; k++) {
                    values[k] *= Form::derivative(x[k]);
                    sums[k] += values[k];
                }
                const int count = row < slice.end ? tile.count : 0;
                store_pack<VECTOR>(du + row * cols + tile.column, count, pack_of<T>(values));
            }
        }
        write_column_sums(tile, sums, partial + uint64_t(part) * cols);
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void swiglu_forward(const T* gate_up, T* y, uint64_t rows, int cols) {
    constexpr int LANES = Pack<T>::LANES;
    const ColumnTile<T> tile(cols);
    const uint64_t step = ROW_UNROLL * tile.WARPS;
    for (uint64_t first = blockIdx.y * step + tile.warp; first < rows; first += gridDim.y * step) {
        Pack<T> gate_pack[ROW_UNROLL], up_pack[ROW_UNROLL];
#pragma unroll
        for (int i = 0; i < ROW_UNROLL; i++) {
            const uint64_t row = first + i * tile.WARPS;
            const T* gate = gate_up + 2 * row * cols + tile.column;
            gate_pack[i] = load_pack<VECTOR>(gate, row < rows ? tile.count : 0);
            up_pack[i] = load_pack<VECTOR>(gate + cols, row < rows ? tile.count : 0);
        }
#pragma unroll
        for (int i = 0; i < ROW_UNROLL; i++) {
            const uint64_t row = first + i * tile.WARPS;
            float gate[LANES], up[LANES];
            unpack(gate_pack[i], gate);
            unpack(up_pack[i], up);
#pragma unroll
            for (int k = 0; k < LANES; k++) gate[k] *= Logistic(-LOG2_E * gate[k]).of * up[k];
            store_pack<VECTOR>(y + row * cols + tile.column, row < rows ? tile.count : 0, pack_of<T>(gate));
        }
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void swiglu_backward(const T* dy, const T* gate_up, T* d_gate_up, uint64_t rows, int cols) {
    constexpr int LANES = Pack<T>::LANES;
    constexpr int UNROLL = ROW_UNROLL / 2; // three inputs a row
    const ColumnTile<T> tile(cols);
    const uint64_t step = UNROLL * tile.WARPS;
    for (uint64_t first = blockIdx.y * step + tile.warp; first < rows; first += gridDim.y * step) {
        Pack<T> dy_pack[UNROLL], gate_pack[UNROLL], up_pack[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const uint64_t row = first + i * tile.WARPS;
            const int count = row < rows ? tile.count : 0;
            const T* gate = gate_up + 2 * row * cols + tile.column;
            dy_pack[i] = load_pack<VECTOR>(dy + row * cols + tile.column, count);
            gate_pack[i] = load_pack<VECTOR>(gate, count);
            up_pack[i] = load_pack<VECTOR>(gate + cols, count);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const uint64_t row = first + i * tile.WARPS;
            float d[LANES], gate[LANES], up[LANES];
            unpack(dy_pack[i], d);
            unpack(gate_pack[i], gate);
            unpack(up_pack[i], up);
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                const Logistic s(-LOG2_E * gate[k]);
                const float silu = gate[k] * s.of;
                const float slope = fmaf(silu, s.of_negative, s.of);
                gate[k] = d[k] * up[k] * slope;
                up[k] = d[k] * silu;
            }
            const int count = row < rows ? tile.count : 0;
            T* d_gate = d_gate_up + 2 * row * cols + tile.column;
            store_pack<VECTOR>(d_gate, count, pack_of<T>(gate));
            store_pack<VECTOR>(d_gate + cols, count, pack_of<T>(up));
        }
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)
// Several rows and sums a thread take more registers.
#define TILE_KERNEL extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT - 1)

#define ACTIVATION_KERNELS(T)                                                                                          \
    KERNEL gelu_forward_##T(const T* u, T* y, uint64_t n, int form) {                                                  \
        const T* const in[] = {u};                                                                                     \
        if (form == ERF_FORM) map_elements(in, y, n, GeluValue<GeluErf>());                                            \
        else map_elements(in, y, n, GeluValue<GeluTanh>());                                                            \
    }                                                                                                                  \
    KERNEL gelu_backward_##T(const T* dy, const T* u, T* du, uint64_t n, int form) {                                   \
        const T* const in[] = {dy, u};                                                                                 \
        if (form == ERF_FORM) map_elements(in, du, n, GeluGradient<GeluErf>());                                        \
        else map_elements(in, du, n, GeluGradient<GeluTanh>());                                                        \
    }                                                                                                                  \
    KERNEL add_##T(const T* a, const T* b, T* y, uint64_t n) {                                                         \
        const T* const in[] = {a, b};                                                                                  \
        map_elements(in, y, n, Sum());                                                                                 \
    }                                                                                                                  \
    KERNEL dropout_##T(                                                                                                \
        const T* x, T* y, uint64_t n, uint64_t seed, uint64_t stream, uint64_t threshold, float scale                  \
    ) {                                                                                                                \
        const T* const in[] = {x};                                                                                     \
        map_elements(in, y, n, Dropout{seed, stream, uint32_t(threshold), scale});                                     \
    }                                                                                                                  \
    KERNEL dropout_add_##T(                                                                                            \
        const T* x, const T* residual, T* y, uint64_t n, uint64_t seed, uint64_t stream, uint64_t threshold,           \
        float scale                                                                                                    \
    ) {                                                                                                                \
        const T* const in[] = {x, residual};                                                                           \
        map_elements(in, y, n, Dropout{seed, stream, uint32_t(threshold), scale});                                     \
    }                                                                                                                  \
    TILE_KERNEL gelu_backward_bias_##T(                                                                                \
        const T* dy, const T* u, T* du, float* partial_dbias, uint64_t rows, int cols, int P, int form                 \
    ) {                                                                                                                \
        const bool vector = rows_aligned(dy, cols) && aligned(u) && aligned(du);                                       \
        if (form == ERF_FORM)                                                                                          \
            by_alignment(vector, [&](auto v) {                                                                         \
                gelu_backward_bias<GeluErf, VECTOR_OF(v)>(dy, u, du, partial_dbias, rows, cols, P);                    \
            });                                                                                                        \
        else                                                                                                           \
            by_alignment(vector, [&](auto v) {                                                                         \
                gelu_backward_bias<GeluTanh, VECTOR_OF(v)>(dy, u, du, partial_dbias, rows, cols, P);                   \
            });                                                                                                        \
    }                                                                                                                  \
    TILE_KERNEL swiglu_forward_##T(const T* gate_up, T* y, uint64_t rows, int cols) {                                  \
        by_alignment(rows_aligned(gate_up, cols) && aligned(y), [&](auto v) {                                          \
            swiglu_forward<VECTOR_OF(v)>(gate_up, y, rows, cols);                                                      \
        });                                                                                                            \
    }                                                                                                                  \
    TILE_KERNEL swiglu_backward_##T(const T* dy, const T* gate_up, T* d_gate_up, uint64_t rows, int cols) {            \
        const bool vector = rows_aligned(dy, cols) && aligned(gate_up) && aligned(d_gate_up);                          \
        by_alignment(vector, [&](auto v) { swiglu_backward<VECTOR_OF(v)>(dy, gate_up, d_gate_up, rows, cols); });      \
    }

FOR_EACH_TYPE(ACTIVATION_KERNELS)
