//! The memory plan: which buffer each value and each gradient of a tape lives in.
//!
//! Time runs over forward steps 0..n and backward steps n..2n (node i runs backward at
//! 2n-1-i). A value lives from the step that writes it to its last reader; a gradient
//! from its first contribution to the backward step of the node that made the value.
//! Buffers whose lives do not overlap share a slot, the best-fitting free one. A value that its node
//! makes by updating an input, and that becomes that input, lies in the input's slot.

use super::tape::{Mode, Source, Tape};

/// Where the values and gradients of a tape live.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Slot of each value; None for parameters.
    pub(super) value: Vec<Option<usize>>,
    /// Slot of each gradient; None where none flows, and for parameters.
    pub(super) gradient: Vec<Option<usize>>,
    /// Gradients whose first contribution comes from the backward step 2n-1-i of node i.
    pub(super) first: Vec<Vec<usize>>,
    /// Size of each slot.
    pub(super) slots: Vec<usize>,
}

/// One buffer to place: alive from `birth` to `death`, both included.
struct Life {
    var: usize,
    is_gradient: bool,
    len: usize,
    birth: usize,
    death: usize,
}

const FOREVER: usize = usize::MAX;

impl Plan {
    /// `size` of value number i, in the unit that slots are to be measured in. What a node reads and
    /// writes forward stays for the `linger` nodes after it.
    pub(super) fn new(tape: &Tape, size: impl Fn(usize) -> usize, linger: usize) -> Plan {
        let mut lives = lives(tape, size, linger);
        lives.sort_by_key(|life| (life.birth, std::cmp::Reverse(life.len)));
        let mut plan = Plan {
            value: vec![None; tape.values.len()],
            gradient: vec![None; tape.values.len()],
            first: vec![Vec::new(); tape.nodes.len()],
            slots: Vec::new(),
        };
        let mut busy: Vec<(usize, usize)> = Vec::new(); // (death, slot)
        let mut free: Vec<usize> = Vec::new();
        for life in &lives {
            busy.retain(|&(death, slot)| {
                let alive = death >= life.birth;
                if !alive {
                    free.push(slot);
                }
                alive
            });
            let fits = |slot: usize, slots: &[usize]| slots[slot] >= life.len && slots[slot] <= 2 * life.len;
            let best = (0..free.len())
                .filter(|&i| fits(free[i], &plan.slots))
                .min_by_key(|&i| (plan.slots[free[i]], free[i]));
            let slot = match best {
                Some(i) => free.swap_remove(i),
                None => {
                    plan.slots.push(life.len);
                    plan.slots.len() - 1
                }
            };
            busy.push((life.death, slot));
            if life.is_gradient {
                plan.gradient[life.var] = Some(slot);
                let steps = 2 * tape.nodes.len();
                // Seeded gradients hold what the caller has set.
                if !tape.values[life.var].seeded && life.birth >= tape.nodes.len() {
                    plan.first[steps - 1 - life.birth].push(life.var);
                }
            } else {
                plan.value[life.var] = Some(slot);
            }
        }
        for var in 0..tape.values.len() {
            if let Some(input) = tape.updated(var) {
                plan.value[var] = plan.value[input.index()];
            }
        }
        plan
    }
}

