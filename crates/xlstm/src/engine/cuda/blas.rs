//! Matrix products by cuBLASLt: one plan (descriptors and algorithm) a shape. Elements or f32 are
//! multiplied and summed in f32, without TF32. Algorithms that add parts of a sum within C itself are
//! left out: their order of summation is not ours to know, and every step shall give the same bits.
//!
//! Everything here is row-major. A row-major C = op(A) op(B) is a column-major
//! C^T = op(B)^T op(A)^T, so that cuBLASLt gets our B as its A and our A as its B.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use super::Precision;
use super::algorithms::{self, Algorithm};
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
    /// Stored in f32 whatever the precision.
    pub(crate) full: bool,
}

impl Operand {
    /// A matrix with rows `step` elements apart.
    pub(crate) fn new(pointer: u64, step: usize) -> Operand {
        Operand { pointer, step, next: 0, transposed: false, full: false }
    }

    /// The same, of f32 whatever the precision.
    pub(crate) fn full(self) -> Operand {
        Operand { full: true, ..self }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Operand {
        Operand { transposed: !self.transposed, ..self }
    }

    /// One of a batch, `next` elements apart.
    pub(crate) fn batched(self, next: usize) -> Operand {
        Operand { next, ..self }
    }

    fn layout(&self, precision: Precision) -> Layout {
        let precision = if self.full { Precision::F32 } else { precision };
        let bits = self.pointer | (self.next * precision.bytes()) as u64 | 256;
        let alignment = 1 << bits.trailing_zeros();
        Layout { step: self.step, next: self.next, transposed: self.transposed, precision, alignment }
    }
}

/// C (m, n) = A (m, k) B (k, n), or C += with `accumulate`, `batch` times. A and B are of one type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) size: [usize; 3],
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    pub(crate) c: Operand,
    pub(crate) batch: usize,
    pub(crate) accumulate: bool,
}

/// What a product is multiplied by and added to: C = alpha A B + beta D, where D is stored as C is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Combination {
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Where D lies.
    pub(crate) addend: u64,
}

impl Combination {
    /// A B itself, or C + A B.
    pub(super) fn plain(accumulate: bool, c: u64) -> Combination {
        Combination { alpha: 1.0, beta: f32::from(u8::from(accumulate)), addend: c }
    }
}

/// All of an operand but where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    step: usize,
    next: usize,
    transposed: bool,
    precision: Precision,
    /// Bytes, up to 256, that all of the batch's matrices are aligned to.
    alignment: u32,
}

impl Layout {
    fn data_type(&self) -> sys::cudaDataType {
        match self.precision {
            Precision::F32 => sys::cudaDataType::CUDA_R_32F,
            Precision::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layout { step, next, transposed, precision, alignment } = self;
        let transposed = if *transposed { "t" } else { "" };
        write!(f, "{precision:?}{transposed} {step} {next} {alignment}")
    }
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    size: [usize; 3],
    /// Of A, B, C.
    operands: [Layout; 3],
    batch: usize,
    pub(super) accumulate: bool,
}

impl Key {
    fn new(p: &Product, precision: Precision) -> Key {
        debug_assert_eq!(p.a.full, p.b.full);
        let operands = [p.a, p.b, p.c].map(|operand| operand.layout(precision));
        Key { size: p.size, operands, batch: p.batch, accumulate: p.accumulate }
    }

    /// Rows and columns of A, B and C as they are stored.
    fn stored(&self) -> [[usize; 2]; 3] {
        let [m, n, k] = self.size;
        let mut shapes = [[m, k], [k, n], [m, n]];
        for (shape, operand) in shapes.iter_mut().zip(&self.operands) {
            if operand.transposed {
                shape.reverse();
            }
        }
        shapes
    }

    /// Bytes from the first element of A, B and C to their last.
    pub(super) fn bytes(&self) -> [usize; 3] {
        let mut bytes = [0; 3];
        for ((bytes, [rows, columns]), operand) in bytes.iter_mut().zip(self.stored()).zip(&self.operands) {
            let last = (self.batch - 1) * operand.next + (rows - 1) * operand.step + columns;
            *bytes = last * operand.precision.bytes();
        }
        bytes
    }
}

/// What names the shape in a file.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([m, n, k], [a, b, c]) = (self.size, self.operands);
        let sign = if self.accumulate { "+=" } else { "=" };
        write!(f, "{} x {m} {n} {k}: {c} {sign} {a} * {b}", self.batch)
    }
}

/// The descriptors of a shape.
pub(super) struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of cuBLASLt's A, B and C.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: Algorithm,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

