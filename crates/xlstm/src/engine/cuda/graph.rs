//! Work that is queued again and again, as a CUDA graph.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::context::{Gpu, driver};
use crate::error::Result;

/// Work with fixed addresses. It is launched kernel by kernel the first time, which compiles
/// kernels and sizes work space; captured the second time; and replayed from then on.
#[derive(Default)]
pub(crate) struct Graph {
    graph: Option<CudaGraph>,
    warm: bool,
}

// SAFETY: a graph may be launched from any thread, by one at a time.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph(captured: {})", self.graph.is_some())
    }
}

impl Graph {
    /// Queues what `work` queues, which must be the same every time.
    ///
    /// # Errors
    /// Those of `work`, and when the GPU refuses the capture or the replay.
    pub(crate) fn run(&mut self, gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<()> {
        gpu.enter()?;
        let replay = |graph: &CudaGraph| graph.launch().map_err(|e| driver("replay a graph", e));
        if let Some(graph) = &self.graph {
            return replay(graph);
        }
        if !self.warm {
            work()?;
            self.warm = true;
            return Ok(());
        }
        let stream = gpu.stream();
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|e| driver("begin a capture", e))?;
        let queued = work();
        // SAFETY: 0 stands for no flags; the enumeration has no name for that.
        let flags = unsafe { std::mem::transmute::<u32, CUgraphInstantiate_flags>(0) };
        let captured = stream.end_capture(flags);
        queued?;
        self.graph = captured.map_err(|e| driver("instantiate a graph", e))?;
        self.graph.as_ref().map_or(Ok(()), replay)
    }
}
