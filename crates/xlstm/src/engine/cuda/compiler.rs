//! CUDA C++ to machine code by NVRTC, with a cache on disk.
//!
//! Kernels are compiled for the real architecture of the card, never to PTX: a driver older
//! than the compiler rejects new PTX. A compilation takes a tenth of a second, a cached one
//! nothing, so that each file of kernels is one program.

use std::ffi::{CStr, CString, OsString};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};

use super::Precision;
use crate::error::{Error, ErrorKind, Result};

/// What every kernel file starts with.
const PRELUDE: &str = include_str!("element.cuh");

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name, of its own.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Source {
    /// A file of kernels.
    pub const fn new(name: &'static str, text: &'static str) -> Source {
        Source { name, text }
    }
}

/// The definitions that a file of kernels is compiled with.
fn defines(precision: Precision) -> Option<&'static str> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some("-DELEMENT_BF16"),
    }
}

/// Opens the NVRTC that `XLSTM_NVRTC` names (a file, or a folder with libnvrtc in it), so that
/// it is the one found later.
pub(super) fn preload() {
    let Some(path) = std::env::var_os("XLSTM_NVRTC").map(PathBuf::from) else { return };
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    let files: Vec<PathBuf> =
        if path.is_dir() { names.iter().map(|n| path.join(n)).collect() } else { vec![path] };
    for file in files.into_iter().filter(|f| f.exists()) {
        #[cfg(unix)]
        {
            use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
            // SAFETY: NVRTC's initialisers have no effect on us; it stays loaded for good.
            if let Ok(library) = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(library);
                return;
            }
        }
        #[cfg(not(unix))]
        let _ = file;
    }
}

/// Whether NVRTC can be used.
pub fn is_available() -> bool {
    preload();
    // SAFETY: this only tries to open the library.
    unsafe { sys::is_culib_present() }
}

/// NVRTC's version.
fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the callers have found the library.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(|e| Error::new(ErrorKind::Device, format!("cannot ask NVRTC for its version: {e}")))?;
    Ok((major, minor))
}

/// Machine code for `architecture`, from the cache or compiled.
pub(super) fn cubin(source: &Source, precision: Precision, architecture: &str) -> Result<Vec<u8>> {
    let file = cache_folder().map(|folder| {
        let defines = defines(precision).unwrap_or_default();
        let key = fingerprint(&[PRELUDE, source.text, defines, &format!("{:?}", version())]);
        folder.join(format!("{}-{architecture}-{key:016x}.cubin", source.name))
    });
    if let Some(found) = file.as_ref().and_then(|file| std::fs::read(file).ok())
        && found.starts_with(b"\x7fELF")
    {
        return Ok(found);
    }
    let (code, _) = compile(source, precision, architecture)?;
    if let Some(file) = file {
        // A cache that cannot be written costs time, nothing else.
        let _ = write_whole(&file, &code);
    }
    Ok(code)
}

/// Written beside and renamed: another process sees all of it or nothing.
fn write_whole(file: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let beside = file.with_extension(format!("{}.partial", std::process::id()));
    std::fs::write(&beside, bytes)?;
    std::fs::rename(&beside, file)
}