/// cuBLASLt with its plans.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Plan>>,
    /// Whether algorithms are timed for a shape that is new.
    pub(super) search: AtomicBool,
    /// The algorithm of each shape, by the shape's name: those in use, and those imported.
    pub(super) known: Mutex<BTreeMap<String, Algorithm>>,
}

// SAFETY: the handle may be used from any thread; plans are behind the lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Enough for every split product seen (12 MiB at most).
pub(super) const WORKSPACE: usize = 32 << 20;

pub(super) fn failed(what: &str, error: result::CublasError) -> Error {
    Error::new(ErrorKind::Device, format!("cuBLASLt cannot {what}: {error:?}"))
}

impl Blas {
    pub(super) fn new() -> Result<Blas> {
        let handle = result::create_handle().map_err(|e| failed("start", e))?;
        Ok(Blas { handle, plans: Mutex::default(), search: AtomicBool::new(false), known: Mutex::default() })
    }

    /// Queues a product on a stream. One that is combined with what is added to it has to accumulate.
    pub(super) fn product(
        &self,
        gpu: &Arc<Gpu>,
        stream: CUstream,
        workspace: &Buffer,
        precision: Precision,
        p: &Product,
        combined: Option<Combination>,
    ) -> Result<()> {
        debug_assert!(
            combined.is_none_or(|with| p.accumulate && (with.addend ^ p.c.pointer).is_multiple_of(256))
        );
        if p.size[0] * p.size[1] * p.batch == 0 {
            return Ok(());
        }
        let key = Key::new(p, precision);
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(key) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => place.insert(self.plan(gpu, workspace, &key)?),
        };
        let pointers = [&p.a, &p.b, &p.c].map(|operand| operand.pointer);
        let combined = combined.unwrap_or(Combination::plain(p.accumulate, p.c.pointer));
        self.multiply(stream, workspace, plan, &plan.algorithm, pointers, combined)
    }

    /// Queues a plan's product of A and B to C, combined, by `algorithm`.
    pub(super) fn multiply(
        &self,
        stream: CUstream,
        workspace: &Buffer,
        plan: &Plan,
        algorithm: &Algorithm,
        pointers: [u64; 3],
        Combination { alpha, beta, addend }: Combination,
    ) -> Result<()> {
        let [a, b, c] = plan.layouts;
        let algorithm = sys::cublasLtMatmulAlgo_t { data: *algorithm };
        // SAFETY: the pointers are of device buffers of the sizes that the layouts say.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointers[1] as *const c_void,
                a,
                pointers[0] as *const c_void,
                b,
                addend as *const c_void,
                c,
                pointers[2] as *mut c_void,
                c,
                &raw const algorithm,
                workspace.pointer() as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| failed("multiply", e))
    }

    /// The plan of a new shape: with the algorithm that was imported for it, else the fastest of
    /// several, else the one that cuBLASLt thinks best.
    fn plan(&self, gpu: &Arc<Gpu>, workspace: &Buffer, key: &Key) -> Result<Plan> {
        let mut plan = Plan::new(key)?;
        let name = key.to_string();
        let known = lock(&self.known).get(&name).copied();
        plan.algorithm = match known {
            Some(algorithm) => self.checked(&plan, &name, algorithm)?,
            None => {
                let search = self.search.load(Ordering::Relaxed) && !gpu.is_capturing()?;
                let candidates =
                    self.candidates(&plan, key, if search { algorithms::CANDIDATES } else { 1 })?;
                algorithms::fastest(self, gpu, workspace, key, &plan, &candidates)?
            }
        };
        lock(&self.known).insert(name, plan.algorithm);
        Ok(plan)
    }

    /// Algorithms for a plan, the one that cuBLASLt thinks fastest first.
    fn candidates(&self, plan: &Plan, key: &Key, most: usize) -> Result<Vec<Algorithm>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        use sys::cublasLtReductionScheme_t as Scheme;
        let preference = result::create_matmul_pref().map_err(|e| failed("plan", e))?;
        let reductions = Scheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32
            | Scheme::CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE as u32;
        let [of_a, of_b, of_c] = key.operands.map(|operand| operand.alignment);
        // SAFETY: every attribute gets a value of its documented type and size; `found` has room
        // for `most` results, of which an all-zero one is plain data.
        let (set, status, found) = unsafe {
            let mut set = result::set_matmul_pref_attribute(
                preference,
                P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&WORKSPACE).cast(),
                8,
            );
            for (attribute, value) in [
                (P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_b),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_a),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_c),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_c),
            ] {
                let value = std::ptr::from_ref(&value).cast();
                set = set.and(result::set_matmul_pref_attribute(preference, attribute, value, 4));
            }
            let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = vec![std::mem::zeroed(); most];
            let mut count = 0;
            let [a, b, c] = plan.layouts;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                a,
                b,
                c,
                c,
                preference,
                most as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
            .result();
            let _ = result::destroy_matmul_pref(preference);
            found.truncate(count as usize);
            (set, status, found)
        };
        set.and(status).map_err(|e| failed(&format!("plan {key}"), e))?;
        let works = |found: &&sys::cublasLtMatmulHeuristicResult_t| {
            found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && found.workspaceSize <= WORKSPACE
        };
        let algorithms: Vec<Algorithm> = found.iter().filter(works).map(|found| found.algo.data).collect();
        if algorithms.is_empty() {
            return Err(Error::new(ErrorKind::Device, format!("cuBLASLt has no algorithm for {key}")));
        }
        Ok(algorithms)
    }

    /// An imported algorithm, if cuBLASLt takes it for this plan.
    fn checked(&self, plan: &Plan, name: &str, algorithm: Algorithm) -> Result<Algorithm> {
        let [a, b, c] = plan.layouts;
        let given = sys::cublasLtMatmulAlgo_t { data: algorithm };
        // SAFETY: all descriptors are the plan's; an all-zero result is plain data.
        let (status, found) = unsafe {
            let mut found: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let (operation, algorithm) = (plan.operation, &raw const given);
            let status =
                sys::cublasLtMatmulAlgoCheck(self.handle, operation, a, b, c, c, algorithm, &raw mut found);
            (status.result(), found)
        };
        if status.is_err() || found.workspaceSize > WORKSPACE {
            let message = format!("cuBLASLt refuses the algorithm that was saved for the product {name}");
            return Err(Error::new(ErrorKind::Device, message)
                .hint("the saved algorithms are damaged: without them, others are chosen"));
        }
        Ok(algorithm)
    }
}

