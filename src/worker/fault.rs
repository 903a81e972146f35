//! Faults that tests ask for. Not part of a release build: only with `debug_assertions` or the feature `fault-injection`.
//!
//! The variable [`FAULTS`] of the worker's process holds them, separated by `;`:
//!
//! ```text
//! kind [=value] [@model/index] [#incarnation]
//!
//! exit-at-step=N:STATUS   panic-at-step=N     hang-at-step=N      device-lost-at-step=N
//! oom-at-step=N (once)    oom-from-step=N     slow-step=MS        oom-at-load
//! trap-at-step=N (a kernel that traps, on a GPU)
//! never-ready             never-greet         other-device        protocol=N
//! slow-load=MS (before each report of the load's progress)
//! ```
//!
//! Steps count from 1. `exit-at-step=3:1@basho/0#1` ends the first worker of `basho/0` in its third step with status 1.

use crate::backend::{BackendError, Batch, MemoryUse, SampleRow, Sampled};
use crate::engine::{StepCapacity, StepModel};
use crossbeam_channel::{after, never};
use playhouse_actors::messages::WorkerSpec;
use std::time::Duration;

/// The environment variable.
pub(crate) const FAULTS: &str = "PLAYHOUSE_FAULTS";

/// What goes wrong, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    ExitAtStep { step: u64, status: i32 },
    PanicAtStep(u64),
    HangAtStep(u64),
    DeviceLostAtStep(u64),
    TrapAtStep(u64),
    OomAtStep(u64),
    OomFromStep(u64),
    SlowStep(Duration),
    SlowLoad(Duration),
    OomAtLoad,
    NeverReady,
    NeverGreet,
    OtherDevice,
    Protocol(u32),
}

/// The faults of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Faults(Vec<Fault>);

impl Faults {
    /// What the environment has for this worker.
    ///
    /// # Panics
    /// If it cannot be read: a test that misspells a fault must fail.
    pub(crate) fn of(spec: &WorkerSpec) -> Self {
        let text = std::env::var(FAULTS).unwrap_or_default();
        Self::parse(&text, &spec.replica.to_string(), spec.incarnation)
    }

    fn parse(text: &str, replica: &str, incarnation: u64) -> Self {
        let items = text.split(';').map(str::trim).filter(|item| !item.is_empty());
        Self(items.filter_map(|item| fault(item, replica, incarnation)).collect())
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.0.contains(&fault)
    }

    /// The protocol that is claimed instead of ours.
    pub(crate) fn protocol(&self) -> Option<u32> {
        self.0.iter().find_map(|fault| if let Fault::Protocol(protocol) = fault { Some(*protocol) } else { None })
    }

    /// Lets time pass if the load is to be slow.
    pub(crate) fn slow_load(&self) {
        for fault in &self.0 {
            if let Fault::SlowLoad(time) = *fault {
                // The message is the passing of time.
                let _ = after(time).recv();
            }
        }
    }

    /// `model` with its steps going wrong.
    pub(crate) fn wrap(self, model: Box<dyn StepModel>) -> Box<dyn StepModel> {
        if self.0.is_empty() { model } else { Box::new(Faulty { model, faults: self.0, steps: 0, is_struck: false }) }
    }
}

/// One item, if it is meant for this worker.
fn fault(item: &str, replica: &str, incarnation: u64) -> Option<Fault> {
    let (item, only_incarnation) = split(item, '#');
    let (item, only_replica) = split(item, '@');
    let (kind, value) = split(item, '=');
    let number = |text: Option<&str>| -> u64 {
        let text = text.unwrap_or_else(|| panic!("{FAULTS}: `{item}` lacks a number"));
        text.parse().unwrap_or_else(|_| panic!("{FAULTS}: `{text}` in `{item}` is no number"))
    };
    let fault = match kind {
        "exit-at-step" => {
            let (step, status) = split(value.unwrap_or_default(), ':');
            let status = i32::try_from(number(status)).expect("a status is small");
            Fault::ExitAtStep { step: number(Some(step)), status }
        }
        "panic-at-step" => Fault::PanicAtStep(number(value)),
        "hang-at-step" => Fault::HangAtStep(number(value)),
        "device-lost-at-step" => Fault::DeviceLostAtStep(number(value)),
        "trap-at-step" => Fault::TrapAtStep(number(value)),
        "oom-at-step" => Fault::OomAtStep(number(value)),
        "oom-from-step" => Fault::OomFromStep(number(value)),
        "slow-step" => Fault::SlowStep(Duration::from_millis(number(value))),
        "slow-load" => Fault::SlowLoad(Duration::from_millis(number(value))),
        "oom-at-load" => Fault::OomAtLoad,
        "never-ready" => Fault::NeverReady,
        "never-greet" => Fault::NeverGreet,
        "other-device" => Fault::OtherDevice,
        "protocol" => Fault::Protocol(u32::try_from(number(value)).expect("a protocol is a small number")),
        _ => panic!("{FAULTS}: there is no fault `{kind}`"),
    };
    let ours = only_replica.is_none_or(|only| only == replica)
        && only_incarnation.is_none_or(|only| number(Some(only)) == incarnation);
    ours.then_some(fault)
}

