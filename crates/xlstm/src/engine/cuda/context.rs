//! One GPU: its context, stream, libraries and module cache.
//!
//! The libraries come with the driver and the CUDA toolkit and are loaded at run time. A
//! missing one is an error with a hint here, at the start, because a later call into it
//! would panic.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::Precision;
use super::blas::Blas;
use super::compiler::{self, Source};
use crate::error::{Error, ErrorKind, Result};

/// A source's name and the precision that it was compiled for.
type ModuleKey = (&'static str, Precision);

/// What of a GPU the kernels may ask for.
pub struct Gpu {
    /// First, so that it is freed before the context.
    staging: Mutex<Option<Staging>>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// For work that may run beside that of the first: see [`Queue::fork`](super::launch::Queue::fork).
    side: Arc<CudaStream>,
    ordinal: usize,
    name: String,
    architecture: String,
    /// Whether kernels can begin before the one before has ended.
    begins_early: bool,
    modules: Mutex<HashMap<ModuleKey, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(ModuleKey, &'static str), CudaFunction>>,
    pub(super) blas: Blas,
    /// Bytes of all buffers, and the most that there have been.
    allocated: AtomicUsize,
    peak: AtomicUsize,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({}, {})", self.name, self.architecture)
    }
}

/// A driver error as one of ours.
pub(crate) fn driver(what: &str, error: DriverError) -> Error {
    // The error's own text asks the driver for it, which is there: it made the error.
    Error::new(ErrorKind::Device, format!("cannot {what} on the GPU: {error}"))
}

fn missing(what: &str, library: &str) -> Error {
    Error::new(ErrorKind::Device, format!("no GPU can be used: {what} ({library}) is not found"))
}

impl Gpu {
    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// When the driver, NVRTC or cuBLASLt is missing or too old, when there is no such GPU,
    /// or when it is older than compute capability 8.0.
    pub fn new(ordinal: usize) -> Result<Arc<Gpu>> {
        compiler::preload();
        // SAFETY: these only try to open the libraries.
        let (has_driver, has_nvrtc, has_lt) = unsafe {
            (sys::is_culib_present(), cudarc::nvrtc::sys::is_culib_present(), lt::is_culib_present())
        };
        if !has_driver {
            return Err(missing("the NVIDIA driver", "libcuda").hint("install it, or use --device cpu"));
        }
        let toolkit = "install CUDA 13 (or the wheels nvidia-cuda-nvrtc and nvidia-cublas) and let the loader find it, for example through LD_LIBRARY_PATH";
        if !has_nvrtc {
            return Err(missing("the kernel compiler NVRTC", "libnvrtc").hint(toolkit));
        }
        if !has_lt {
            return Err(missing("the matrix library cuBLASLt", "libcublasLt").hint(toolkit));
        }
        let mut version = 0;
        // SAFETY: the driver is there.
        let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        if code != sys::CUresult::CUDA_SUCCESS || version < 12080 {
            return Err(Error::new(
                ErrorKind::Device,
                format!("the NVIDIA driver speaks CUDA {}.{}", version / 1000, version % 1000 / 10),
            )
            .hint("CUDA 12.8 or newer is needed: update the driver"));
        }
        // SAFETY: the libraries are there.
        let (nvrtc, blas) = unsafe {
            let (mut major, mut minor) = (0, 0);
            let code = cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor);
            code.result().map_err(|e| {
                Error::new(ErrorKind::Device, format!("NVRTC does not tell its version: {e:?}"))
            })?;
            (major, lt::cublasLtGetVersion() / 10_000)
        };
        for (library, found) in [("NVRTC", i64::from(nvrtc)), ("cuBLASLt", blas as i64)] {
            if found < OLDEST {
                return Err(Error::new(ErrorKind::Device, format!("{library} is of CUDA {found}"))
                    .hint(format!("CUDA {OLDEST} or newer is needed; {toolkit}")));
            }
        }
        result::init().map_err(|e| driver("start", e))?;
        let count = result::device::get_count().map_err(|e| driver("count devices", e))?;
        if ordinal as i64 >= i64::from(count) {
            return Err(Error::new(
                ErrorKind::Device,
                format!("there is no GPU {ordinal}: {count} are visible"),
            )
            .hint("see nvidia-smi and CUDA_VISIBLE_DEVICES"));
        }
        let context = CudaContext::new(ordinal).map_err(|e| driver("make a context", e))?;
        // SAFETY: buffers here are raw pointers on one stream; no CudaSlice waits for events.
        unsafe { context.disable_event_tracking() };
        let (major, minor) = context.compute_capability().map_err(|e| driver("read the version", e))?;
        let name = context.name().map_err(|e| driver("read the name", e))?;
        if major < 8 {
            return Err(Error::new(
                ErrorKind::Device,
                format!("GPU {ordinal} ({name}) has compute capability {major}.{minor}"),
            )
            .hint("8.0 (Ampere) or newer is needed"));
        }
        let suffix = if major >= 9 { "a" } else { "" };
        let stream = || context.new_stream().map_err(|e| driver("make a stream", e));
        let (stream, side) = (stream()?, stream()?);
        let blas = Blas::new()?;
        Ok(Arc::new(Gpu {
            architecture: format!("sm_{major}{minor}{suffix}"),
            begins_early: major >= 9,
            context,
            stream,
            side,
            ordinal,
            name,
            modules: Mutex::default(),
            functions: Mutex::default(),
            blas,
            staging: Mutex::default(),
            allocated: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }))
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The card's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The most bytes of its memory that buffers of this value have taken at a time, since it was
    /// made or [`forget_peak`](Self::forget_peak) was called. What the driver and the code take
    /// besides, half a gigabyte, is not counted.
    pub fn peak_bytes(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    /// Lets the peak begin anew with what is there now.
    pub fn forget_peak(&self) {
        self.peak.store(self.allocated.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// What kernels are compiled for, such as `sm_90a`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Number of streaming multiprocessors.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn multiprocessors(&self) -> Result<usize> {
        let count = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        Ok(count.map_err(|e| driver("count multiprocessors", e))? as usize)
    }

    /// Bytes of shared memory that a block can have.
    pub(crate) fn shared_memory(&self) -> Result<usize> {
        let bytes = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        Ok(bytes.map_err(|e| driver("measure shared memory", e))? as usize)
    }

    /// Whether blocks of a kernel can form clusters.
    pub(crate) fn has_clusters(&self) -> Result<bool> {
        let found = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH);
        Ok(found.map_err(|e| driver("ask about clusters", e))? != 0)
    }

    /// Makes the GPU the current one of this thread; every entry point calls it.
    pub(crate) fn enter(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| driver("enter the context", e))
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    pub(super) fn raw_side(&self) -> sys::CUstream {
        self.side.cu_stream()
    }

    /// Whether work is being captured into a graph, so that nothing can be waited for.
    pub(super) fn is_capturing(&self) -> Result<bool> {
        let status = self.stream.capture_status().map_err(|e| driver("ask about a capture", e))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        self.stream.synchronize().map_err(|e| driver("finish the work", e))
    }

    /// Sets `bytes` bytes, a multiple of 4, to a repeated 32-bit pattern.
    pub(crate) fn fill(&self, pointer: u64, pattern: u32, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers pass ranges of buffers that they own.
        unsafe { sys::cuMemsetD32Async(pointer, pattern, bytes / 4, self.raw_stream()) }
            .result()
            .map_err(|e| driver("fill memory", e))
    }

    /// Copies between buffers of the GPU.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers pass ranges of buffers that they own.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw_stream()) }
            .map_err(|e| driver("copy memory", e))
    }

    /// Copies to the GPU. The host's slice is free again on return.
    pub(crate) fn upload<T: Copy>(&self, to: u64, from: &[T]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: callers pass ranges of buffers that they own; a copy from pageable memory
        // is staged before the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.raw_stream()) }.map_err(|e| driver("upload", e))
    }

    /// Copies from the GPU, after all work before. Little goes through memory of the host that the GPU
    /// reaches by itself: such as the logits of a step of generation, whose copy counts.
    pub(crate) fn download<T: Copy>(&self, to: &mut [T], from: u64) -> Result<()> {
        let bytes = size_of_val(to);
        if bytes > 0 && bytes <= STAGED {
            let mut staging = lock(&self.staging);
            if staging.is_none() {
                // SAFETY: a plain allocation, freed in drop.
                let memory = unsafe { result::malloc_host(STAGED, 0) };
                *staging = Some(Staging(memory.map_err(|e| driver("allocate memory of the host", e))?));
            }
            if let Some(Staging(memory)) = &*staging {
                // SAFETY: callers pass ranges of buffers that they own; `memory` has room for the bytes,
                // is nobody else's while it is locked, and is read after the copy to it has ended.
                unsafe {
                    sys::cuMemcpyDtoHAsync_v2(*memory, from, bytes, self.raw_stream())
                        .result()
                        .map_err(|e| driver("download", e))?;
                    self.synchronize()?;
                    std::ptr::copy_nonoverlapping(memory.cast::<T>(), to.as_mut_ptr(), to.len());
                }
                return Ok(());
            }
        }
        if !to.is_empty() {
            // SAFETY: callers pass ranges of buffers that they own; the wait below ends the borrow.
            unsafe { result::memcpy_dtoh_async(to, from, self.raw_stream()) }
                .map_err(|e| driver("download", e))?;
        }
        self.synchronize()
    }

    fn function(&self, source: &Source, precision: Precision, name: &'static str) -> Result<sys::CUfunction> {
        let key = (source.name, precision);
        if let Some(function) = lock(&self.functions).get(&(key, name)) {
            return Ok(function.cu_function());
        }
        let known = lock(&self.modules).get(&key).cloned();
        let module = match known {
            Some(module) => module,
            None => {
                let cubin = compiler::cubin(source, precision, &self.architecture)?;
                let module = self.context.load_module(Ptx::from_binary(cubin));
                let module = module.map_err(|e| driver(&format!("load {}", source.name), e))?;
                lock(&self.modules).insert(key, module.clone());
                module
            }
        };
        let function = module.load_function(name).map_err(|e| driver(&format!("find kernel {name}"), e))?;
        let raw = function.cu_function();
        lock(&self.functions).insert((key, name), function);
        Ok(raw)
    }

    /// Launches kernel `name` of `source`, compiled for `precision`.
    pub(super) fn launch(
        &self,
        source: &Source,
        precision: Precision,
        name: &'static str,
        blocks: &Blocks,
        arguments: &[Argument],
    ) -> Result<()> {
        let Blocks { grid, block, shared, early } = *blocks;
        if grid.contains(&0) {
            return Ok(());
        }
        if grid[0] > i32::MAX as usize || grid[1] > 65_535 || grid[2] > 65_535 {
            return Err(Error::shape(format!("{name} would need a grid of {grid:?} blocks on the GPU"))
                .hint("use a smaller batch"));
        }
        let function = self.function(source, precision, name)?;
        if shared > SHARED_BY_DEFAULT {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function's module lives as long as self.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
                .map_err(|e| driver(&format!("give {name} {shared} bytes of shared memory"), e))?;
        }
        let mut words: Vec<u64> = arguments.iter().map(|a| a.word()).collect();
        let mut pointers: Vec<*mut c_void> = (words.iter_mut().zip(arguments))
            .filter(|(_, argument)| !matches!(argument, Argument::More(_)))
            .map(|(word, _)| std::ptr::from_mut(word).cast())
            .collect();
        let [x, y, z] = grid.map(|d| d as u32);
        // SAFETY: all of it is numbers, for which zeros are valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: block[0] as u32,
            blockDimY: block[1] as u32,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.raw_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early && self.begins_early),
        };
        // SAFETY: the function's module lives as long as self; the arguments match the kernel's
        // parameters (words, little-endian), which the tests on a GPU check.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(|e| driver(&format!("launch {name}"), e))
    }
}

