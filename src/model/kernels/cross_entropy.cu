// Cross-entropy of rows of logits, and its gradient in place of them.
//
// kernel                             arguments                                                                grid     block
// cross_entropy_T (f32, bf16, f16)   float* logits, uint64_t ld, const int* targets, float* loss,             any [1]  1024
//                                    uint64_t rows, int vocab, float scale, int slots, int* schedule
// cross_entropy_loss_f32             const float* logits, uint64_t ld, const int* targets, float* loss,       any [2]  1024
//                                    uint64_t rows, int vocab, float scale
// sum_loss_f32                       const float* loss, uint64_t n, float* out, float scale                   1        1024
//
// [1] min(rows, multiprocessors) is good.  [2] rows is good, or ceil(rows / 32) up to a vocab of 2048, where a warp takes
// a row. Dynamic shared memory: slots * 16384 bytes for cross_entropy_T, where slots is 14, or 6 on a GPU whose blocks
// cannot have as much; results have the same bits. No scratch. Logits at a multiple of 16 bytes with an ld that is a
// multiple of 4 are read by vector accesses.
// Row r of the logits is at logits + r * ld. loss[r] = (log-sum-exp of the row - logit of the target) * scale, and 0 where
// the target is ignored: -100, or anything else outside [0, vocab). cross_entropy_T overwrites the row with
// (softmax - one-hot) * scale, zeros where ignored, as a T row at the same address: the result is a matrix of T with
// leading dimension ld * 4 / sizeof(T), whose elements beyond vocab are undefined. cross_entropy_loss_f32 only reads.
// sum_loss_f32 writes the sum, taken in double, times `scale`.

#include "common.cuh"
#include "schedule.cuh"

constexpr int ROW_BLOCK = 1024;
constexpr int ROW_WARPS = ROW_BLOCK / WARP;
constexpr int NARROW_VOCAB = 2048; // up to this a warp takes a row, beyond it a block
constexpr int QUAD = 4;            // consecutive logits of a thread
constexpr int KEPT = 8;            // quads at the start of a row that a thread keeps from the first pass to the second
constexpr int QUADS = 2;           // quads that are added, and in the rest of the row loaded, at once
constexpr int MOST_SLOTS = 14;     // quads of a thread in shared memory, 16 KiB a block each, where 227 KiB can be had
constexpr int FEWEST_SLOTS = 6;    // where 99 KiB can be had
constexpr float LOWEST = -3.402823466e38f;

// The threads of a row: a warp, or the whole block.
template <int SIZE> struct RowThreads {
    static constexpr int KEPT_TILE = SIZE * QUAD * KEPT;
    static constexpr int TILE = SIZE * QUAD * QUADS;

    static __device__ __forceinline__ int index() { return threadIdx.x % SIZE; }

    // The first element of this thread's quad q in a tile.
    static __device__ __forceinline__ int element(int q) { return (q * SIZE + index()) * QUAD; }

    static __device__ __forceinline__ void barrier() {
        if constexpr (SIZE == WARP) __syncwarp();
        else __syncthreads();
    }
};

struct Quad {
    float value[QUAD];
};

// Logits beyond the row are minus infinity, which adds nothing to a sum of exponentials.
template <bool VECTOR> __device__ __forceinline__ Quad load_quad(const float* row, int index, int vocab) {
    if (VECTOR && index + QUAD <= vocab) {
        const float4 v = *reinterpret_cast<const float4*>(row + index);
        return {{v.x, v.y, v.z, v.w}};
    }
    Quad quad;
#pragma unroll
    for (int k = 0; k < QUAD; k++) quad.value[k] = index + k < vocab ? row[index + k] : -INFINITY;
    return quad;
}

__device__ __forceinline__ void store_values(f32* p, const Quad& q) {
    *reinterpret_cast<float4*>(p) = make_float4(q.value[0], q.value[1], q.value[2], q.value[3]);
}

__device__ __forceinline__ void store_values(bf16* p, const Quad& q) {
    __nv_bfloat162 pair[2] = {
        __floats2bfloat162_rn(q.value[0], q.value[1]), __floats2bfloat162_rn(q.value[2], q.value[3])
    };
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(pair);
}

