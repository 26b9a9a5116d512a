//! Where the time of a replay goes.

/// Milliseconds of one kind of operation in a replay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OperationTime {
    /// The operation's name.
    pub name: &'static str,
    /// How many nodes of it there are.
    pub nodes: usize,
    /// Forward.
    pub forward: f64,
    /// Backward.
    pub backward: f64,
}

/// Sums milliseconds by operation.
#[derive(Debug, Default)]
pub(super) struct Profile(Vec<OperationTime>);

impl Profile {
    /// Adds a node's time.
    pub(super) fn add(&mut self, name: &'static str, is_forward: bool, milliseconds: f64) {
        let place = self.0.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.0.push(OperationTime { name, nodes: 0, forward: 0.0, backward: 0.0 });
            self.0.len() - 1
        });
        let row = &mut self.0[place];
        if is_forward {
            row.nodes += 1;
            row.forward += milliseconds;
        } else {
            row.backward += milliseconds;
        }
    }

    /// The operations, the most expensive first.
    pub(super) fn finish(mut self) -> Vec<OperationTime> {
        self.0.sort_by(|a, b| (b.forward + b.backward).total_cmp(&(a.forward + a.backward)));
        self.0
    }
}