fn lives(tape: &Tape, size: impl Fn(usize) -> usize, linger: usize) -> Vec<Life> {
    let n = tape.nodes.len();
    let backward = |node: usize| 2 * n - 1 - node;
    let train = tape.mode == Mode::Train;
    let mut death: Vec<usize> = vec![0; tape.values.len()];
    let mut first_gradient: Vec<Option<usize>> = vec![None; tape.values.len()];
    for (i, node) in tape.nodes.iter().enumerate() {
        let reads = node.operation.reads();
        let flows = train && node.outputs.iter().any(|v| tape.values[v.index()].gradient);
        for (slot, var) in node.inputs.iter().enumerate() {
            let Some(var) = var else { continue };
            let last = if flows && reads.input(slot) { backward(i) } else { i + linger };
            death[var.index()] = death[var.index()].max(last);
            if flows && tape.values[var.index()].gradient {
                // Nodes come in order, so the last one seen is the first to run backward.
                first_gradient[var.index()] = Some(backward(i));
            }
        }
        for (slot, var) in node.outputs.iter().enumerate() {
            let last = if flows && reads.output(slot) { backward(i) } else { i + linger };
            death[var.index()] = death[var.index()].max(last);
        }
    }
    let mut lives = Vec::new();
    for (var, value) in tape.values.iter().enumerate() {
        let birth = match value.source {
            Source::Parameter { .. } | Source::Nothing => continue,
            Source::Input => 0,
            Source::Node(_) if tape.updated(var).is_some() => continue,
            Source::Node(node) => node,
        };
        let forever = value.kept || value.source == Source::Input;
        let len = size(var);
        lives.push(Life {
            var,
            is_gradient: false,
            len,
            birth: if forever { 0 } else { birth },
            death: if forever { FOREVER } else { death[var] },
        });
        if !(train && value.gradient) {
            continue;
        }
        let birth = match (value.seeded, first_gradient[var]) {
            (true, _) => 0,
            (false, Some(first)) => first,
            (false, None) => continue,
        };
        let death = match value.source {
            Source::Node(node) if !value.seeded => backward(node),
            _ => FOREVER,
        };
        lives.push(Life { var, is_gradient: true, len, birth, death });
    }
    lives
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::linear;
    use crate::ops::norm::{Norm, NormKind, add_norm};
    use crate::ops::positions::positions;
    use crate::ops::window::window;

    /// A norm whose work is left to the product after it reads and writes while that product writes,
    /// the sum that nobody reads included.
    #[test]
    fn what_lingers_shares_no_slot_with_what_comes_next() {
        let mut tape = Tape::new(Mode::Evaluate);
        let x = tape.input([1, 1, 8]);
        let weight = tape.parameter(0, 0, [8, 8].into());
        let scale = tape.input([8]);
        let a = linear(&mut tape, x, weight, None).unwrap();
        let b = linear(&mut tape, x, weight, None).unwrap();
        let options = Norm { kind: NormKind::RootMeanSquare, groups: 1, eps: 1e-5, unit_offset: false };
        let (sum, rows) = add_norm(&mut tape, [a, b], scale, None, options).unwrap();
        let y = linear(&mut tape, rows, weight, None).unwrap();
        let shares = |linger: usize| {
            let plan = Plan::new(&tape, |value| tape.values[value].shape.len(), linger);
            let slot = |var: crate::engine::Var| plan.value[var.index()].unwrap();
            [a, b, sum].iter().any(|&var| slot(var) == slot(y))
        };
        assert!(shares(0) && !shares(2));
    }

    /// A cache that becomes its input lies in its place, but not where it is read later, is not fed back,
    /// or where backward reads the input.
    #[test]
    fn what_becomes_its_input_may_lie_in_its_place() {
        let shares = |mode: Mode, fed: bool, read_later: bool| {
            let mut tape = Tape::new(mode);
            let (x, cache) = (tape.input([1, 2, 3]), tape.input([1, 5, 3]));
            let places = positions(&mut tape, [1, 2], 5, None, None).unwrap();
            let after = window(&mut tape, 5, x, Some(cache), places).unwrap();
            if fed {
                tape.keep_as(after, cache);
            } else {
                tape.keep(after);
            }
            if read_later {
                window(&mut tape, 5, x, Some(cache), places).unwrap();
            }
            let plan = Plan::new(&tape, |value| tape.values[value].shape.len(), 0);
            plan.value[after.index()] == plan.value[cache.index()]
        };
        assert!(shares(Mode::Evaluate, true, false));
        assert!(!shares(Mode::Evaluate, true, true) && !shares(Mode::Evaluate, false, false));
        assert!(!shares(Mode::Train, true, false));
    }
}