__device__ __forceinline__ void store_values(f16* p, const Quad& q) {
    __half2 pair[2] = {__floats2half2_rn(q.value[0], q.value[1]), __floats2half2_rn(q.value[2], q.value[3])};
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(pair);
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void store_quad(T* row, int index, int vocab, const Quad& quad) {
    if (VECTOR && index + QUAD <= vocab) {
        store_values(row + index, quad);
        return;
    }
#pragma unroll
    for (int k = 0; k < QUAD; k++) {
        if (index + k < vocab) row[index + k] = from_float<T>(quad.value[k]);
    }
}

// The highest logit of a part of a row, and the sum of exp(logit - highest).
struct Partition {
    float highest = LOWEST, sum = 0.0f;

    // In steps of QUADS, so that the sum has the same bits whether quads are kept or not.
    template <int FIRST, int N> __device__ __forceinline__ void add(const Quad (&quads)[N]) {
        float top = highest;
#pragma unroll
        for (int q = FIRST; q < FIRST + QUADS; q++) {
#pragma unroll
            for (int k = 0; k < QUAD; k++) top = fmaxf(top, quads[q].value[k]);
        }
        sum *= fast_exp(highest - top);
        highest = top;
#pragma unroll
        for (int q = FIRST; q < FIRST + QUADS; q++) {
#pragma unroll
            for (int k = 0; k < QUAD; k++) sum += fast_exp(quads[q].value[k] - top);
        }
        if constexpr (FIRST + QUADS < N) add<FIRST + QUADS>(quads);
    }

    __device__ __forceinline__ void merge(float other_highest, float other_sum) {
        const float top = fmaxf(highest, other_highest);
        sum = sum * fast_exp(highest - top) + other_sum * fast_exp(other_highest - top);
        highest = top;
    }

    __device__ __forceinline__ void merge_warp() {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const float other_highest = __shfl_xor_sync(ALL_LANES, highest, offset);
            merge(other_highest, __shfl_xor_sync(ALL_LANES, sum, offset));
        }
    }
};

// The same in all threads of a row.
template <int SIZE> __device__ __forceinline__ Partition merge_row(Partition part, float2* shared) {
    part.merge_warp();
    if constexpr (SIZE > WARP) {
        const int lane = threadIdx.x % WARP;
        if (lane == 0) shared[threadIdx.x / WARP] = make_float2(part.highest, part.sum);
        __syncthreads();
        part.highest = shared[lane].x;
        part.sum = shared[lane].y;
        part.merge_warp();
    }
    return part;
}

// A quad of logits becomes one of gradients.
__device__ __forceinline__ void differentiate(
    Quad& quad, int index, int target, float scale, float factor, float highest
) {
#pragma unroll
    for (int k = 0; k < QUAD; k++) quad.value[k] = fast_exp(quad.value[k] - highest) * factor;
    if (unsigned(target - index) < QUAD) {
#pragma unroll
        for (int k = 0; k < QUAD; k++) {
            if (index + k == target) quad.value[k] -= scale;
        }
    }
}

// Replaces the row by its gradient. A narrow T is written over logits that lie before the tile it was computed from, and
// all threads have read a tile before anyone goes on to the next.
template <int SIZE, bool VECTOR, typename T>
__device__ __forceinline__ void write_gradient(
    const float* row, T* gradient, int vocab, int target, float scale, const Partition& part, Quad (&kept)[KEPT]
) {
    using Threads = RowThreads<SIZE>;
    const float factor = scale / part.sum;
#pragma unroll
    for (int q = 0; q < KEPT; q++) {
        const int index = Threads::element(q);
        differentiate(kept[q], index, target, scale, factor, part.highest);
        store_quad<VECTOR>(gradient, index, vocab, kept[q]);
    }
    for (int base = Threads::KEPT_TILE; base < vocab; base += Threads::TILE) {
        Quad quads[QUADS];
#pragma unroll
        for (int q = 0; q < QUADS; q++) quads[q] = load_quad<VECTOR>(row, base + Threads::element(q), vocab);
        if (sizeof(T) < sizeof(float)) Threads::barrier();
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int index = base + Threads::element(q);
            differentiate(quads[q], index, target, scale, factor, part.highest);
            store_quad<VECTOR>(gradient, index, vocab, quads[q]);
        }
    }
}

// T is NoGradient where none is wanted.
template <typename T, int SIZE, bool VECTOR>
__device__ __forceinline__ void cross_entropy(
    float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale, float2* shared
) {
    constexpr bool GRADIENT = sizeof(T) > 1;
    using Threads = RowThreads<SIZE>;
    for (uint64_t r = global_thread() / SIZE; r < rows; r += grid_threads() / SIZE) {
        float* row = logits + r * ld;
        const int target = targets[r];
        if (target < 0 || target >= vocab) {
            if (Threads::index() == 0) loss[r] = 0.0f;
            if constexpr (GRADIENT) {
                const Quad zeros = {};
                for (int i = Threads::element(0); i < vocab; i += SIZE * QUAD) {
                    store_quad<VECTOR>(reinterpret_cast<T*>(row), i, vocab, zeros);
                }
            }
            continue;
        }
        const float target_logit = row[target];
        Quad kept[KEPT];
        Partition part;
        if constexpr (GRADIENT) {
#pragma unroll
            for (int q = 0; q < KEPT; q++) kept[q] = load_quad<VECTOR>(row, Threads::element(q), vocab);
            part.add<0>(kept);
        }
        // Where nothing is kept, there are registers for more.
        constexpr int LOADED = GRADIENT ? QUADS : 2 * QUADS;
        for (int base = GRADIENT ? Threads::KEPT_TILE : 0; base < vocab; base += SIZE * QUAD * LOADED) {
            Quad quads[LOADED];
#pragma unroll
            for (int q = 0; q < LOADED; q++) quads[q] = load_quad<VECTOR>(row, base + Threads::element(q), vocab);
            part.add<0>(quads);
        }
        part = merge_row<SIZE>(part, shared);
        if (Threads::index() == 0) loss[r] = (part.highest - target_logit + logf(part.sum)) * scale;
        if constexpr (GRADIENT) {
            // Nobody writes before all have read what they keep; in a block the merge has seen to that.
            if (SIZE == WARP) Threads::barrier();
            write_gradient<SIZE, VECTOR>(row, reinterpret_cast<T*>(row), vocab, target, scale, part, kept);
        }
        // The next row uses `shared` again.
        Threads::barrier();
    }
}

