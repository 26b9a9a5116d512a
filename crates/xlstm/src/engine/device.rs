//! Where tensors live and work runs.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::bf16_products::has_bf16_products;
#[cfg(feature = "cuda")]
use super::cuda::Gpu;
use super::precision::Precision;
use crate::error::{Error, Result};

/// A wish for a device: `auto`, `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first GPU where one can be used, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// GPU number N.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == "cpu" => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.parse::<usize>().is_ok() => {
                Ok(DeviceChoice::Cuda(ordinal.parse().unwrap_or_default()))
            }
            _ => Err(Error::config(format!("{text:?} is no device: there are auto, cpu and cuda:N"))
                .hint("for instance cuda:0")),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<DeviceChoice> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> String {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device: the value that decides where buffers live and kernels run.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor: a pool of threads, and what operands of products with weights are rounded to.
    Cpu(Arc<rayon::ThreadPool>, Precision),
    /// A GPU, with what activations are stored in on it.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Gpu>, Precision),
}

impl Device {
    /// The processor, with `threads` threads (0: as many as the machine has), in full precision.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn cpu(threads: usize) -> Result<Device> {
        Device::cpu_in(threads, Precision::F32)
    }

    /// The same, with operands of products rounded to `precision`.
    ///
    /// # Errors
    /// As [`cpu`](Device::cpu).
    pub fn cpu_in(threads: usize, precision: Precision) -> Result<Device> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
            Error::config(format!("cannot start {threads} threads: {e}")).hint("use fewer with --threads")
        })?;
        Ok(Device::Cpu(Arc::new(pool), precision))
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// When it cannot be used: see [`Gpu::new`].
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize, precision: Precision) -> Result<Device> {
        Ok(Device::Cuda(Gpu::new(ordinal)?, precision))
    }

    /// GPU number `ordinal`: this build knows none.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_ordinal: usize, _precision: Precision) -> Result<Device> {
        Err(Error::new(crate::error::ErrorKind::Device, "this build has no support for GPUs")
            .hint("build with --features cuda, or use --device cpu"))
    }

    /// The device that is wished for, and a line that says which it is and why. Without a
    /// `precision` that is bf16 on a GPU and f32 on the processor.
    ///
    /// # Errors
    /// When a device that is asked for by name cannot be used.
    pub fn choose(
        choice: DeviceChoice,
        precision: Option<Precision>,
        threads: usize,
    ) -> Result<(Device, String)> {
        let on_gpu = precision.unwrap_or(Precision::Bf16);
        let cpu = || Device::cpu_in(threads, precision.unwrap_or(Precision::F32));
        let (device, mut why) = match choice {
            DeviceChoice::Cuda(ordinal) => (Device::cuda(ordinal, on_gpu)?, String::new()),
            DeviceChoice::Cpu => (cpu()?, String::new()),
            DeviceChoice::Auto => match Device::cuda(0, on_gpu) {
                Ok(device) => (device, String::new()),
                Err(error) => (cpu()?, format!(" ({error})")),
            },
        };
        if matches!(device, Device::Cpu(_, Precision::Bf16)) && !has_bf16_products() {
            why += " (this processor multiplies bf16 no faster than f32)";
        }
        let line = format!("device: {device}{why}");
        Ok((device, line))
    }

    /// The device by name.
    pub fn choice(&self) -> DeviceChoice {
        match self {
            Device::Cpu(..) => DeviceChoice::Cpu,
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu, _) => DeviceChoice::Cuda(gpu.ordinal()),
        }
    }

    /// What activations are stored in on a GPU, and operands of products are rounded to on the
    /// processor.
    pub fn precision(&self) -> Precision {
        match self {
            Device::Cpu(_, precision) => *precision,
            #[cfg(feature = "cuda")]
            Device::Cuda(_, precision) => *precision,
        }
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        match self {
            Device::Cpu(pool, _) => pool.current_num_threads(),
            #[cfg(feature = "cuda")]
            Device::Cuda(..) => rayon::current_num_threads(),
        }
    }

    /// Runs `work` where the device's work is done: inside the processor's pool. Entering
    /// costs about 20 µs, so a whole step goes in at once; a call from inside is free.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Device::Cpu(pool, _) => pool.install(work),
            #[cfg(feature = "cuda")]
            Device::Cuda(..) => work(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(_, precision) => match self.threads() {
                1 => write!(f, "cpu, 1 thread, {}", precision.name()),
                threads => write!(f, "cpu, {threads} threads, {}", precision.name()),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu, precision) => {
                write!(f, "cuda:{}, {}, {}", gpu.ordinal(), gpu.name(), precision.name())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_words() {
        for (text, choice) in
            [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda:3", DeviceChoice::Cuda(3))]
        {
            assert_eq!(text.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn the_processor_is_always_there() {
        let (device, line) = Device::choose(DeviceChoice::Cpu, None, 1).unwrap();
        assert_eq!(device.threads(), 1);
        assert_eq!(line, "device: cpu, 1 thread, f32");
        let (device, line) = Device::choose(DeviceChoice::Cpu, Some(Precision::Bf16), 1).unwrap();
        assert_eq!(device.precision(), Precision::Bf16);
        assert!(line.starts_with("device: cpu, 1 thread, bf16"), "{line}");
    }
}