/// The most bytes that are downloaded by way of [`Staging`].
const STAGED: usize = 8 << 20;

/// Memory of the host that the GPU writes to by itself, [`STAGED`] bytes.
struct Staging(*mut c_void);

// SAFETY: plain memory, used by one thread at a time.
unsafe impl Send for Staging {}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: allocated by malloc_host, freed once; every copy to it has been waited for.
        let _ = unsafe { result::free_host(self.0) };
    }
}

/// A pattern that is NaN as one f32 and as two bf16.
pub(super) const NAN: u32 = 0x7fc0_7fc0;

/// The oldest major version of CUDA's libraries.
const OLDEST: i64 = 12;

/// Bytes of shared memory that a kernel gets without asking.
const SHARED_BY_DEFAULT: usize = 48 << 10;

/// The blocks of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) grid: [usize; 3],
    pub(super) block: [usize; 2],
    /// Bytes of dynamic shared memory of each.
    pub(super) shared: usize,
    /// Whether they may begin before the kernel before has ended, for which they wait themselves.
    pub(super) early: bool,
}

/// A kernel argument.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// A device pointer, 0 is null; or a 64-bit integer.
    Pointer(u64),
    /// A 32-bit integer.
    Int(u32),
    /// A 32-bit float.
    Float(f32),
    /// A further word of the structure that the argument before it begins.
    More(u64),
}