struct NoGradient {};

// A block reads a row once: each thread keeps the row's first quads in SLOTS slots of shared memory from the first pass
// to the second. A slot takes the next row's quad as soon as this row's gradient has left it, so that memory stays busy
// though one row fills most of a multiprocessor. (Quads kept in registers would free their slots earlier: measured, more
// copies under way while a row is still awaited make it slower.) A thread copies what it alone reads, so slots need no
// barriers. (As what leaves the cache first, which it could be, it arrives more slowly: measured.) Of a row with more quads
// the rest is read twice. Sums have the order of cross_entropy, whatever the slots.
template <int SLOTS, bool VECTOR, typename T>
__device__ __forceinline__ void cross_entropy_staged(
    float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale, int* schedule,
    float4* slots, float2* shared
) {
    constexpr int STEP = ROW_BLOCK * QUAD;
    const int quads = (vocab + STEP - 1) / STEP, staged = min(quads, SLOTS);
    const int mine = RowThreads<ROW_BLOCK>::element(0);
    auto slot = [&](int q) -> float4& { return slots[q * ROW_BLOCK + threadIdx.x]; };
    auto read_slot = [&](int q) -> Quad {
        const float4 v = slot(q);
        return {{v.x, v.y, v.z, v.w}};
    };
    auto counts = [&](int target) { return target >= 0 && target < vocab; };
    // Slots of a row that does not count keep what they have.
    auto fetch = [&](const float* row, int q, bool is_wanted) {
        const int index = q * STEP + mine;
        if (is_wanted && q < staged) {
            if (VECTOR && index + QUAD <= vocab) {
                copy_async<PACK_BYTES>(&slot(q), row + index);
            } else {
                const Quad quad = load_quad<false>(row, index, vocab);
                slot(q) = make_float4(quad.value[0], quad.value[1], quad.value[2], quad.value[3]);
            }
        }
        end_copies();
    };
    // Multiprocessors are not equally far from memory: a block takes its next row while it waits for this one.
    __shared__ uint64_t next_row_shared;
    __shared__ int next_target_shared;
    uint64_t r = blockIdx.x;
    int target = r < rows ? targets[r] : -1;
#pragma unroll
    for (int q = 0; q < SLOTS; q++) fetch(logits + r * ld, q, counts(target));
    while (r < rows) {
        float* row = logits + r * ld;
        T* gradient = reinterpret_cast<T*>(row);
        if (threadIdx.x == 0) {
            const uint64_t next = draw_piece(schedule);
            next_row_shared = next;
            next_target_shared = next < rows ? targets[next] : -1;
        }
        const bool is_counted = counts(target);
        const float target_logit = is_counted ? row[target] : 0.0f;
        Partition part;
        auto add_pair = [&](auto first) {
            constexpr int Q = decltype(first)::value;
            if constexpr (Q < SLOTS) {
                // Of the groups that were begun, those after quad Q + 1 may be under way.
                wait_for_copies<SLOTS - Q - QUADS>();
                if (is_counted && Q < staged) {
                    Quad pair[QUADS];
                    pair[0] = read_slot(Q);
                    if (Q + 1 < staged) pair[1] = read_slot(Q + 1);
                    else pair[1] = load_quad<VECTOR>(row, (Q + 1) * STEP + mine, vocab);
                    part.add<0>(pair);
                }
            }
        };
        add_pair(Constant<0>());
        add_pair(Constant<2>());
        add_pair(Constant<4>());
        add_pair(Constant<6>());
        add_pair(Constant<8>());
        add_pair(Constant<10>());
        add_pair(Constant<12>());
        if (is_counted) {
            for (int q = (staged + 1) / QUADS * QUADS; q < quads; q += QUADS) {
                Quad pair[QUADS];
#pragma unroll
                for (int k = 0; k < QUADS; k++) pair[k] = load_quad<VECTOR>(row, (q + k) * STEP + mine, vocab);
                part.add<0>(pair);
            }
        }
        // All threads have now read what they keep; gradients lie over that, or over logits before the ones that are
        // read again, and there all have read a tile before anyone goes on to the next.
        part = merge_row<ROW_BLOCK>(part, shared);
        const uint64_t next = next_row_shared;
        const int next_target = next_target_shared;
        const bool is_next_counted = counts(next_target);
        const float* next_row = logits + next * ld;
        if (threadIdx.x == 0) loss[r] = is_counted ? (part.highest - target_logit + logf(part.sum)) * scale : 0.0f;
        const float factor = scale / part.sum;
        auto write = [&](Quad quad, int q) {
            const int index = q * STEP + mine;
            if (is_counted) differentiate(quad, index, target, scale, factor, part.highest);
            else quad = {};
            store_quad<VECTOR>(gradient, index, vocab, quad);
        };
#pragma unroll
        for (int q = 0; q < SLOTS; q++) {
            if (q < staged) write(read_slot(q), q);
            fetch(next_row, q, is_next_counted);
        }
        for (int q = staged; q < quads; q++) {
            const Quad quad = load_quad<VECTOR>(row, q * STEP + mine, is_counted ? vocab : 0);
            if (sizeof(T) < sizeof(float)) __syncthreads();
            write(quad, q);
        }
        // The next row uses shared memory again.
        __syncthreads();
        r = next;
        target = next_target;
    }
    wait_for_copies<0>();
    if (threadIdx.x == 0) leave_schedule(schedule);
}

