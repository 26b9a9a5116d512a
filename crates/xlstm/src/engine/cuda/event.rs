//! Marks in the stream of work, between which the GPU tells the time.

use cudarc::driver::result::{event, stream};
use cudarc::driver::sys;

use super::context::{Gpu, driver};
use crate::error::Result;

/// A mark.
pub(crate) struct Event(sys::CUevent);

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// A mark that has not been set.
    pub(crate) fn new() -> Result<Event> {
        let made = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Event(made.map_err(|e| driver("make an event", e))?))
    }

    /// Sets it behind all work queued so far.
    pub(crate) fn record(&self, gpu: &Gpu) -> Result<()> {
        self.record_on(gpu.raw_stream())
    }

    /// Sets it behind all work queued so far on a stream of its own context.
    pub(super) fn record_on(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: the event and the stream are alive.
        unsafe { event::record(self.0, stream) }.map_err(|e| driver("set an event", e))
    }

    /// Lets what is queued on a stream from now on wait for the event.
    pub(super) fn hold(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event and the stream are alive.
        unsafe { stream::wait_event(stream, self.0, flags) }.map_err(|e| driver("wait for an event", e))
    }

    /// Milliseconds from `earlier` to here; both have been set, and the work before them is done.
    pub(crate) fn since(&self, earlier: &Event) -> Result<f32> {
        // SAFETY: both events are alive.
        unsafe { event::elapsed(earlier.0, self.0) }.map_err(|e| driver("read the time", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// Milliseconds that the GPU spends on what `work` queues.
pub(crate) fn milliseconds(gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<f32> {
    let (start, end) = (Event::new()?, Event::new()?);
    start.record(gpu)?;
    work()?;
    end.record(gpu)?;
    gpu.synchronize()?;
    end.since(&start)
}