fn cache_folder() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).filter(|v: &OsString| !v.is_empty()).map(PathBuf::from);
    let base = given("XDG_CACHE_HOME").or_else(|| given("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("xlstm").join("kernels"))
}

/// FNV-1a: stable between versions of the standard library, which its own hasher is not.
fn fingerprint(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Compiles; returns the machine code and the assembler's report on registers and spills.
///
/// # Errors
/// When there is no NVRTC, or the source does not compile.
pub fn compile(source: &Source, precision: Precision, architecture: &str) -> Result<(Vec<u8>, String)> {
    if !is_available() {
        return Err(Error::new(ErrorKind::Device, "the kernel compiler NVRTC (libnvrtc) is not found")
            .hint("install CUDA 13, or point XLSTM_NVRTC to the folder that holds it"));
    }
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Device, format!("NVRTC cannot {what} {} for {architecture}: {e}", source.name))
    };
    let text = CString::new(format!("{PRELUDE}#line 1 \"{}\"\n{}", source.name, source.text))
        .map_err(|e| failed("read", &e))?;
    let program = Program(result::create_program(&text, None).map_err(|e| failed("open", &e))?);
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        String::from("--std=c++17"),
        String::from("--ptxas-options=-v"),
    ];
    options.extend(defines(precision).map(str::to_owned));
    // SAFETY: the program is alive until dropped; the buffers have the sizes that NVRTC names.
    unsafe {
        let compiled = result::compile_program(program.0, &options);
        let log = result::get_program_log(program.0).map_err(|e| failed("report on", &e))?;
        let log = CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned();
        compiled.map_err(|e| failed("compile", &format!("{e}\n{log}")))?;
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program.0, &raw mut size).result().map_err(|e| failed("measure", &e))?;
        let mut code = vec![0u8; size];
        sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()).result().map_err(|e| failed("link", &e))?;
        Ok((code, log))
    }
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by create_program, destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rayon::prelude::*;

    use super::*;

    /// Every .cu and .cuh file below `folder`, in order.
    fn kernel_files(folder: &Path, found: &mut Vec<PathBuf>) {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        entries.sort();
        for entry in entries {
            if entry.is_dir() {
                kernel_files(&entry, found);
            } else if entry.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
                found.push(entry);
            }
        }
    }

    /// Needs no GPU. Without NVRTC it says so and passes, but not under CI, which brings one.
    #[test]
    fn every_kernel_compiles_without_spills() {
        if !is_available() {
            assert!(std::env::var_os("CI").is_none(), "CI must point XLSTM_NVRTC to an NVRTC");
            eprintln!("no NVRTC found (XLSTM_NVRTC): the kernels have not been compiled");
            return;
        }
        let mut files = Vec::new();
        kernel_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        assert!(files.len() > 10, "{files:?}");
        let mut tasks = Vec::new();
        let is_header = |file: &&PathBuf| file.extension().is_some_and(|extension| extension == "cuh");
        let read = |file: &PathBuf| std::fs::read_to_string(file).expect("a kernel file");
        for file in files.iter().filter(|file| !is_header(file)) {
            // A folder's headers stand before each of its files; the prelude is everywhere.
            let headers = files.iter().filter(is_header).filter(|header| header.parent() == file.parent());
            let headers: String = headers.map(read).filter(|header| header != PRELUDE).collect();
            let name = file.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned().leak();
            let text = (headers + &read(file)).leak();
            for architecture in ["sm_80", "sm_90a", "sm_100"] {
                for precision in [Precision::F32, Precision::Bf16] {
                    tasks.push((Source::new(name, text), precision, architecture));
                }
            }
        }
        let reports: Vec<Vec<Usage>> = tasks
            .par_iter()
            .map(|(source, precision, architecture)| {
                let (code, log) = compile(source, *precision, architecture).unwrap_or_else(|e| panic!("{e}"));
                assert!(code.starts_with(b"\x7fELF"));
                usages(&log)
            })
            .collect();
        println!("{:<44} {:<7} {:<5} registers  shared  spilled", "kernel", "", "");
        let mut spilled = 0;
        for ((source, precision, architecture), usages) in tasks.iter().zip(&reports) {
            // Some files are for bf16 alone, and some of those for Hopper.
            let is_empty = usages.is_empty() && (*precision, *architecture) == (Precision::Bf16, "sm_90a");
            assert!(!is_empty, "no kernel of {} was reported", source.name);
            for usage in usages {
                let kernel = format!("{} {}", source.name, usage.kernel);
                let Usage { registers, shared, spilled: bytes, .. } = usage;
                println!(
                    "{kernel:<44} {architecture:<7} {precision:<5?} {registers:>9} {shared:>7} {bytes:>8}"
                );
                spilled += bytes;
            }
        }
        assert_eq!(spilled, 0, "bytes spilled, see the table");
    }

    /// What a kernel takes: registers a thread, bytes of static shared memory a block, bytes
    /// spilled a thread.
    #[derive(Debug)]
    struct Usage {
        kernel: String,
        registers: usize,
        shared: usize,
        spilled: usize,
    }

    /// The assembler's report: of each kernel a line with its name, one with its spills and one
    /// with the rest.
    fn usages(log: &str) -> Vec<Usage> {
        let before = |line: &str, what: &str| -> usize {
            let end = line.find(what).map_or(0, |end| line[..end].trim_end().len());
            let digits = line[..end].bytes().rev().take_while(u8::is_ascii_digit).count();
            line[end - digits..end].parse().unwrap_or(0)
        };
        let mut found: Vec<Usage> = Vec::new();
        for line in log.lines() {
            if let Some(name) = line.split("Compiling entry function '").nth(1) {
                let kernel = name.split('\'').next().unwrap_or_default().to_owned();
                found.push(Usage { kernel, registers: 0, shared: 0, spilled: 0 });
            }
            // Functions that are not inlined are reported, too, and spill for their kernel.
            let Some(usage) = found.last_mut() else { continue };
            usage.spilled += before(line, "bytes spill stores") + before(line, "bytes spill loads");
            usage.registers = usage.registers.max(before(line, "registers"));
            usage.shared = usage.shared.max(before(line, "bytes smem"));
        }
        found
    }

    #[test]
    fn errors_name_the_source_and_the_line() {
        if !is_available() {
            return;
        }
        let source = Source::new("broken", "extern \"C\" __global__ void f() { nonsense; }");
        let error = compile(&source, Precision::F32, "sm_80").expect_err("nonsense").to_string();
        assert!(error.contains("broken") && error.contains("nonsense"), "{error}");
    }
}