impl Plan {
    /// The descriptors of a shape; the algorithm is the caller's to choose.
    fn new(key: &Key) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatrixLayoutAttribute_t as L;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)
            .map_err(|e| failed("plan", e))?;
        let layout = |i: usize| {
            let ([rows, columns], operand) = (key.stored()[i], &key.operands[i]);
            // Stored (rows, columns) row-major is (columns, rows) column-major.
            let (rows, columns) = (columns as u64, rows as u64);
            result::create_matrix_layout(operand.data_type(), rows, columns, operand.step as i64)
                .map_err(|e| failed("lay out a matrix", e))
        };
        let layouts = [layout(1)?, layout(0)?, layout(2)?];
        let plan = Plan { operation, layouts, algorithm: [0; 8] };
        let [a, b, c] = &key.operands;
        // SAFETY: every attribute gets a value of its documented type and size.
        unsafe {
            for (attribute, operand) in
                [(D::CUBLASLT_MATMUL_DESC_TRANSA, b), (D::CUBLASLT_MATMUL_DESC_TRANSB, a)]
            {
                let flag = i32::from(operand.transposed);
                result::set_matmul_desc_attribute(operation, attribute, std::ptr::from_ref(&flag).cast(), 4)
                    .map_err(|e| failed("transpose", e))?;
            }
            for (layout, operand) in plan.layouts.iter().zip([b, a, c]) {
                if key.batch == 1 {
                    break;
                }
                let (count, next) = (key.batch as i32, operand.next as i64);
                let (count, next) = (std::ptr::from_ref(&count).cast(), std::ptr::from_ref(&next).cast());
                result::set_matrix_layout_attribute(*layout, L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count, 4)
                    .and_then(|()| {
                        let offset = L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                        result::set_matrix_layout_attribute(*layout, offset, next, 8)
                    })
                    .map_err(|e| failed("batch", e))?;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_names_and_sizes_of_their_own() {
        let product = Product {
            size: [5, 3, 7],
            a: Operand::new(1024, 14).batched(7),
            b: Operand::new(32, 7).batched(21).t(),
            c: Operand::new(256, 6).batched(3).full(),
            batch: 2,
            accumulate: true,
        };
        let key = Key::new(&product, Precision::Bf16);
        assert_eq!(key.to_string(), "2 x 5 3 7: F32 6 3 4 += Bf16 14 7 2 * Bf16t 7 21 2");
        assert_eq!(key.bytes(), [2 * (7 + 4 * 14 + 7), 2 * (21 + 2 * 7 + 7), 4 * (3 + 4 * 6 + 3)]);
        assert_ne!(key, Key::new(&product, Precision::F32));
    }
}
