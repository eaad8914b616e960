// Work that blocks share out among themselves, for kernels whose results do not depend on which block did what.
#pragma once

// The first piece of a block is its index, the others are drawn. `schedule` is int[2], zero before the first launch; a
// launch leaves it zero again.
__device__ __forceinline__ int draw_piece(int* schedule) { return gridDim.x + atomicAdd(schedule, 1); }

// The last block to draw in vain resets the counter; the count of blocks wraps to 0 itself.
__device__ __forceinline__ void leave_schedule(int* schedule) {
    __threadfence();
    const unsigned last = gridDim.x - 1;
    if (atomicInc(reinterpret_cast<unsigned*>(schedule) + 1, last) == last) atomicExch(schedule, 0);
}
