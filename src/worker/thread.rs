//! Workers that are threads of the host: for the CPU, and for host apps that want no processes.
//!
//! The same main loop as in a process, over channels instead of a socket. What a thread cannot do:
//!
//! - It cannot be killed. [`kill`](WorkerLink::kill) makes it end at the next step boundary, or while it loads after the
//!   tensor in hand; a step or a read that never ends keeps its replica from starting again.
//! - A GPU whose driver reports a lost device is lost to the whole process, for all its threads and all its GPUs. The worker
//!   says so in the log and ends the *host* with status [`EXIT_SOFTWARE`] (70): whoever supervises the host starts it anew.

use super::load::{is_gpu, open_device};
use super::main_loop::{COMMANDS_MAX, EXIT_SOFTWARE, End, Host, HostGone, Task, run};
use super::share::Share;
use crossbeam_channel::{Sender, TrySendError, bounded};
use playhouse_actors::engine::EngineError;
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::link::{LinkError, WorkerFactory, WorkerLink};
use playhouse_actors::messages::{WorkerCommand, WorkerEvent, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;

/// Starts each worker as a thread.
#[derive(Debug, Clone, Default)]
pub struct ThreadWorkers {
    share: Share,
}

impl ThreadWorkers {
    /// Workers that share the host's cores.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn with_share(share: Share) -> Self {
        Self { share }
    }
}

impl WorkerFactory for ThreadWorkers {
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String> {
        let (commands, receiver) = bounded(COMMANDS_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let share = self.share.take();
        let task = Task {
            spec,
            threads: share.threads() as usize,
            pid: None,
            commands: receiver,
            host: Arc::new(ChannelHost(events.clone())),
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::Builder::new().name(format!("engine {}", task.spec.replica));
        let body = move || {
            let device = task.spec.device.clone();
            let end = match open_device(&device) {
                Ok(_) => run(task),
                Err(error) => End::WrongDevice(error.to_string()),
            };
            drop(share);
            end_host_if_lost(&device, &end);
            // Nobody may be interested any more.
            let _ = events.blocking_send(WorkerEvent::Exited(exit_of(end)));
        };
        thread.spawn(body).map_err(|error| format!("no thread for a worker: {error}"))?;
        Ok(Box::new(ThreadLink { commands: Some(commands), stop }))
    }
}

/// Events into the host's channel.
struct ChannelHost(mpsc::Sender<WorkerEvent>);

impl Host for ChannelHost {
    fn tell(&self, event: WorkerEvent) -> Result<(), HostGone> {
        self.0.blocking_send(event).map_err(|_| HostGone)
    }
}

fn exit_of(end: End) -> WorkerEnd {
    match end {
        End::WrongDevice(reason) => WorkerEnd::WrongDevice(reason),
        End::Broken(ref reason) => {
            tracing::error!(%reason, "a worker thread ended");
            WorkerEnd::Exited(end.status())
        }
        End::Asked | End::HostGone | End::Failed(_) => WorkerEnd::Exited(end.status()),
    }
}

fn end_host_if_lost(device: &DeviceId, end: &End) {
    if spoils_process(device, end) {
        tracing::error!(%device, ?end, status = EXIT_SOFTWARE, "a GPU is lost to this process, which ends");
        std::process::exit(EXIT_SOFTWARE);
    }
}

fn spoils_process(device: &DeviceId, end: &End) -> bool {
    is_gpu(device) && matches!(end, End::Failed(EngineError::DeviceLost { .. }))
}

/// The host's hold on a worker thread.
struct ThreadLink {
    /// `None` once it was told to end.
    commands: Option<Sender<WorkerCommand>>,
    stop: Arc<AtomicBool>,
}

impl WorkerLink for ThreadLink {
    fn send(&mut self, command: &WorkerCommand) -> Result<(), LinkError> {
        let commands = self.commands.as_ref().ok_or(LinkError::Closed)?;
        commands.try_send(command.clone()).map_err(|error| match error {
            TrySendError::Full(_) => LinkError::Full,
            TrySendError::Disconnected(_) => LinkError::Closed,
        })
    }

    fn kill(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes an idle one.
        self.commands = None;
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl Drop for ThreadLink {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lost_gpu_spoils_the_process() {
        let (gpu, cpu, sim) = (DeviceId::gpu("GPU-1"), DeviceId::cpu(), DeviceId::gpu("SIM-1"));
        let lost = EngineError::DeviceLost { device: "GPU-1".into(), op: "step".into(), detail: "719".into() };
        let oom = EngineError::OutOfMemory { device: "GPU-1".into(), what: "KV".into(), requested: 1, free: 0 };
        assert!(spoils_process(&gpu, &End::Failed(lost.clone())));
        for (device, end) in [(&cpu, End::Failed(lost.clone())), (&sim, End::Failed(lost)), (&gpu, End::Failed(oom))] {
            assert!(!spoils_process(device, &end), "{device} {end:?}");
        }
        assert!(!spoils_process(&gpu, &End::Asked));
    }
}
