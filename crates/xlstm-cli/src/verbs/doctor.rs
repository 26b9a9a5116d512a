//! `xlstm doctor`: what this machine and this build can do.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::Args;
use xlstm::Result;

use crate::output;

/// Show what this machine and this build can do; part of every good bug report.
#[derive(Debug, Args)]
pub struct DoctorArgs {}

/// Runs the verb.
///
/// # Errors
/// An input/output error of stdout.
pub fn run(_args: &DoctorArgs) -> Result<()> {
    let mut report = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(report, "{name:<16}{value}");
    };
    line("xlstm", env!("CARGO_PKG_VERSION"));
    line("build", if cfg!(debug_assertions) { "debug: slow, use --release" } else { "release" });
    line("system", &system());
    line("processor", &processor().unwrap_or_else(|| std::env::consts::ARCH.into()));
    line("features", &cpu_features());
    line("threads", &threads());
    line("memory", &memory(Path::new("/proc/meminfo")));
    line("cargo features", if cfg!(feature = "cuda") { "cuda" } else { "none (cuda is optional)" });
    #[cfg(feature = "cuda")]
    line("gpu", &gpu());
    line("current folder", &current_folder());
    output::data(&report)
}

/// The first GPU, or why there is none.
#[cfg(feature = "cuda")]
fn gpu() -> String {
    match xlstm::engine::cuda::Gpu::new(0) {
        Ok(gpu) => format!("{}, {}", gpu.name(), gpu.architecture()),
        Err(error) => format!("{error} ({})", error.hint_text().unwrap_or("no hint")),
    }
}

/// The operating system's name, version and architecture.
fn system() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map_or(std::env::consts::OS, |name| name.trim_matches('"'));
    format!("{name}, {} {}", std::env::consts::OS, std::env::consts::ARCH)
}

fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The instruction sets that kernels can choose from, each with whether this processor has it.
fn cpu_features() -> String {
    let (mut present, mut absent) = (Vec::new(), Vec::new());
    for (name, here) in instruction_sets() {
        if here { present.push(name) } else { absent.push(name) }
    }
    let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    if absent.is_empty() { list(present) } else { format!("{} (not: {})", list(present), list(absent)) }
}

#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avxvnni", is_x86_feature_detected!("avxvnni")),
    ]
}

#[cfg(target_arch = "aarch64")]
fn instruction_sets() -> Vec<(&'static str, bool)> {
    use std::arch::is_aarch64_feature_detected;
    vec![
        ("neon", is_aarch64_feature_detected!("neon")),
        ("bf16", is_aarch64_feature_detected!("bf16")),
        ("i8mm", is_aarch64_feature_detected!("i8mm")),
    ]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn instruction_sets() -> Vec<(&'static str, bool)> {
    Vec::new()
}

fn threads() -> String {
    match std::thread::available_parallelism() {
        Ok(count) => count.to_string(),
        Err(error) => format!("unknown ({error}); 1 is used"),
    }
}

/// Total and available memory from a file in the format of Linux's `/proc/meminfo`.
fn memory(meminfo: &Path) -> String {
    let text = fs::read_to_string(meminfo).unwrap_or_default();
    let gibibytes = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(kibibytes / f64::from(1 << 20))
    };
    match (gibibytes("MemTotal"), gibibytes("MemAvailable")) {
        (Some(total), Some(available)) => format!("{total:.1} GiB, {available:.1} GiB available"),
        (Some(total), None) => format!("{total:.1} GiB"),
        _ => "unknown on this system".into(),
    }
}

/// The current folder and whether runs can be written to it, found out by writing.
fn current_folder() -> String {
    let folder = match std::env::current_dir() {
        Ok(folder) => folder,
        Err(error) => return format!("unknown ({error})"),
    };
    let probe = folder.join(format!(".xlstm-doctor-{}", std::process::id()));
    let writable = match fs::File::create_new(&probe) {
        Ok(_) => "writable".to_owned(),
        Err(error) => format!("not writable ({error}); train with --out DIR"),
    };
    let _ = fs::remove_file(&probe);
    format!("{}, {writable}", folder.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_where_there_is_a_meminfo() {
        assert_eq!(memory(Path::new("/no/such/file")), "unknown on this system");
        let file = std::env::temp_dir().join(format!("xlstm-meminfo-{}", std::process::id()));
        fs::write(&file, "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:    4194304 kB\n")
            .unwrap();
        assert_eq!(memory(&file), "8.0 GiB, 4.0 GiB available");
        fs::remove_file(file).unwrap();
    }

    #[test]
    fn probing_leaves_nothing_behind() {
        let count = || fs::read_dir(".").unwrap().count();
        let before = count();
        assert!(current_folder().contains("writable"));
        assert_eq!(count(), before);
    }
}
