//! The life of a model actor's worker: its start, what it says, its end.

use super::live::{EVENTS_MAX, Live, Since, pump};
use super::{Inner, ModelMsg, ModelState, Report};
use crate::engine::EngineEvent;
use crate::messages::{Failure, Heartbeat, HouseEvent, Phase, WorkerCommand, WorkerEvent, WorkerReady};
use crate::policy::ladder::RungCounts;
use crate::policy::outcome::WorkerEnd;
use crate::router::RouterMsg;
use std::sync::atomic::Ordering;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

impl ModelState {
    pub(super) fn send(&mut self, command: WorkerCommand) {
        if let Some(live) = &mut self.live {
            live.send(command);
        }
    }

    pub(super) fn flush(&mut self) {
        if let Some(live) = &mut self.live {
            live.flush();
        }
    }

    /// Starts a worker as soon as the last one is reaped.
    pub(super) fn wait_for_slot(&mut self) {
        self.attempt += 1;
        self.phase = Phase::Waiting;
        let (attempt, me, slot) = (self.attempt, self.me.clone(), self.args.slot.clone());
        tokio::spawn(async move {
            // The semaphore is never closed. An actor that is gone drops the slot with the message.
            if let Ok(slot) = slot.acquire_owned().await {
                let _ = me.send_message(ModelMsg::internal(Inner::Slot { attempt, slot }));
            }
        });
    }

    pub(super) fn launch(&mut self, attempt: u64, slot: OwnedSemaphorePermit) {
        if attempt != self.attempt || self.phase != Phase::Waiting {
            return;
        }
        self.args.spec.incarnation = self.args.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        let spec = self.args.spec.clone();
        let incarnation = spec.incarnation;
        let (replica, device) = (spec.replica.clone(), spec.device.clone());
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        match self.args.factory.start(spec, events) {
            Ok(link) => {
                self.phase = Phase::Loading;
                self.live = Some(Live::new(link, incarnation));
                tokio::spawn(pump(receiver, incarnation, self.me.clone(), slot));
                self.args.events.tell(HouseEvent::WorkerStarted { replica, device, incarnation });
            }
            Err(reason) => {
                drop(slot);
                self.worker_gone(WorkerEnd::NotStarted(reason), false);
            }
        }
    }

    pub(super) fn on_event(&mut self, incarnation: u64, event: WorkerEvent) {
        let Some(live) = self.live.as_mut().filter(|live| live.incarnation == incarnation) else { return };
        live.hear();
        if live.is_given_up() && !matches!(event, WorkerEvent::Exited(_)) {
            // The journal holds what counts, and another worker goes on from there.
            return;
        }
        let patience = self.args.limits.client_timeout;
        match event {
            WorkerEvent::Progress(progress) => live.on_progress(&self.args.spec.replica, progress),
            WorkerEvent::Ready(ready) => self.on_ready(ready),
            WorkerEvent::Refused { id, error } => self.requests.on_failed(id, Failure::Request(error), patience),
            WorkerEvent::Begun(begun) => begun.into_iter().for_each(|(id, waited)| self.requests.on_begun(id, waited)),
            WorkerEvent::Step(events) => events.into_iter().for_each(|event| self.on_engine_event(event)),
            WorkerEvent::Heartbeat(heartbeat) => self.on_heartbeat(heartbeat),
            WorkerEvent::Failed(error) => live.on_failed(error),
            WorkerEvent::Exited(exit) => self.on_exit(exit),
        }
        self.flush();
    }

    fn on_ready(&mut self, ready: WorkerReady) {
        let Some(live) = self.live.as_mut().filter(|_| self.phase == Phase::Loading) else { return };
        let (n_ctx, kv_min_bytes) = (ready.n_ctx, ready.kv_min_bytes);
        let after = live.on_ready(ready);
        self.phase = Phase::Ready;
        let replica = self.replica();
        self.args.router.tell(RouterMsg::ReplicaReady { replica: replica.clone(), n_ctx });
        self.report(Report::Ready { replica: replica.clone(), kv_min_bytes });
        self.args.events.tell(HouseEvent::WorkerReady { replica, after });
    }

    fn on_heartbeat(&mut self, heartbeat: Heartbeat) {
        let Some(live) = &mut self.live else { return };
        let Since { tokens, rungs } = live.on_heartbeat(heartbeat);
        let replica = self.replica();
        self.args.router.tell(RouterMsg::Computed { replica: replica.clone(), tokens });
        if rungs != RungCounts::default() {
            self.report(Report::GaveUp { replica, rungs });
        }
        if heartbeat.step_age.is_some_and(|age| age > self.args.supervision.step_timeout) {
            self.kill(WorkerEnd::Hung);
        }
    }

    fn on_engine_event(&mut self, event: EngineEvent) {
        if self.live.as_ref().is_none_or(Live::is_given_up) {
            return;
        }
        let patience = self.args.limits.client_timeout;
        let said = match event {
            EngineEvent::Token { id, index, token, logprobs } => {
                self.requests.on_token(id, index, token, logprobs).map(|()| {
                    let taking = self.requests.deliver(id);
                    self.delivered(id, taking);
                })
            }
            EngineEvent::Finished { id, reason, usage } => self.requests.on_finished(id, reason, usage, patience),
            EngineEvent::Embedded { id, values, usage } => self.requests.on_embedded(id, values, usage),
            EngineEvent::Failed { id, error } => {
                self.requests.on_failed(id, Failure::Request(error), patience);
                Ok(())
            }
        };
        if let Err(broken) = said {
            self.kill(WorkerEnd::Protocol(broken.to_string()));
        }
    }

    /// Ends the worker at once. Its end is `end`, whatever its exit says.
    pub(super) fn kill(&mut self, end: WorkerEnd) {
        if let Some(live) = &mut self.live {
            live.kill(end);
        }
    }

    fn on_exit(&mut self, exit: WorkerEnd) {
        let Some(live) = self.live.take() else { return };
        self.worker_gone(live.end(exit), true);
    }

    fn worker_gone(&mut self, end: WorkerEnd, had_worker: bool) {
        let replica = self.replica();
        let in_flight = self.requests.len();
        self.args.events.tell(HouseEvent::WorkerEnded { replica: replica.clone(), end: end.clone(), in_flight });
        self.last_end = Some(end.clone());
        match self.phase {
            Phase::Stopping => {
                self.requests.give_back();
                return self.after_asked_end();
            }
            // It was given up, and perhaps the next one waits for its slot already: nothing is left to decide.
            Phase::Quarantined | Phase::Stopped | Phase::Failed => return,
            Phase::Waiting if had_worker => return,
            Phase::Waiting | Phase::Loading | Phase::Ready | Phase::Down | Phase::Backoff => {}
        }
        self.args.router.tell(RouterMsg::ReplicaDown(replica.clone()));
        self.requests.give_back_after_death(self.args.supervision.poison_deaths);
        self.phase = Phase::Down;
        self.report(Report::Ended { replica, end });
    }

    fn after_asked_end(&mut self) {
        if std::mem::take(&mut self.recycle) {
            return self.wait_for_slot();
        }
        self.phase = Phase::Stopped;
        self.answer_stopped();
    }

    pub(super) fn answer_stopped(&mut self) {
        self.stopped.drain(..).for_each(|reply| {
            // Who asked may have given up waiting.
            let _ = reply.send(());
        });
    }
}
