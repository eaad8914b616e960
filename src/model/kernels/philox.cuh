// Philox4x32-10 (Salmon et al., 2011): the numbers of src/model/rng.rs.
#pragma once

#include <stdint.h>

constexpr uint32_t MULTIPLIER_A = 0xD2511F53, MULTIPLIER_B = 0xCD9E8D57;
constexpr uint32_t WEYL_A = 0x9E3779B9, WEYL_B = 0xBB67AE85;
constexpr int ROUNDS = 10;

// The low and the high half of a * b. From 64-bit numbers the compiler makes additions of zero.
__device__ __forceinline__ uint2 product(uint32_t a, uint32_t b) {
    uint2 halves;
    asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(halves.x), "=r"(halves.y) : "r"(a), "r"(b));
    return halves;
}

// The block of four numbers at `index` of a stream.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t stream, uint64_t index) {
    uint4 counter = make_uint4(uint32_t(index), uint32_t(index >> 32), uint32_t(stream), uint32_t(stream >> 32));
    uint32_t key_a = uint32_t(seed), key_b = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const uint2 a = product(MULTIPLIER_A, counter.x), b = product(MULTIPLIER_B, counter.z);
        counter = make_uint4(b.y ^ counter.y ^ key_a, b.x, a.y ^ counter.w ^ key_b, a.x);
        key_a += WEYL_A;
        key_b += WEYL_B;
    }
    return counter;
}
