//! Replaying a recorded step keeps no new memory: buffers are planned once.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use std::sync::Arc;

use xlstm::engine::Device;
use xlstm::model::objective::Carry;
use xlstm::model::{Logits, Runner};
use xlstm::nn::{Parameters, Weights};

use crate::threads::{Run, batch, model};

/// The system's allocator, with the balance of every thread: bytes taken less bytes given back.
struct Counting;

thread_local! {
    static BALANCE: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    BALANCE.with(|total| total.set(total.get() + bytes));
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting touches a
// thread-local number that needs neither memory nor a destructor. A size fits an isize.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise; the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise; the pointer came from `System`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_taken_again_keeps_no_new_memory() {
    let model = model();
    let batch = batch(1, model.config().vocab_size);
    // With one thread all the work is on that thread, and so is the count.
    let device = Device::cpu(1).expect("a thread");
    let mut run = Run::new(&model, Carry::Marked, 1, &device);
    let mut balance = || {
        (0..4).for_each(|_| _ = run.step(&batch));
        device.install(|| BALANCE.get())
    };
    let before = balance();
    let kept = balance() - before;
    // A queue of tasks may double once; a buffer of the step would show.
    assert!(kept < 16 << 10, "{kept} bytes more after four steps");
}

/// A state that is carried on takes its place again and again, in training and in reading.
#[test]
fn a_stream_of_any_length_takes_the_memory_of_a_batch() {
    let model = model();
    let device = Device::cpu(1).expect("a thread");
    let mut run = Run::new(&model, Carry::Carried, 1, &device);
    let weights = Weights::new(Arc::new(Parameters::initialize(model.specs(), 1)), &device).expect("weights");
    let mut runner = Runner::<f32>::new(model.clone(), weights, device.clone());
    let mut balance = |length: u64| {
        for step in 0..length {
            run.step(&batch(step, model.config().vocab_size));
            runner.read(&[step as u32], Logits::Last).expect("logits");
        }
        device.install(|| BALANCE.get()) + BALANCE.get()
    };
    let before = balance(3);
    let kept = balance(12) - before;
    assert!(kept < 16 << 10, "{kept} bytes more after twelve batches");
}