template <typename T>
__device__ __forceinline__ void cross_entropy_any(
    float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale
) {
    __shared__ float2 shared[ROW_WARPS];
    const bool vector = aligned(logits) && ld % QUAD == 0;
    if (vocab <= NARROW_VOCAB) {
        if (vector) cross_entropy<T, WARP, true>(logits, ld, targets, loss, rows, vocab, scale, shared);
        else cross_entropy<T, WARP, false>(logits, ld, targets, loss, rows, vocab, scale, shared);
    } else {
        if (vector) cross_entropy<T, ROW_BLOCK, true>(logits, ld, targets, loss, rows, vocab, scale, shared);
        else cross_entropy<T, ROW_BLOCK, false>(logits, ld, targets, loss, rows, vocab, scale, shared);
    }
}

template <typename T>
__device__ __forceinline__ void cross_entropy_gradient(
    float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale, int slots,
    int* schedule
) {
    extern __shared__ float4 dynamic_shared[];
    __shared__ float2 shared[ROW_WARPS];
    const bool vector = aligned(logits) && ld % QUAD == 0;
    if (vocab <= NARROW_VOCAB)
        by_alignment(vector, [&](auto v) {
            cross_entropy<T, WARP, VECTOR_OF(v)>(logits, ld, targets, loss, rows, vocab, scale, shared);
        });
    else
        by_alignment(vector, [&](auto v) {
            auto work = [&](auto slot_count) {
                cross_entropy_staged<decltype(slot_count)::value, VECTOR_OF(v), T>(
                    logits, ld, targets, loss, rows, vocab, scale, schedule, dynamic_shared, shared
                );
            };
            if (slots >= MOST_SLOTS) work(Constant<MOST_SLOTS>());
            else work(Constant<FEWEST_SLOTS>());
        });
}

#define CROSS_ENTROPY_KERNEL(T)                                                                             \
    extern "C" __global__ void __launch_bounds__(ROW_BLOCK, 1) cross_entropy_##T(                           \
        float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale, \
        int slots, int* schedule                                                                            \
    ) {                                                                                                     \
        cross_entropy_gradient<T>(logits, ld, targets, loss, rows, vocab, scale, slots, schedule);          \
    }

FOR_EACH_TYPE(CROSS_ENTROPY_KERNEL)

extern "C" __global__ void __launch_bounds__(ROW_BLOCK, 2) cross_entropy_loss_f32(
    const float* logits, uint64_t ld, const int* targets, float* loss, uint64_t rows, int vocab, float scale
) {
    cross_entropy_any<NoGradient>(const_cast<float*>(logits), ld, targets, loss, rows, vocab, scale);
}

extern "C" __global__ void __launch_bounds__(ROW_BLOCK)
    sum_loss_f32(const float* loss, uint64_t n, float* out, float scale) {
    __shared__ double shared[ROW_BLOCK];
    double sum = 0.0;
    for (uint64_t i = threadIdx.x; i < n; i += ROW_BLOCK) sum += double(loss[i]);
    shared[threadIdx.x] = sum;
    for (int width = ROW_BLOCK / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    }
    if (threadIdx.x == 0) *out = float(shared[0]) * scale;
}
