//! Checks every operation and cell on a GPU in f32 and bf16 against the processor in f64, on
//! random inputs and poisoned buffers, and against itself: the same bits twice; so, too, steps of the
//! optimizer; and that what the search of product algorithms finds can be saved. `gpu_check [ordinal [name]]`: of
//! recordings only those whose names hold `name`.

mod attention;
mod case;
mod cells;
mod generation;
mod operations;
mod optimizer;
mod table;

use xlstm::engine::Precision;
use xlstm::engine::cuda::Gpu;
use xlstm::ops::linear::linear;

use case::{Case, Record};
use table::Table;

/// What can fail.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What the search of algorithms finds can be saved, and gives the same bits again.
fn search(table: &mut Table<'_>, ordinal: usize) -> Outcome<()> {
    let case = Case::default().input(&[2, 512, 256]).weight(&[384, 256]).rounded(table.precision);
    let record: Record<'_> = &|t, v, _| Ok(vec![linear(t, v[0], v[1], None)?]);
    let [found, again] = [Gpu::new(ordinal)?, Gpu::new(ordinal)?];
    found.search(true);
    let first = case.gpu(record, table.precision, &found)?;
    let text = found.export_algorithms()?;
    let refused = again.import_algorithms(&text.replace(found.name(), "another card"))?.is_none();
    let taken = again.import_algorithms(&text)?.is_none();
    let second = case.gpu(record, table.precision, &again)?;
    let same = taken && first == second && again.export_algorithms()? == text;
    table.row("algorithms saved: same bits", f64::from(u8::from(!same)), 0.0, "");
    table.row("algorithms of another card", f64::from(u8::from(refused)), 0.0, "are not taken");
    Ok(())
}

fn main() -> Outcome<()> {
    let ordinal = std::env::args().nth(1).map_or(Ok(0), |x| x.parse())?;
    let only = std::env::args().nth(2).unwrap_or_default();
    let gpu = Gpu::new(ordinal)?;
    println!("{} ({}, {} multiprocessors)", gpu.name(), gpu.architecture(), gpu.multiprocessors()?);
    println!("{:<38} {:<5} {:>9} {:>9}", "what", "", "error", "bound");
    let mut table = Table { gpu: &gpu, precision: Precision::F32, only, failures: 0 };
    for precision in [Precision::F32, Precision::Bf16] {
        table.precision = precision;
        operations::check(&mut table);
        attention::check(&mut table);
        cells::check(&mut table);
        if table.only.is_empty() {
            generation::check(&mut table);
            optimizer::check(&mut table);
            search(&mut table, ordinal)?;
        }
    }
    println!("{} failures", table.failures);
    if table.failures > 0 { Err("the GPU and the truth differ".into()) } else { Ok(()) }
}
