//! Where tensors live and work runs. A CPU device is a pool of threads.

use std::sync::Arc;

use crate::error::{Error, Result};

/// A device: the value that decides where buffers live and kernels run.
#[derive(Clone, Debug)]
pub struct Device {
    pool: Arc<rayon::ThreadPool>,
}

impl Device {
    /// The processor, with `threads` threads (0: as many as the machine has).
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn cpu(threads: usize) -> Result<Device> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
            Error::config(format!("cannot start {threads} threads: {e}")).hint("use fewer with --threads")
        })?;
        Ok(Device { pool: Arc::new(pool) })
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` inside the pool. Entering costs about 20 µs, so a whole step goes in at
    /// once; a call from inside is free.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}