fn split(text: &str, at: char) -> (&str, Option<&str>) {
    text.split_once(at).map_or((text, None), |(before, after)| (before, Some(after)))
}

/// Waits for ever.
pub(crate) fn hang() -> ! {
    loop {
        // Nothing is ever sent.
        let _ = never::<()>().recv();
    }
}

/// A model whose steps go wrong.
struct Faulty {
    model: Box<dyn StepModel>,
    faults: Vec<Fault>,
    steps: u64,
    /// The step that begins was refused by the model, and will be run: its faults have struck.
    is_struck: bool,
}

impl Faulty {
    fn strike(&mut self) -> Result<(), BackendError> {
        self.steps += 1;
        let now = self.steps;
        for fault in &self.faults {
            match *fault {
                Fault::ExitAtStep { step, status } if step == now => std::process::exit(status),
                Fault::PanicAtStep(step) if step == now => panic!("a fault was asked for at step {step}"),
                Fault::HangAtStep(step) if step == now => hang(),
                Fault::DeviceLostAtStep(step) if step == now => return Err(device_lost()),
                // The next call of the driver, by whomever, says what happened: the step goes on and meets it.
                Fault::TrapAtStep(step) if step == now => drop(crate::backend::cuda::trap()),
                Fault::OomAtStep(step) if step == now => return Err(out_of_memory()),
                Fault::OomFromStep(step) if step <= now => return Err(out_of_memory()),
                // The message is the passing of time.
                Fault::SlowStep(time) => drop(after(time).recv()),
                _ => {}
            }
        }
        Ok(())
    }
}

fn out_of_memory() -> BackendError {
    BackendError::OutOfMemory { device: "cpu".into(), what: "a step (asked for)".into(), requested: 2 << 20, free: 0 }
}

fn device_lost() -> BackendError {
    BackendError::Device { device: "cpu".into(), op: "step".into(), detail: "asked for".into() }
}

impl StepModel for Faulty {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn n_ctx(&self) -> usize {
        self.model.n_ctx()
    }

    fn capacity(&self) -> StepCapacity {
        self.model.capacity()
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        if !std::mem::take(&mut self.is_struck) {
            self.strike()?;
        }
        self.model.run(batch, logits)
    }

    fn runs_ahead(&self) -> bool {
        self.model.runs_ahead()
    }

    fn enqueue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        self.strike()?;
        let begun = self.model.enqueue(batch, rows)?;
        self.is_struck = !begun;
        Ok(begun)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        self.model.collect()
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        self.model.hidden(rows, hidden)
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.model.copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        self.model.memory()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_for_whom_they_name() {
        let text = "oom-at-load#1; exit-at-step=3:7@basho/1 ;slow-step=20;";
        let slow = Fault::SlowStep(Duration::from_millis(20));
        let exit = Fault::ExitAtStep { step: 3, status: 7 };
        assert_eq!(Faults::parse(text, "basho/0", 1).0, [Fault::OomAtLoad, slow]);
        assert_eq!(Faults::parse(text, "basho/0", 2).0, [slow]);
        assert_eq!(Faults::parse(text, "basho/1", 2).0, [exit, slow]);
        assert_eq!(Faults::parse("", "basho/1", 2), Faults::default());
    }

    #[test]
    #[should_panic(expected = "there is no fault `oom-at-lunch`")]
    fn a_misspelt_fault_is_not_ignored() {
        Faults::parse("oom-at-lunch", "basho/0", 1);
    }
}
