//! The supervision tree of Playhouse, what it decides, and the traits that it drives.
//!
//! ```text
//! house                     the root: which replica runs on which device; reload, stop
//!  ├─ inventory_actor       watches the devices through the trait Inventory
//!  ├─ router                model name -> ready replica; admission; requests between two workers
//!  └─ device_supervisor xN  one per device: restart now, later, or never
//!      └─ model xM          one per replica: the front of one worker
//!           ║ link          commands down, events up; a process or a thread, or a simulation
//!           ╚═ engine       the trait that a worker's engine fulfils
//! ```
//!
//! | what ends | who notices | what follows | what the client sees |
//! |---|---|---|---|
//! | a worker (exit, signal, trap) | its model actor: `Exited` | the policy: restart, or quarantine of the device | a pause: its request goes on elsewhere or later |
//! | a worker hangs | its model actor: no heartbeat, or a step too old | killed, then as above | a pause |
//! | a model actor (a bug) | its device supervisor | the link kills the worker; a new actor when the worker is reaped | a pause: the ticket went back to the router |
//! | a device supervisor (a bug) | the house | its workers end with it; started again | a pause |
//! | the router (a bug) | the house | started again; replicas tell it what they have | nothing in flight; new requests are refused meanwhile |
//! | a client | its stream is dropped | the request is cancelled, its KV free within a step | - |
//! | a request in flight at too many deaths | its model actor | refused as poison, the others go on | a typed failure |
//!
//! Every accepted request ends in exactly one [`messages::Terminal`]: the right to end it is a [`journal::Ticket`], which
//! is owned by one actor at a time and goes back to the router when it is dropped.
//!
//! Reading order: [`messages`], [`engine`], [`inventory`], [`link`] say what crosses; [`policy`] decides; [`journal`] and
//! [`stream`] are the life of a request; [`model`], [`device_supervisor`], [`router`], [`inventory_actor`], [`house`]
//! act; [`sim`] is the second implementation of everything that is driven.

pub mod messages;

pub mod engine;
pub mod inventory;
pub mod link;

pub mod policy;

pub mod journal;
mod trace;
pub mod stream;

mod ask;
pub mod device_supervisor;
pub mod event_log;
pub mod events;
pub mod house;
pub mod inventory_actor;
pub mod model;
pub mod router;

pub mod sim;

pub use event_log::{EventLog, Stamped};
pub use house::{HouseArgs, HouseHandle};
pub use messages::{Drained, Generate, HouseEvent, HouseStatus, Refusal, StreamEvent, Terminal};
pub use stream::TokenStream;
