// Warpgroup matrix products (wgmma) on swizzled shared-memory tiles.
//
// A tile is stored as panels of 64 columns: row r of a panel is 128 bytes at r * 128, its
// 16-byte pieces permuted by the 128-byte swizzle that the bulk tensor copies apply. Eight
// rows (1024 bytes) are one repeat of the pattern.
#pragma once

#include "attention_common.cuh"

namespace attention {

constexpr uint32_t REPEAT_BYTES = 1024;

__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t SWIZZLE_128 = 1ull << 62;
  return SWIZZLE_128 | (static_cast<uint64_t>(REPEAT_BYTES >> 4) << 32) |
         (static_cast<uint64_t>(leading_bytes >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

// Due before the first product on registers that were written since the last one: without
// it the compiler adds its own, or runs products one by one.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns when at most PENDING of the committed groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads or writes of an accumulator across this point.
template <int TILES>
__device__ __forceinline__ void pin(float (&values)[TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(values[tile][i])::"memory");
}

template <typename T, int COLUMNS>
struct Product;

#define ATTENTION_ACC(t) "+f"(acc[t][0]), "+f"(acc[t][1]), "+f"(acc[t][2]), "+f"(acc[t][3])
#define ATTENTION_ACC_2(t) ATTENTION_ACC(t), ATTENTION_ACC(t + 1)
#define ATTENTION_ACC_4(t) ATTENTION_ACC_2(t), ATTENTION_ACC_2(t + 2)
#define ATTENTION_ACC_64 ATTENTION_ACC_4(0), ATTENTION_ACC_4(4)
#define ATTENTION_ACC_80 ATTENTION_ACC_64, ATTENTION_ACC_2(8)
#define ATTENTION_ACC_96 ATTENTION_ACC_64, ATTENTION_ACC_4(8)
#define ATTENTION_ACC_112 ATTENTION_ACC_96, ATTENTION_ACC_2(12)
#define ATTENTION_ACC_128 ATTENTION_ACC_96, ATTENTION_ACC_4(12)
#define ATTENTION_ACC_144 ATTENTION_ACC_128, ATTENTION_ACC_2(16)
#define ATTENTION_ACC_192 ATTENTION_ACC_128, ATTENTION_ACC_4(16), ATTENTION_ACC_4(20)
#define ATTENTION_REG_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTENTION_REG_80 ATTENTION_REG_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ATTENTION_REG_96 ATTENTION_REG_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTENTION_REG_112 ATTENTION_REG_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ATTENTION_REG_128 ATTENTION_REG_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTENTION_REG_144 ATTENTION_REG_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ATTENTION_REG_192 \
  ATTENTION_REG_144 ", %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// R0..R6: operand numbers that follow the accumulators (COLUMNS / 2 of them).
#define ATTENTION_PRODUCT(TYPE, NAME, COLUMNS, R0, R1, R2, R3, R4, R5, R6)                     \
  template <>                                                                                  \
  struct Product<TYPE, COLUMNS> {                                                              \
    /* acc (+)= a b^T, both with the summed dimension along the rows of their panels */        \
    static __device__ __forceinline__ void shared(float (&acc)[COLUMNS / 8][4], uint64_t a,    \
                                                  uint64_t b, int accumulate) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME       \
                   " {" ATTENTION_REG_##COLUMNS "}, " R0 ", " R1 ", p, 1, 1, 0, 0;\n}\n"       \
                   : ATTENTION_ACC_##COLUMNS                                                   \
                   : "l"(a), "l"(b), "r"(accumulate));                                         \
    }                                                                                          \
    /* acc (+)= a b, `a` in registers; ACROSS: b's panel rows count the summed dimension */    \
    template <int ACROSS>                                                                      \
    static __device__ __forceinline__ void registers(float (&acc)[COLUMNS / 8][4],             \
                                                     const uint32_t (&a)[4], uint64_t b,       \
                                                     int accumulate) {                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME       \
                   " {" ATTENTION_REG_##COLUMNS "}, {" R0 ", " R1 ", " R2 ", " R3 "}, " R4     \
                   ", p, 1, 1, " R6 ";\n}\n"                                                   \
                   : ATTENTION_ACC_##COLUMNS                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),      \
                     "n"(ACROSS));                                                             \
    }                                                                                          \
  };