impl Argument {
    fn word(self) -> u64 {
        match self {
            Argument::Pointer(x) | Argument::More(x) => x,
            Argument::Int(x) => u64::from(x),
            Argument::Float(x) => u64::from(x.to_bits()),
        }
    }
}

impl From<u64> for Argument {
    fn from(pointer: u64) -> Argument {
        Argument::Pointer(pointer)
    }
}
impl From<Option<u64>> for Argument {
    fn from(pointer: Option<u64>) -> Argument {
        Argument::Pointer(pointer.unwrap_or(0))
    }
}
impl From<usize> for Argument {
    fn from(size: usize) -> Argument {
        Argument::Int(size as u32)
    }
}
impl From<u32> for Argument {
    fn from(x: u32) -> Argument {
        Argument::Int(x)
    }
}
impl From<f64> for Argument {
    fn from(x: f64) -> Argument {
        Argument::Float(x as f32)
    }
}

/// Kernel arguments, each converted to an [`Argument`].
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &[$($crate::engine::cuda::context::Argument::from($argument)),*]
    };
}
pub(crate) use arguments;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer of the GPU.
pub(crate) struct Buffer {
    gpu: Arc<Gpu>,
    pointer: u64,
    bytes: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

impl Buffer {
    /// At least `bytes` zero bytes.
    pub(crate) fn zeros(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer> {
        gpu.enter()?;
        let bytes = bytes.max(4).next_multiple_of(1024);
        // SAFETY: a plain allocation, freed in drop.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|e| no_room(gpu, bytes, e))?;
        let buffer = Buffer { gpu: gpu.clone(), pointer, bytes };
        let allocated = gpu.allocated.fetch_add(bytes, Ordering::Relaxed) + bytes;
        gpu.peak.fetch_max(allocated, Ordering::Relaxed);
        gpu.fill(pointer, 0, bytes)?;
        Ok(buffer)
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What is said where `bytes` more cannot be had: with the card's numbers, which tell others' use of
/// it from ours.
fn no_room(gpu: &Gpu, bytes: usize, error: DriverError) -> Error {
    let mebibytes = |bytes: usize| bytes.div_ceil(1 << 20);
    let (asked, held) = (mebibytes(bytes), mebibytes(gpu.allocated.load(Ordering::Relaxed)));
    let found = result::mem_get_info().map_or_else(
        |_| String::new(),
        |(free, total)| format!(", {} of {} MiB are free on {}", free >> 20, total >> 20, gpu.name),
    );
    driver(&format!("allocate {asked} MiB beside the {held} MiB held already{found}"), error)
        .hint("use a smaller batch (more micro-batches), shorter sequences, or a smaller model")
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Work in flight may use the buffer: wait. Errors have been reported where they happened.
        let _ = self.gpu.synchronize();
        // SAFETY: allocated in `zeros`, freed once.
        let _ = unsafe { result::free_sync(self.pointer) };
        self.gpu.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_an_error_with_a_hint() {
        // Where there is a GPU 99, or the libraries are all there, the message is another.
        let error = Gpu::new(99).expect_err("no GPU 99");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.hint_text().is_some(), "{error}");
    }
}
