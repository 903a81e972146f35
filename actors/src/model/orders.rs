//! What a model actor is ordered to do by its supervisor: start again, give up, end its worker, start anyway.

use super::{Inner, Live, ModelMsg, ModelState};
use crate::messages::{HouseEvent, Phase};
use crate::policy::outcome::WorkerEnd;
use crate::policy::restart::Decision;
use crate::router::RouterMsg;
use ractor::RpcReplyPort;

impl ModelState {
    pub(super) fn decided(&mut self, decision: Decision, kv_bytes: u64) {
        if self.phase != Phase::Down {
            return;
        }
        self.args.spec.kv_bytes = kv_bytes;
        match decision {
            Decision::RestartAfter(delay) => {
                self.attempt += 1;
                self.phase = Phase::Backoff;
                let attempt = self.attempt;
                self.me.send_after(delay, move || ModelMsg::internal(Inner::BackoffOver { attempt }));
                let replica = self.replica();
                let device = self.args.spec.device.clone();
                self.args.events.tell(HouseEvent::RestartScheduled { replica, device, after: delay, kv_bytes });
            }
            Decision::Leave => {
                self.phase = Phase::Stopped;
                self.args.router.tell(RouterMsg::ReplicaGone(self.replica()));
            }
            Decision::Quarantine => self.quarantine(),
        }
    }

    pub(super) fn give_up(&mut self, reason: String) {
        self.phase = Phase::Failed;
        let replica = self.replica();
        self.args.router.tell(RouterMsg::ReplicaGone(replica.clone()));
        self.args.events.tell(HouseEvent::ModelFailed { replica, reason });
    }

    pub(super) fn quarantine(&mut self) {
        let is_on_its_way_out = self.phase == Phase::Stopping && !self.recycle;
        if is_on_its_way_out || matches!(self.phase, Phase::Failed | Phase::Stopped) {
            // It is not started anyway; what it has ends with its worker.
            return;
        }
        self.recycle = false;
        self.phase = Phase::Quarantined;
        self.args.router.tell(RouterMsg::ReplicaGone(self.replica()));
        self.kill(WorkerEnd::DeviceLost("quarantined".into()));
        self.requests.give_back();
    }

    pub(super) fn recycle(&mut self) {
        match self.phase {
            Phase::Loading | Phase::Ready => {
                self.recycle = true;
                self.end_worker();
            }
            Phase::Waiting | Phase::Stopping | Phase::Down | Phase::Backoff => {}
            Phase::Quarantined | Phase::Failed | Phase::Stopped => {}
        }
    }

    pub(super) fn start_anyway(&mut self) {
        match self.phase {
            Phase::Quarantined | Phase::Failed | Phase::Stopped | Phase::Backoff | Phase::Down => {
                self.wait_for_slot();
                self.announce();
            }
            Phase::Waiting | Phase::Loading | Phase::Ready | Phase::Stopping => {}
        }
    }

    pub(super) fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopped.push(reply);
        self.recycle = false;
        match self.phase {
            Phase::Loading | Phase::Ready => self.end_worker(),
            Phase::Stopping => {}
            // A worker that was killed is not waited for: its slot is.
            Phase::Waiting | Phase::Down | Phase::Backoff | Phase::Quarantined | Phase::Failed | Phase::Stopped => {
                self.attempt += 1;
                self.phase = Phase::Stopped;
                self.answer_stopped();
            }
        }
    }

    /// Tells the worker to end; its requests go on elsewhere.
    fn end_worker(&mut self) {
        self.phase = Phase::Stopping;
        self.args.router.tell(RouterMsg::ReplicaDown(self.replica()));
        self.requests.give_back();
        if let Some(live) = &mut self.live {
            live.ask_to_end();
        }
    }

    pub(super) fn announce(&mut self) {
        let (replica, actor, open) = (self.replica(), self.me.clone(), self.requests.open());
        self.args.router.tell(RouterMsg::ReplicaUp { replica: replica.clone(), actor, open });
        match self.phase {
            Phase::Ready => {
                let n_ctx = self.live.as_ref().and_then(Live::n_ctx).unwrap_or(u32::MAX);
                self.args.router.tell(RouterMsg::ReplicaReady { replica, n_ctx });
            }
            Phase::Quarantined | Phase::Failed | Phase::Stopped => {
                self.args.router.tell(RouterMsg::ReplicaGone(replica))
            }
            Phase::Waiting | Phase::Loading | Phase::Stopping | Phase::Down | Phase::Backoff => {}
        }
    }
}
