//! What an error code, an XID or an exit means, and what follows.
//!
//! Sources: the `CUresult` comments of `cuda.h` 12.9; NVIDIA's XID catalogue ("immediate action"); what other operators
//! of GPUs do with the same codes. Measured on two H200: after 700 or 719 every context of the process, on every GPU,
//! is lost and no new one can be made, so whatever needs a new context needs a new process. Out of memory is not of
//! that kind: it never restarts anything.

use crate::inventory::{HealthKind, RecoveryAction};
use serde::{Deserialize, Serialize};

/// What follows from an outcome, from the least to the most drastic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing: it is good, or the news of something that is handled where it happened.
    Ignore,
    /// Try again: free what can be freed first.
    Retry,
    /// Refuse the request that asked for it; others go on.
    Refuse,
    /// End the process and start another.
    Restart,
    /// Start this model nowhere until its file or its configuration changes. The device is well.
    FailModel,
    /// Start nothing on the device until somebody releases it.
    Quarantine,
}

/// What follows from a driver call's result (`CUresult`).
pub fn cuda(code: u32) -> Action {
    match code {
        0 => Action::Ignore,
        // OUT_OF_MEMORY; NOT_READY (600): asked too early.
        2 | 600 => Action::Retry,
        // Calls that this very call made wrong: INVALID_VALUE, INVALID_HANDLE, NOT_FOUND, LAUNCH_OUT_OF_RESOURCES,
        // COOPERATIVE_LAUNCH_TOO_LARGE, NOT_SUPPORTED, INVALID_RESOURCE_TYPE, INVALID_RESOURCE_CONFIGURATION.
        1 | 400 | 500 | 701 | 720 | 801 | 914 | 915 => Action::Refuse,
        // There is no such device, it may not be used, or the driver does not fit: NO_DEVICE, INVALID_DEVICE,
        // DEVICE_NOT_LICENSED, DEVICE_UNAVAILABLE, SYSTEM_NOT_READY, SYSTEM_DRIVER_MISMATCH, COMPAT_NOT_SUPPORTED.
        46 | 100 | 101 | 102 | 802 | 803 | 804 => Action::Quarantine,
        // "Process must be terminated and relaunched": CONTAINED, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, HARDWARE_STACK_ERROR,
        // ILLEGAL_INSTRUCTION, MISALIGNED_ADDRESS, INVALID_ADDRESS_SPACE, INVALID_PC, LAUNCH_FAILED (a trap),
        // TENSOR_MEMORY_LEAK, MPS_CLIENT_TERMINATED, EXTERNAL_DEVICE.
        226 | 700 | 702 | 714 | 715 | 716 | 717 | 718 | 719 | 721 | 810 | 911 => Action::Restart,
        // ASSERT: the header asks for a new context only, which a process cannot make any more.
        710 => Action::Restart,
        // ECC_UNCORRECTABLE, NVLINK_UNCORRECTABLE, UNKNOWN: no word on recovery. The health events of the device say
        // whether it is more than the process.
        214 | 220 | 999 => Action::Restart,
        // Anything else: a process boundary is the only thing known to clear an error, and the intensity of restarts
        // bounds what that costs.
        _ => Action::Restart,
    }
}

/// What follows from an XID.
pub fn xid(code: u64) -> Action {
    match code {
        // Contained or caused by the application: its process ends by itself, with an error that names the cause sooner
        // than the event. 94 is a contained memory error: pages are retired, the process that touched them ends.
        8 | 13 | 31 | 32 | 39..=41 | 69 | 94 | 126..=135 => Action::Restart,
        // Told for the record: 43 is the application's own end, 45 the cleaning up after it, 63 a remapped row, 68 a
        // decoder's error, 92 a high rate of mended errors, 121 and 137 links that recovered.
        43 | 45 | 63 | 68 | 92 | 121 | 137 => Action::Ignore,
        // Reset the GPU. 109 (context switch timeout) is an application's fault to some and a reset to the catalogue.
        46 | 62 | 64 | 95 | 109 | 110 | 119 | 120 | 136 | 140 | 143 | 155 | 156 | 158 => Action::Quarantine,
        // Fallen off the bus; memory error that was not mended; NVLink; the recovery action changed.
        79 | 48 | 74 | 144..=150 | 154 => Action::Quarantine,
        // Not in the table: if it concerns a worker, the worker will end.
        _ => Action::Restart,
    }
}

/// What follows from a health event.
pub fn health(kind: HealthKind) -> Action {
    match kind {
        HealthKind::Xid(code) => xid(code),
        HealthKind::Recovery(RecoveryAction::None) => Action::Ignore,
        HealthKind::GpuLost
        | HealthKind::ResetRequired
        | HealthKind::RowRemapFailed
        | HealthKind::Unreadable
        | HealthKind::Recovery(
            RecoveryAction::GpuReset
            | RecoveryAction::NodeReboot
            | RecoveryAction::DrainP2p
            | RecoveryAction::DrainAndReset,
        ) => Action::Quarantine,
    }
}

/// Why a worker is no more, or must be no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerEnd {
    /// It was told to end and did.
    Asked,
    /// It ended with this status.
    Exited(i32),
    /// This signal ended it.
    Signalled(i32),
    /// It could not be started.
    NotStarted(String),
    /// It did not answer, or not step, in time.
    Hung,
    /// It broke the rules of the link.
    Protocol(String),
    /// The device failed under it.
    DeviceLost(String),
    /// No memory, at load or in a step.
    OutOfMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes free.
        free: u64,
    },
    /// The model cannot be loaded, whoever tries.
    BadModel(String),
    /// Its device is not the one it was told to use.
    WrongDevice(String),
    /// The actor in front of it failed.
    ActorFailed(String),
}

