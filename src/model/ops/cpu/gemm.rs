//! Matrix products on slices, through the `gemm` crate.

#![expect(unsafe_code, reason = "multiplies by address")]

use gemm::Parallelism;

/// A row-major matrix, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub data: *const f32,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl Matrix {
    /// Row-major with `columns` elements a row.
    pub fn new(data: &[f32], columns: usize) -> Self {
        Matrix { data: data.as_ptr(), row_stride: columns, column_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Matrix { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }
}

/// `c = scale * a b (+ c)`, where `c` is m x n with `row_stride` elements a row.
///
/// # Safety
/// The pointers must be valid for the elements that the dimensions and strides address; `c` must not overlap `a` or `b`.
#[allow(clippy::too_many_arguments)] // the dimensions of a matrix product
pub(super) unsafe fn multiply(
    (m, n, k): (usize, usize, usize),
    a: Matrix,
    b: Matrix,
    c: *mut f32,
    row_stride: usize,
    accumulate: bool,
    scale: f32,
    parallel: bool,
) {
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: by this function's contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            row_stride as isize,
            accumulate,
            a.data,
            a.column_stride as isize,
            a.row_stride as isize,
            b.data,
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `c = a b (+ c)` for contiguous row-major `c`, on all cores.
pub(super) fn product((m, n, k): (usize, usize, usize), a: Matrix, b: Matrix, c: &mut [f32], accumulate: bool) {
    debug_assert_eq!(c.len(), m * n);
    // SAFETY: callers build `a` and `b` from slices of these dimensions; `c` is exclusive and exactly m x n.
    unsafe { multiply((m, n, k), a, b, c.as_mut_ptr(), n, accumulate, 1.0, true) }
}
