// How weights are stored beside their rest: the conversions of src/adam/split.rs and src/adam/fp16.rs of the actors.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

constexpr uint32_t QUIET_NAN_HIGH = 0x7fc0;
constexpr uint16_t FP16_NAN = 0x7e00;

// The nearest fp16, ties to even; all NaNs become one of either sign.
__device__ __forceinline__ uint16_t narrow(float value) {
    const uint16_t sign = uint16_t(__float_as_uint(value) >> 16) & 0x8000;
    return value != value ? uint16_t(sign | FP16_NAN) : __half_as_ushort(__float2half_rn(value));
}

// An fp32 weight is its nearest bf16, ties away from zero, and 16 signed low bits; all NaNs become one.
__device__ __forceinline__ float join(uint16_t weight, uint16_t low) {
    return __uint_as_float((uint32_t(weight) << 16) + uint32_t(int32_t(int16_t(low))));
}

__device__ __forceinline__ void split(float value, uint16_t& weight, uint16_t& low) {
    const uint32_t bits = __float_as_uint(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    weight = uint16_t(nan ? QUIET_NAN_HIGH : (bits + 0x8000) >> 16);
    low = uint16_t(nan ? 0 : bits);
}
