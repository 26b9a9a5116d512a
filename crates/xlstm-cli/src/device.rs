//! The flags that say where a verb runs.

use clap::Args;
use xlstm::Result;
use xlstm::engine::{Device, DeviceChoice, Precision};

use crate::output;

/// Where to run, and in which number format.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// auto (a GPU where one can be used), cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// f32 or bf16 (default: bf16 on a GPU, f32 on the processor)
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Precision>,
    /// CPU threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

impl DeviceArgs {
    /// The device, after a line on stderr that says which it is and why.
    ///
    /// # Errors
    /// When a device that is asked for by name cannot be used.
    pub fn choose(&self) -> Result<Device> {
        let (device, line) = Device::choose(self.device, self.dtype, self.threads)?;
        output::note(&line);
        Ok(device)
    }
}
