// First values of parameters, with the bits of the host's code in src/model/rng: every operation is rounded by itself, in the
// same order, and nothing is contracted.
//
// kernel      arguments                                          grid
// draw_f32    float* weight, DRAW                                any [1]
// draw_bf16   uint16_t* weight, uint16_t* low, DRAW              any [1]
// draw_f16    uint16_t* weight, float* master, DRAW              any [1]
//
// DRAW = uint64_t first, uint64_t n, uint64_t seed, uint64_t stream, int init, float scale
// Elements `first` to `first + n - 1` of a parameter's stream go to the places 0 to n - 1 of what is stored. init is 0 for the
// constant `scale`, 1 for normal numbers with that standard deviation, 2 for uniform ones from -scale to scale.
// [1] ceil(n / 8192) is good. Block: 256 threads. No dynamic shared memory, no scratch.

#include "../../../actors/kernels/stored.cuh"
#include "common.cuh"
#include "philox.cuh"

constexpr int NUMBERS = 4; // of a block of Philox
enum Init { CONSTANT = 0, NORMAL = 1, UNIFORM = 2 };

// a + b * c, each rounded.
__device__ __forceinline__ float plus(float a, float b, float c) { return __fadd_rn(a, __fmul_rn(b, c)); }

// Natural logarithm of a number in (0, 1].
__device__ __forceinline__ float logarithm(float x) {
    constexpr uint32_t ROOT_HALF = 0x3f3504f3;
    const uint32_t shifted = __float_as_uint(x) - ROOT_HALF;
    const int exponent = int(shifted) >> 23;
    const float mantissa = __uint_as_float((shifted & 0x007fffff) + ROOT_HALF);
    const float s = __fdiv_rn(__fadd_rn(mantissa, -1.0f), __fadd_rn(mantissa, 1.0f));
    const float z = __fmul_rn(s, s);
    const float series = plus(1.0f, z, plus(1.0f / 3.0f, z, plus(1.0f / 5.0f, z, plus(1.0f / 7.0f, z, 1.0f / 9.0f))));
    constexpr float LN_2 = 0.693147180559945309417f;
    return __fadd_rn(__fmul_rn(float(exponent), LN_2), __fmul_rn(__fmul_rn(2.0f, s), series));
}

// Cosine and sine of a turn's part in [0, 1].
__device__ __forceinline__ float2 cosine_sine(float turn) {
    const float quarters = __fmul_rn(turn, 4.0f);
    const int quadrant = int(__fadd_rn(quarters, 0.5f));
    constexpr float HALF_PI = 1.57079632679489661923f;
    const float angle = __fmul_rn(__fsub_rn(quarters, float(quadrant)), HALF_PI);
    const float z = __fmul_rn(angle, angle);
    const float odd = plus(1.0f, z, plus(-1.0f / 6.0f, z, plus(1.0f / 120.0f, z, plus(-1.0f / 5040.0f, z, 1.0f / 362880.0f))));
    const float sine = __fmul_rn(angle, odd);
    const float tail = plus(-1.0f / 720.0f, z, plus(1.0f / 40320.0f, z, -1.0f / 3628800.0f));
    const float cosine = plus(1.0f, z, plus(-0.5f, z, plus(1.0f / 24.0f, z, tail)));
    const float2 turned = (quadrant & 1) == 0 ? make_float2(cosine, sine) : make_float2(-sine, cosine);
    return (quadrant & 2) == 0 ? turned : make_float2(-turned.x, -turned.y);
}

// Two normal numbers from 64 random bits, by Box and Muller.
__device__ __forceinline__ float2 normal_pair(uint32_t radius_bits, uint32_t angle_bits, float std) {
    const auto unit = [](uint32_t bits) { return __fadd_rn(__fmul_rn(__uint2float_rn(bits), 0x1p-32f), 0x1p-33f); };
    const float radius = __fmul_rn(__fsqrt_rn(__fmul_rn(-2.0f, logarithm(unit(radius_bits)))), std);
    const float2 direction = cosine_sine(unit(angle_bits));
    return make_float2(__fmul_rn(radius, direction.x), __fmul_rn(radius, direction.y));
}

// From -1 to 1, exact but for the last rounding.
__device__ __forceinline__ float symmetric(uint32_t bits) {
    return __double2float_rn(2.0 * ((double(bits) + 1.0) / 4294967296.0) - 1.0);
}

struct Draw {
    uint64_t seed, stream;
    int init;
    float scale;

    // The four numbers of a block of bits.
    __device__ __forceinline__ void four(uint64_t index, float (&values)[NUMBERS]) const {
        if (init == CONSTANT) {
#pragma unroll
            for (int k = 0; k < NUMBERS; k++) values[k] = scale;
            return;
        }
        const uint4 bits = philox(seed, stream, index);
        if (init == NORMAL) {
            const float2 a = normal_pair(bits.x, bits.y, scale), b = normal_pair(bits.z, bits.w, scale);
            values[0] = a.x, values[1] = a.y, values[2] = b.x, values[3] = b.y;
        } else {
            const uint32_t each[NUMBERS] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
            for (int k = 0; k < NUMBERS; k++) values[k] = __fmul_rn(symmetric(each[k]), scale);
        }
    }
};

// Calls store(place, value) for each element.
template <typename Store> __device__ void draw(const Draw& draw, uint64_t first, uint64_t n, const Store& store) {
    const uint64_t blocks = (first + n + NUMBERS - 1) / NUMBERS;
    for (uint64_t block = first / NUMBERS + global_thread(); block < blocks; block += grid_threads()) {
        float values[NUMBERS];
        draw.four(block, values);
#pragma unroll
        for (int k = 0; k < NUMBERS; k++) {
            const uint64_t element = block * NUMBERS + k;
            if (element >= first && element < first + n) store(element - first, values[k]);
        }
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK)
#define DRAW uint64_t first, uint64_t n, uint64_t seed, uint64_t stream, int init, float scale

KERNEL draw_f32(float* weight, DRAW) {
    draw(Draw{seed, stream, init, scale}, first, n, [=](uint64_t i, float value) { weight[i] = value; });
}

KERNEL draw_bf16(uint16_t* weight, uint16_t* low, DRAW) {
    draw(Draw{seed, stream, init, scale}, first, n, [=](uint64_t i, float value) { split(value, weight[i], low[i]); });
}

KERNEL draw_f16(uint16_t* weight, float* master, DRAW) {
    draw(Draw{seed, stream, init, scale}, first, n, [=](uint64_t i, float value) {
        weight[i] = narrow(value);
        master[i] = value;
    });
}