#define ATTENTION_PRODUCTS(TYPE, NAME)                                                         \
  ATTENTION_PRODUCT(TYPE, NAME, 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")           \
  ATTENTION_PRODUCT(TYPE, NAME, 80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")           \
  ATTENTION_PRODUCT(TYPE, NAME, 96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")           \
  ATTENTION_PRODUCT(TYPE, NAME, 112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")          \
  ATTENTION_PRODUCT(TYPE, NAME, 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")          \
  ATTENTION_PRODUCT(TYPE, NAME, 144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")          \
  ATTENTION_PRODUCT(TYPE, NAME, 192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")

ATTENTION_PRODUCTS(__nv_bfloat16, "bf16")
ATTENTION_PRODUCTS(__half, "f16")

// The first COLUMNS columns of a left operand, in registers.
template <int COLUMNS>
struct Held {
  static constexpr int PARTS = COLUMNS > 0 ? COLUMNS / 16 : 1;
  uint32_t at[PARTS][4];
};

// acc = left right^T for 64 rows of `left` and COLUMNS rows of `right`, summed over WIDTH. Of
// `left`, the first HELD columns come from registers (see load_operand), which spares the
// shared memory half of its work, the others from panels.
// LEFT_ROWS and RIGHT_ROWS are the rows of a whole panel, i.e. the distance between panels.
template <typename T, int COLUMNS, int WIDTH, int HELD, int LEFT_ROWS, int RIGHT_ROWS>
__device__ __forceinline__ void multiply_rows(float (&acc)[COLUMNS / 8][4],
                                              const Held<HELD>& held, uint32_t left,
                                              uint32_t right) {
#pragma unroll
  for (int k = 0; k < WIDTH; k += 16) {
    const uint32_t within = (k % PANEL) * 2;
    const uint32_t a = left + (k / PANEL) * LEFT_ROWS * PANEL_ROW_BYTES + within;
    const uint32_t b = right + (k / PANEL) * RIGHT_ROWS * PANEL_ROW_BYTES + within;
    if (k < HELD)
      Product<T, COLUMNS>::template registers<0>(acc, held.at[k / 16 % Held<HELD>::PARTS],
                                                 descriptor(b, 16), k > 0);
    else
      Product<T, COLUMNS>::shared(acc, descriptor(a, 16), descriptor(b, 16), k > 0);
  }
}

// Reads columns of a warpgroup's 64 rows of a tile of ROWS rows into registers.
// `address` is that of the warpgroup's first row in the first panel.
template <int ROWS, int HELD>
__device__ __forceinline__ void load_operand(Held<HELD>& held, uint32_t address) {
  const int lane = threadIdx.x % 32;
  const int row = (threadIdx.x / 32 % 4) * 16 + lane % 16;
  const uint32_t row_address = address + row * PANEL_ROW_BYTES;
#pragma unroll
  for (int k = 0; k < HELD; k += 16) {
    uint32_t(&operand)[4] = held.at[k / 16 % Held<HELD>::PARTS];
    const uint32_t from = row_address + (k / PANEL) * ROWS * PANEL_ROW_BYTES +
                          swizzled(k % PANEL / 8 + lane / 16, row_address);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(operand[0]), "=r"(operand[1]), "=r"(operand[2]), "=r"(operand[3])
                 : "r"(from)
                 : "memory");
  }
}

// acc += left right for 64 x ROWS of `left` in registers and ROWS x WIDTH of `right`.
template <typename T, int ROWS, int WIDTH>
__device__ __forceinline__ void multiply_columns(float (&acc)[WIDTH / 8][4],
                                                 const uint32_t (&left)[ROWS / 16][4],
                                                 uint32_t right) {
  constexpr uint32_t PANEL_BYTES = ROWS * PANEL_ROW_BYTES;
#pragma unroll
  for (int k = 0; k < ROWS; k += 16) {
    const uint32_t b = right + k * PANEL_ROW_BYTES;
    if constexpr (WIDTH <= 192) {
      Product<T, WIDTH>::template registers<1>(acc, left[k / 16], descriptor(b, PANEL_BYTES), 1);
    } else {  // two instructions of 128 columns
      static_assert(WIDTH == 256, "unsupported width");
      using Half = float[16][4];
      Product<T, 128>::template registers<1>(reinterpret_cast<Half&>(acc[0]), left[k / 16],
                                             descriptor(b, PANEL_BYTES), 1);
      Product<T, 128>::template registers<1>(reinterpret_cast<Half&>(acc[16]), left[k / 16],
                                             descriptor(b + 2 * PANEL_BYTES, PANEL_BYTES), 1);
    }
  }
}

}  // namespace attention
