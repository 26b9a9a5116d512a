//! Matrix products by cuBLASLt: one plan (descriptors and algorithm) a shape.
//!
//! Everything here is row-major. A row-major C = op(A) op(B) is a column-major
//! C^T = op(B)^T op(A)^T, so that cuBLASLt gets our B as its A and our A as its B.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::{result, sys};

use super::context::{Buffer, Gpu, lock};
use crate::error::{Error, ErrorKind, Result};

/// An operand: rows `step` elements apart, read as its transpose where `transposed`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) pointer: u64,
    /// Elements from one stored row to the next.
    pub(crate) step: usize,
    /// Elements from one matrix of a batch to the next.
    pub(crate) next: usize,
    pub(crate) transposed: bool,
}

impl Operand {
    /// A matrix with rows `step` elements apart.
    pub(crate) fn new(pointer: u64, step: usize) -> Operand {
        Operand { pointer, step, next: 0, transposed: false }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Operand {
        Operand { transposed: !self.transposed, ..self }
    }

    /// One of a batch, `next` elements apart.
    pub(crate) fn batched(self, next: usize) -> Operand {
        Operand { next, ..self }
    }

    /// Bytes, up to 256, that all of the batch's matrices are aligned to.
    fn alignment(&self) -> u32 {
        let bits = self.pointer | (self.next as u64 * 4) | 256;
        1 << bits.trailing_zeros()
    }
}

/// C (m, n) = A (m, k) B (k, n), or C += with `accumulate`, `batch` times. All f32, summed in
/// f32 without TF32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) size: [usize; 3],
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    pub(crate) c: Operand,
    pub(crate) batch: usize,
    pub(crate) accumulate: bool,
}

/// What a plan is made for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    size: [usize; 3],
    /// Step, next, transposed and alignment of A, B, C.
    operands: [(usize, usize, bool, u32); 3],
    batch: usize,
    accumulate: bool,
}

struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of cuBLASLt's A, B and C.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

/// cuBLASLt with its plans and work space.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: the handle may be used from any thread; plans are behind the lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Enough for every split product seen (12 MiB at most).
pub(super) const WORKSPACE: usize = 32 << 20;

fn failed(what: &str, error: result::CublasError) -> Error {
    Error::new(ErrorKind::Device, format!("cuBLASLt cannot {what}: {error:?}"))
}

impl Blas {
    pub(super) fn new() -> Result<Blas> {
        let handle = result::create_handle().map_err(|e| failed("start", e))?;
        Ok(Blas { handle, plans: Mutex::default() })
    }

    /// Queues a product.
    pub(super) fn product(&self, gpu: &Gpu, workspace: &Buffer, p: &Product) -> Result<()> {
        if p.size[0] * p.size[1] * p.batch == 0 {
            return Ok(());
        }
        let part = |o: &Operand| (o.step, o.next, o.transposed, o.alignment());
        let key = Key {
            size: p.size,
            operands: [part(&p.a), part(&p.b), part(&p.c)],
            batch: p.batch,
            accumulate: p.accumulate,
        };
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(self.plan(p)?),
        };
        let (alpha, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        let pointer = |o: &Operand| o.pointer as *const c_void;
        let [a, b, c] = plan.layouts;
        // SAFETY: the operands are device buffers of the sizes that the layouts say.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(&p.b),
                a,
                pointer(&p.a),
                b,
                pointer(&p.c),
                c,
                p.c.pointer as *mut c_void,
                c,
                &raw const plan.algorithm,
                workspace.pointer() as *mut c_void,
                WORKSPACE,
                gpu.raw_stream().cast(),
            )
        }
        .map_err(|e| failed("multiply", e))
    }

    fn plan(&self, p: &Product) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let [m, n, k] = p.size;
        let f32_type = sys::cudaDataType::CUDA_R_32F;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, f32_type).map_err(|e| failed("plan", e))?;
        let layout = |operand: &Operand, rows: usize, columns: usize| {
            let (rows, columns) = if operand.transposed { (columns, rows) } else { (rows, columns) };
            // Stored (rows, columns) row-major is (columns, rows) column-major.
            result::create_matrix_layout(f32_type, columns as u64, rows as u64, operand.step as i64)
        };
        let made = |layout: std::result::Result<_, _>| layout.map_err(|e| failed("lay out a matrix", e));
        let layouts = [made(layout(&p.b, k, n))?, made(layout(&p.a, m, k))?, made(layout(&p.c, m, n))?];
        // SAFETY: (an all-zero algorithm is plain data that the heuristic overwrites.)
        let mut plan = Plan { operation, layouts, algorithm: unsafe { std::mem::zeroed() } };
        // SAFETY: every attribute gets a value of its documented type and size.
        unsafe {
            for (attribute, operand) in
                [(D::CUBLASLT_MATMUL_DESC_TRANSA, &p.b), (D::CUBLASLT_MATMUL_DESC_TRANSB, &p.a)]
            {
                let flag = i32::from(operand.transposed);
                result::set_matmul_desc_attribute(operation, attribute, std::ptr::from_ref(&flag).cast(), 4)
                    .map_err(|e| failed("transpose", e))?;
            }
            if p.batch > 1 {
                use sys::cublasLtMatrixLayoutAttribute_t as L;
                for (layout, operand) in plan.layouts.iter().zip([&p.b, &p.a, &p.c]) {
                    let (count, next) = (p.batch as i32, operand.next as i64);
                    let count = std::ptr::from_ref(&count).cast();
                    let next = std::ptr::from_ref(&next).cast();
                    result::set_matrix_layout_attribute(
                        *layout,
                        L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                        count,
                        4,
                    )
                    .and_then(|()| {
                        let offset = L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                        result::set_matrix_layout_attribute(*layout, offset, next, 8)
                    })
                    .map_err(|e| failed("batch", e))?;
                }
            }
            let preference = result::create_matmul_pref().map_err(|e| failed("plan", e))?;
            let size = WORKSPACE;
            let mut set = result::set_matmul_pref_attribute(
                preference,
                P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&size).cast(),
                8,
            );
            for (attribute, operand) in [
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &p.b),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &p.a),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &p.c),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &p.c),
            ] {
                let bytes = operand.alignment();
                let bytes = std::ptr::from_ref(&bytes).cast();
                set = set.and(result::set_matmul_pref_attribute(preference, attribute, bytes, 4));
            }
            let mut found: [sys::cublasLtMatmulHeuristicResult_t; 1] = std::mem::zeroed();
            let mut count = 0;
            let [a, b, c] = plan.layouts;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation,
                a,
                b,
                c,
                c,
                preference,
                1,
                found.as_mut_ptr(),
                &raw mut count,
            )
            .result();
            let _ = result::destroy_matmul_pref(preference);
            set.and(status).map_err(|e| failed(&format!("plan {p:?}"), e))?;
            if count == 0 {
                return Err(Error::new(ErrorKind::Device, format!("cuBLASLt has no algorithm for {p:?}")));
            }
            plan.algorithm = found[0].algo;
        }
        Ok(plan)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        lock(&self.plans).clear();
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