impl std::fmt::Display for WorkerEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Asked => f.write_str("asked to end"),
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signalled(signal) => write!(f, "ended by signal {signal}"),
            Self::NotStarted(why) => write!(f, "not started: {why}"),
            Self::Hung => f.write_str("hung: no sign of life, or a step that took too long"),
            Self::Protocol(what) => write!(f, "broke the rules of the link: {what}"),
            Self::DeviceLost(why) => write!(f, "device lost: {why}"),
            Self::OutOfMemory { requested, free } => {
                write!(f, "out of memory: {requested} bytes asked for, {free} free")
            }
            Self::BadModel(why) => write!(f, "bad model: {why}"),
            Self::WrongDevice(why) => write!(f, "wrong device: {why}"),
            Self::ActorFailed(why) => write!(f, "its actor failed: {why}"),
        }
    }
}

/// Exit status of a worker whose model cannot be loaded (`EX_DATAERR`).
pub const EXIT_BAD_MODEL: i32 = 65;
/// Exit status of a worker whose device is not the configured one (`EX_UNAVAILABLE`).
pub const EXIT_WRONG_DEVICE: i32 = 69;

impl WorkerEnd {
    /// What follows. Out of memory goes to the ladder ([`super::ladder`]) before it comes to this.
    pub fn action(&self) -> Action {
        match self {
            Self::Asked => Action::Ignore,
            Self::BadModel(_) | Self::Exited(EXIT_BAD_MODEL) => Action::FailModel,
            Self::WrongDevice(_) | Self::Exited(EXIT_WRONG_DEVICE) => Action::Quarantine,
            Self::OutOfMemory { .. } => Action::Retry,
            Self::Exited(_)
            | Self::Signalled(_)
            | Self::NotStarted(_)
            | Self::Hung
            | Self::Protocol(_)
            | Self::DeviceLost(_)
            | Self::ActorFailed(_) => Action::Restart,
        }
    }

    /// How the restart policy sees it.
    pub fn end(&self) -> super::restart::End {
        match self {
            Self::Asked => super::restart::End::Asked,
            Self::Exited(0) => super::restart::End::Clean,
            _ => super::restart::End::Failure,
        }
    }

    /// One word for counters and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Exited(_) => "exited",
            Self::Signalled(_) => "signalled",
            Self::NotStarted(_) => "not_started",
            Self::Hung => "hung",
            Self::Protocol(_) => "protocol",
            Self::DeviceLost(_) => "device_lost",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::BadModel(_) => "bad_model",
            Self::WrongDevice(_) => "wrong_device",
            Self::ActorFailed(_) => "actor_failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_errors_that_poison_the_process_restart_it() {
        for code in [214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999] {
            assert_eq!(cuda(code), Action::Restart, "{code}");
        }
    }

    #[test]
    fn out_of_memory_restarts_nothing() {
        assert_eq!(cuda(2), Action::Retry);
        assert_eq!(WorkerEnd::OutOfMemory { requested: 1, free: 0 }.action(), Action::Retry);
    }

    #[test]
    fn calls_that_failed_alone_are_refused() {
        for code in [1, 701, 720] {
            assert_eq!(cuda(code), Action::Refuse, "{code}");
        }
    }

    #[test]
    fn xids_follow_the_catalogue() {
        let check =
            |codes: &[u64], action: Action| codes.iter().for_each(|code| assert_eq!(xid(*code), action, "{code}"));
        check(&[8, 13, 31, 32, 39, 40, 41, 69, 94, 126, 130, 135], Action::Restart);
        check(&[46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158], Action::Quarantine);
        check(&[79, 48, 74, 144, 147, 150, 154], Action::Quarantine);
        check(&[43, 45, 63, 92, 121, 137], Action::Ignore);
    }

    /// Every code of the catalogue's range in every way it can arrive; the worst codes never lead to a respawn.
    #[test]
    fn every_code_by_every_way() {
        let mut cases = 0;
        for code in 0..=172u64 {
            let by_event = health(HealthKind::Xid(code));
            assert_eq!(by_event, xid(code));
            assert!(matches!(by_event, Action::Ignore | Action::Restart | Action::Quarantine), "{code}");
            assert!(![79, 95, 119].contains(&code) || by_event == Action::Quarantine, "{code}");
            for worse in [HealthKind::GpuLost, HealthKind::ResetRequired, HealthKind::Unreadable] {
                // What a look at the device says outranks what the event said.
                assert_eq!(health(worse).max(by_event), Action::Quarantine, "{code} with {worse:?}");
                cases += 1;
            }
            cases += 1;
        }
        assert!(cases >= 600, "{cases}");
        let recoveries = [
            RecoveryAction::GpuReset,
            RecoveryAction::NodeReboot,
            RecoveryAction::DrainP2p,
            RecoveryAction::DrainAndReset,
        ];
        for recovery in recoveries {
            assert_eq!(health(HealthKind::Recovery(recovery)), Action::Quarantine);
        }
        assert_eq!(health(HealthKind::Recovery(RecoveryAction::None)), Action::Ignore);
    }

    #[test]
    fn exits_say_whose_fault_it_was() {
        assert_eq!(WorkerEnd::Exited(EXIT_BAD_MODEL).action(), Action::FailModel, "no restart mends a file");
        assert_eq!(WorkerEnd::Exited(EXIT_WRONG_DEVICE).action(), Action::Quarantine);
        assert_eq!(WorkerEnd::Signalled(9).action(), Action::Restart);
        assert_eq!(WorkerEnd::Exited(0).end(), super::super::restart::End::Clean);
        assert_eq!(WorkerEnd::Hung.end(), super::super::restart::End::Failure);
    }
}
