// Rotary position embedding (Su et al., 2021) on a packed buffer of heads.
//
// kernel (suffix _f32, _bf16, _f16)  arguments                                                               grid  block
// rope                               const T* x, T* y, const float* cos, const float* sin,                   any   256
//                                    const int* positions, uint64_t rows, int time, int columns, int heads,  [1]
//                                    int head_dim, int rotary_dim, int interleaved, int direction
//
// [1] ceil(rows / 4) is good. No dynamic shared memory, no scratch. y may be x.
// A row of `columns` begins with `heads` heads of head_dim elements; the first rotary_dim (even) of each are rotated, all
// others copied. Its position is positions[r], or r % time where positions is null. cos and sin are float[positions,
// rotary_dim / 2]. Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where interleaved is not 0. direction is 1, or -1
// for the backward pass, which rotates back.

#include "common.cuh"

constexpr int ROWS = 4; // that a block takes at once, so that few heads fill it

// Cosines and sines of the angles from `angle` on.
template <int N> struct Angles {
    float cos[N], sin[N];

    __device__ __forceinline__ Angles(const float* cosines, const float* sines, bool vector, float direction) {
        if (N % 4 == 0 && vector) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                const float4 c = *reinterpret_cast<const float4*>(cosines + k),
                             s = *reinterpret_cast<const float4*>(sines + k);
                cos[k] = c.x, cos[k + 1] = c.y, cos[k + 2] = c.z, cos[k + 3] = c.w;
                sin[k] = s.x, sin[k + 1] = s.y, sin[k + 2] = s.z, sin[k + 3] = s.w;
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; k++) cos[k] = cosines[k], sin[k] = sines[k];
        }
#pragma unroll
        for (int k = 0; k < N; k++) sin[k] *= direction;
    }

    __device__ __forceinline__ void rotate(int k, float& a, float& b) const {
        const float rotated = a * cos[k] - b * sin[k];
        b = b * cos[k] + a * sin[k];
        a = rotated;
    }
};

template <typename T>
__device__ __forceinline__ void rope(
    const T* x, T* y, const float* cosines, const float* sines, const int* positions, uint64_t rows, int time,
    int columns, int heads, int head_dim, int rotary_dim, bool interleaved, float direction
) {
    constexpr int LANES = Pack<T>::LANES;
    const int half = rotary_dim / 2;
    const int unit = interleaved ? rotary_dim : half; // consecutive elements that one pass over packs covers
    const bool vector = rows_aligned(x, columns) && aligned(y) && head_dim % LANES == 0 && unit % LANES == 0;
    const bool vector_angles = aligned(cosines) && aligned(sines) && half % 4 == 0;
    const int lanes = vector ? LANES : 1;
    const int items = unit / lanes / (interleaved && !vector ? 2 : 1); // of one head
    const int rotated = heads * items;
    // What is not rotated: the ends of heads, and what is behind them.
    const int end = (head_dim - rotary_dim) / lanes, ends = heads * end;
    const int row_items = rotated + columns / lanes - heads * (rotary_dim / lanes);
    for (uint64_t base = uint64_t(blockIdx.x) * ROWS; base < rows; base += uint64_t(gridDim.x) * ROWS) {
        const int rows_here = int(min(uint64_t(ROWS), rows - base));
        for (int i = threadIdx.x; i < rows_here * row_items; i += BLOCK) {
            const uint64_t row = base + i / row_items;
            const int index = i % row_items;
            if (index >= rotated) {
                const int rest = index - rotated;
                const int column = rest < ends ? rest / end * head_dim + rotary_dim + rest % end * lanes
                                               : heads * head_dim + (rest - ends) * lanes;
                const uint64_t at = row * columns + column;
                if (vector) store_aligned(y + at, load_aligned(x + at));
                else y[at] = x[at];
                continue;
            }
            const int item = index % items;
            const uint64_t at = row * columns + index / items * head_dim;
            const T* head = x + at;
            T* out = y + at;
            const uint64_t position = positions ? uint64_t(positions[row]) : row % uint64_t(time);
            const float* row_cosines = cosines + position * half;
            const float* row_sines = sines + position * half;
            if (vector && interleaved) {
                const int angle = item * LANES / 2;
                const Angles<LANES / 2> angles(row_cosines + angle, row_sines + angle, vector_angles, direction);
                float values[LANES];
                unpack(load_aligned(head + item * LANES), values);
#pragma unroll
                for (int k = 0; k < LANES / 2; k++) angles.rotate(k, values[2 * k], values[2 * k + 1]);
                store_aligned(out + item * LANES, pack_of<T>(values));
            } else if (vector) {
                const T* first = head + item * LANES;
                const Pack<T> a_pack = load_aligned(first), b_pack = load_aligned(first + half);
                const Angles<LANES> angles(
                    row_cosines + item * LANES, row_sines + item * LANES, vector_angles, direction
                );
                float a[LANES], b[LANES];
                unpack(a_pack, a);
                unpack(b_pack, b);
#pragma unroll
                for (int k = 0; k < LANES; k++) angles.rotate(k, a[k], b[k]);
                store_aligned(out + item * LANES, pack_of<T>(a));
                store_aligned(out + item * LANES + half, pack_of<T>(b));
            } else {
                const int first = interleaved ? 2 * item : item, second = interleaved ? first + 1 : first + half;
                const Angles<1> angles(row_cosines + item, row_sines + item, false, direction);
                float a = to_float(head[first]), b = to_float(head[second]);
                angles.rotate(0, a, b);
                out[first] = from_float<T>(a);
                out[second] = from_float<T>(b);
            }
        }
    }
}

#define ROPE_KERNEL(T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(BLOCK) rope_##T(                                            \
        const T* x, T* y, const float* cos, const float* sin, const int* positions, uint64_t rows, int time, \
        int columns, int heads, int head_dim, int rotary_dim, int interleaved, int direction                 \
    ) {                                                                                                      \
        rope(                                                                                                \
            x, y, cos, sin, positions, rows, time, columns, heads, head_dim, rotary_dim, interleaved != 0,   \
            float(direction)                                                                                 \
        );                                                                                                   \
    }

FOR_EACH_TYPE(ROPE_KERNEL)
