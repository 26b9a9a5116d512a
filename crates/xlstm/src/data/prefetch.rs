//! Batches that are ready before they are asked for.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::batch::Batch;
use super::stages::Stages;
use crate::{Error, ErrorKind, Result};

/// Fills batches in a thread of its own, in order, so that a trainer waits for neither the disk
/// nor the copying. What a batch holds does not depend on it: batches are functions of their index.
#[derive(Debug)]
pub struct Prefetch {
    /// Empties for the thread to fill; None once it is to end.
    empty: Option<Sender<Batch>>,
    full: Option<Receiver<Batch>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    /// The batches of `batches` from `first` on, `ahead` of them at most ready or in work.
    ///
    /// # Errors
    /// A system that gives no thread.
    pub fn new(batches: Stages, first: u64, ahead: usize) -> Result<Prefetch> {
        let (empty, empties) = channel();
        let (sender, full) = sync_channel(ahead.max(1));
        let thread = thread::Builder::new()
            .name("batches".into())
            .spawn(move || fill(&batches, first, &empties, &sender))
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot start a thread for batches: {e}")))?;
        let prefetch = Prefetch { empty: Some(empty), full: Some(full), thread: Some(thread) };
        (0..ahead.max(1)).for_each(|_| prefetch.hand_back(Batch::default()));
        Ok(prefetch)
    }

    fn hand_back(&self, batch: Batch) {
        // A thread that has ended needs none.
        let _ = self.empty.as_ref().map(|empty| empty.send(batch));
    }

    /// Exchanges `batch`, whose allocations are used again, for the next one.
    ///
    /// # Errors
    /// A thread that has died, which only damaged data does.
    pub fn next(&mut self, batch: &mut Batch) -> Result<()> {
        let received = self.full.as_ref().and_then(|full| full.recv().ok());
        let next = received.ok_or_else(|| Error::data("the thread that reads the data has died"))?;
        self.hand_back(std::mem::replace(batch, next));
        Ok(())
    }
}

fn fill(batches: &Stages, first: u64, empties: &Receiver<Batch>, full: &SyncSender<Batch>) {
    for (index, mut batch) in (first..).zip(empties) {
        batches.fill(index, &mut batch);
        if full.send(batch).is_err() {
            return;
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        (self.empty, self.full) = (None, None);
        // It has nothing left to wait for.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Batching, Corpus, Stage};
    use super::*;

    #[test]
    fn batches_come_in_order_from_anywhere() {
        let ids: Vec<u32> = (0..1000).collect();
        let corpus = Arc::new(Corpus::from_tokens(&ids, &[0, 300], 1, 1).unwrap());
        let stages =
            [Stage { first: 0, batch_size: 2, length: 8 }, Stage { first: 5, batch_size: 1, length: 16 }];
        let batches = Stages::new(&corpus, Batching::Windows, &stages, 3).unwrap();
        for first in [0, 4, 70] {
            let mut prefetch = Prefetch::new(batches.clone(), first, 3).unwrap();
            let (mut batch, mut expected) = (Batch::default(), Batch::default());
            for index in first..first + 10 {
                prefetch.next(&mut batch).unwrap();
                batches.fill(index, &mut expected);
                assert_eq!(batch, expected);
            }
        }
    }
}
