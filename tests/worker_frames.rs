//! Frames between host and worker: everything that can be said survives the way, in whatever pieces it comes, and nothing
//! that is no frame is taken for one.

mod worker_support;

use playhouse::worker::frame::{self, FDS_MAX, FRAME_MAX, Fill, FrameError, FrameReader, HEADER_BYTES, Wait};
use playhouse::worker::handshake::{HandshakeError, Hello, Version, append_greeting, read_greeting};
use playhouse::worker::sizing::{self, SizingError};
use playhouse_actors::engine::{
    Constraint, Engine, EngineError, EngineEvent, EngineRequest, EngineStats, FinishReason, LoadPhase, LoadProgress,
    Logprob, RequestError, RequestId, SamplingParams, StepTokens, Task, TokenLogprobs, Usage,
};
use playhouse_actors::messages::{Heartbeat, WorkerCommand, WorkerEvent, WorkerReady};
use playhouse_actors::policy::ladder::RungCounts;
use playhouse_config::Model;
use playhouse_config::checked::KvType;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

// --- everything that can be said ---------------------------------------------------------------------------------------

fn id() -> impl Strategy<Value = RequestId> {
    any::<u64>().prop_map(RequestId)
}

fn sampling() -> impl Strategy<Value = SamplingParams> {
    let float = || -1e6f32..1e6;
    let biases = vec((any::<u32>(), prop_oneof![float(), Just(f32::NEG_INFINITY)]), 0..4);
    let shape = (biases, any::<u32>(), any::<u64>(), any::<u32>());
    (shape, [float(), float(), float(), float(), float(), float()]).prop_map(
        |((logit_bias, top_k, seed, choice), f)| SamplingParams {
            logit_bias,
            repetition_penalty: f[0],
            presence_penalty: f[1],
            frequency_penalty: f[2],
            temperature: f[3],
            top_k,
            top_p: f[4],
            min_p: f[5],
            seed,
            choice,
        },
    )
}

fn constraint() -> impl Strategy<Value = Constraint> {
    prop_oneof![
        Just(Constraint::JsonObject),
        any::<String>().prop_map(Constraint::JsonSchema),
        any::<String>().prop_map(Constraint::Regex),
        any::<String>().prop_map(Constraint::Lark),
    ]
}

fn command() -> impl Strategy<Value = WorkerCommand> {
    let tokens = || vec(any::<u32>(), 0..200);
    let submit = (id(), (tokens(), tokens(), vec(any::<u32>(), 0..4)), sampling(), any::<[u32; 2]>());
    let submit = (submit, option::of(any::<u32>()), any::<i32>(), prop_oneof![Just(Task::Generate), Just(Task::Embed)]);
    let submit = (submit, option::of(constraint()));
    let submit = submit.prop_map(
        |(
            ((id, (prompt, emitted, stop_ids), sampling, [max_tokens, min_tokens]), logprobs, priority, task),
            constraint,
        )| {
            WorkerCommand::Submit(EngineRequest {
                id,
                task,
                prompt,
                emitted,
                sampling,
                max_tokens,
                min_tokens,
                stop_ids,
                logprobs,
                constraint,
                priority,
                deadline: None,
            })
        },
    );
    prop_oneof![submit, id().prop_map(WorkerCommand::Cancel), Just(WorkerCommand::Shutdown)]
}

fn request_error() -> impl Strategy<Value = RequestError> {
    prop_oneof![
        any::<(u32, u32)>().prop_map(|(needed, limit)| RequestError::ContextExceeded { needed, limit }),
        any::<(String, String, String)>().prop_map(|(param, found, expected)| RequestError::InvalidParam {
            param,
            found,
            expected
        }),
        id().prop_map(RequestError::DuplicateId),
        any::<(u32, u32, String)>().prop_map(|(index, token, found)| RequestError::BadLogits { index, token, found }),
        any::<u32>().prop_map(|index| RequestError::NothingToChoose { index }),
        any::<String>().prop_map(RequestError::OutOfMemory),
    ]
}

fn engine_error() -> impl Strategy<Value = EngineError> {
    prop_oneof![
        any::<(String, String, u64, u64)>().prop_map(|(device, what, requested, free)| EngineError::OutOfMemory {
            device,
            what,
            requested,
            free
        }),
        any::<String>().prop_map(EngineError::BadModel),
        any::<(String, String, String)>().prop_map(|(device, op, detail)| EngineError::DeviceLost {
            device,
            op,
            detail
        }),
    ]
}

fn engine_event() -> impl Strategy<Value = EngineEvent> {
    let logprob = (any::<u32>(), -1e3f32..0.0).prop_map(|(token, logprob)| Logprob { token, logprob });
    let logprobs = (-1e3f32..0.0, vec(logprob, 0..5)).prop_map(|(chosen, top)| TokenLogprobs { chosen, top });
    let reason = prop_oneof![
        Just(FinishReason::Stop),
        Just(FinishReason::Length),
        Just(FinishReason::Cancelled),
        Just(FinishReason::Deadline)
    ];
    let usage = || {
        any::<[u32; 3]>().prop_map(|[prompt_tokens, cached_tokens, completion_tokens]| Usage {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
        })
    };
    prop_oneof![
        (id(), any::<[u32; 2]>(), option::of(logprobs)).prop_map(|(id, [index, token], logprobs)| EngineEvent::Token {
            id,
            index,
            token,
            logprobs
        }),
        (id(), vec(-1e6f32..1e6, 0..200), usage()).prop_map(|(id, values, usage)| EngineEvent::Embedded {
            id,
            values,
            usage
        }),
        (id(), reason, usage()).prop_map(|(id, reason, usage)| EngineEvent::Finished { id, reason, usage }),
        (id(), request_error()).prop_map(|(id, error)| EngineEvent::Failed { id, error }),
    ]
}

fn stats() -> impl Strategy<Value = EngineStats> {
    any::<([u32; 5], [u64; 15])>().prop_map(|(n, m)| EngineStats {
        running: n[0],
        waiting: n[1],
        queued_tokens: m[0],
        kv_blocks_used: n[2],
        kv_blocks_cached: n[3],
        kv_blocks_total: n[4],
        steps: m[1],
        prefill_tokens: m[2],
        decode_tokens: m[3],
        preemptions: m[4],
        prefix_queries: m[5],
        prefix_hits: m[6],
        weight_bytes: m[7],
        kv_bytes: m[8],
        scratch_bytes: m[9],
        step_tokens: StepTokens { steps: [m[0]; 14], sum: m[9] },
        kv_block_tokens: n[4],
        oom: RungCounts {
            drop_prefix_cache: m[10],
            preempt: m[11],
            refuse: m[12],
            shrink_kv: m[13],
            quarantine: m[14],
        },
    })
}

fn event() -> impl Strategy<Value = WorkerEvent> {
    let phase = prop_oneof![
        Just(LoadPhase::Open),
        Just(LoadPhase::Weights),
        Just(LoadPhase::Allocate),
        Just(LoadPhase::WarmUp),
        Just(LoadPhase::Ready)
    ];
    let progress = (phase, any::<[u64; 2]>()).prop_map(|(phase, [bytes_done, bytes_total])| LoadProgress {
        phase,
        bytes_done,
        bytes_total,
    });
    let ready = (option::of(any::<u32>()), any::<[u32; 2]>(), any::<u64>(), stats()).prop_map(
        |(pid, [n_ctx, n_vocab], kv_min_bytes, stats)| WorkerReady { pid, n_ctx, n_vocab, kv_min_bytes, stats },
    );
    let age = option::of(any::<(u64, u32)>().prop_map(|(s, n)| Duration::new(s, n % 1_000_000_000)));
    prop_oneof![
        progress.prop_map(WorkerEvent::Progress),
        ready.prop_map(WorkerEvent::Ready),
        (id(), request_error()).prop_map(|(id, error)| WorkerEvent::Refused { id, error }),
        vec((id(), any::<Duration>()), 0..40).prop_map(WorkerEvent::Begun),
        vec(engine_event(), 0..40).prop_map(WorkerEvent::Step),
        (age, stats()).prop_map(|(step_age, stats)| WorkerEvent::Heartbeat(Heartbeat { step_age, stats })),
        engine_error().prop_map(WorkerEvent::Failed),
    ]
}

/// Writes `bytes` in pieces of these sizes, reading in between, and returns all the values that come out.
fn through_a_socket<T: serde::de::DeserializeOwned>(mut bytes: &[u8], pieces: &[usize]) -> Vec<T> {
    let (sender, receiver) = pair();
    let (mut reader, mut values) = (FrameReader::default(), Vec::new());
    let mut sizes = pieces.iter().cycle();
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(bytes.len().min(*sizes.next().unwrap()));
        frame::write(&sender, piece, &[]).unwrap();
        bytes = rest;
        while reader.fill(&receiver, Wait::No).unwrap() == Fill::Data {
            while let Some(frame) = reader.take().unwrap() {
                values.push(frame::decode(frame.payload).unwrap());
            }
        }
    }
    drop(sender);
    assert_eq!(reader.fill(&receiver, Wait::Yes).unwrap(), Fill::Closed);
    values
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn commands_survive(commands in vec(command(), 1..6), pieces in vec(1usize..2000, 1..5)) {
        let mut bytes = Vec::new();
        commands.iter().for_each(|command| frame::encode(command, &mut bytes).unwrap());
        prop_assert_eq!(through_a_socket::<WorkerCommand>(&bytes, &pieces), commands);
    }

    #[test]
    fn events_survive(events in vec(event(), 1..6), pieces in vec(1usize..2000, 1..5)) {
        let mut bytes = Vec::new();
        events.iter().for_each(|event| frame::encode(event, &mut bytes).unwrap());
        prop_assert_eq!(through_a_socket::<WorkerEvent>(&bytes, &pieces), events);
    }

    /// Whatever bytes come: an error or a value, never a panic, and never memory for what is not there.
    #[test]
    fn noise_is_refused_or_read(noise in vec(any::<u8>(), 0..300)) {
        let (sender, receiver) = pair();
        frame::write(&sender, &noise, &[]).unwrap();
        drop(sender);
        let mut reader = FrameReader::default();
        let mut n_values = 0;
        while let Ok(Some((_, fds))) = reader.read::<WorkerEvent>(&receiver) {
            prop_assert!(fds.is_empty());
            n_values += 1;
        }
        prop_assert!(n_values <= noise.len() / HEADER_BYTES);
    }
}

// --- what is no frame --------------------------------------------------------------------------------------------------

/// What reading `bytes` from a socket that is closed then says.
fn refusal(bytes: &[u8]) -> FrameError {
    let (sender, receiver) = pair();
    frame::write(&sender, bytes, &[]).unwrap();
    drop(sender);
    FrameReader::default().read::<WorkerCommand>(&receiver).expect_err("no frame")
}

fn header(n_bytes: u32, n_fds: u32) -> Vec<u8> {
    [n_bytes.to_le_bytes(), n_fds.to_le_bytes()].concat()
}

#[test]
fn frames_that_are_none_say_what_is_wrong() {
    let cap = u32::try_from(FRAME_MAX).unwrap();
    assert!(matches!(refusal(&header(cap + 1, 0)), FrameError::TooLong { found } if found == u64::from(cap) + 1));
    assert!(matches!(refusal(&header(u32::MAX, 0)), FrameError::TooLong { .. }));
    assert!(matches!(refusal(&header(0, 17)), FrameError::TooManyFds { found: 17 }));
    assert!(matches!(refusal(&header(1, 2)[..5]), FrameError::Truncated { expected: 8, found: 5 }));
    assert!(matches!(
        refusal(&[header(100, 0), vec![0; 10]].concat()),
        FrameError::Truncated { expected: 108, found: 18 }
    ));
    let promised = refusal(&[header(1, 1), vec![2]].concat());
    assert!(matches!(promised, FrameError::WrongFds { expected: 1, found: 0 }), "{promised}");
    let unknown = refusal(&[header(1, 0), vec![9]].concat());
    assert!(matches!(unknown, FrameError::Malformed { expected: "WorkerCommand", bytes: 1, .. }), "{unknown}");
    let longer = refusal(&[header(2, 0), vec![2, 0]].concat()).to_string();
    assert!(longer.contains("1 bytes are left over"), "{longer}");
}

#[test]
fn a_value_too_long_for_a_frame_is_not_written() {
    let mut buffer = b"before".to_vec();
    let long = vec![0u8; FRAME_MAX];
    assert!(matches!(frame::encode(&long, &mut buffer), Err(FrameError::TooLong { .. })));
    assert_eq!(buffer, b"before");
    // The longest that fits: its length takes four bytes.
    frame::encode(&vec![7u8; FRAME_MAX - 4], &mut buffer).unwrap();
    assert_eq!(buffer.len(), 6 + HEADER_BYTES + FRAME_MAX);
}

#[test]
fn the_longest_frame_comes_through_and_its_memory_goes() {
    let value = vec![7u8; FRAME_MAX - 4];
    let mut bytes = Vec::new();
    frame::encode(&value, &mut bytes).unwrap();
    frame::encode(&"next", &mut bytes).unwrap();
    let (sender, receiver) = pair();
    let writer = std::thread::spawn(move || frame::write(&sender, &bytes, &[]).unwrap());
    let mut reader = FrameReader::default();
    assert!(reader.read::<Vec<u8>>(&receiver).unwrap().unwrap().0 == value);
    assert_eq!(reader.read::<String>(&receiver).unwrap().unwrap().0, "next");
    writer.join().unwrap();
    assert!(reader.read::<String>(&receiver).unwrap().is_none());
    assert!(format!("{reader:?}").len() < 1 << 20, "a long frame's memory is given back");
}

#[test]
fn a_closed_socket_is_told_from_a_full_one() {
    let (sender, receiver) = pair();
    drop(receiver);
    assert!(matches!(frame::write(&sender, b"anything", &[]), Err(FrameError::Closed)));
}

// --- descriptors -------------------------------------------------------------------------------------------------------

fn file_with(words: &str) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(words.as_bytes()).unwrap();
    file
}

fn words_in(fd: OwnedFd) -> String {
    let (mut file, mut words) = (std::fs::File::from(fd), String::new());
    file.rewind().unwrap();
    file.read_to_string(&mut words).unwrap();
    words
}

#[test]
fn descriptors_arrive_with_their_frame() {
    let (sender, receiver) = pair();
    let frame_of = |n_fds: usize, value: &str| {
        let mut bytes = Vec::new();
        frame::encode_with(&mut bytes, n_fds, |payload| frame::append(&value, payload)).unwrap();
        bytes
    };
    // Frames without descriptors before and after, all in the socket before the first read.
    let files: Vec<_> = ["weights", "KV"].map(file_with).into();
    frame::write(&sender, &frame_of(0, "before"), &[]).unwrap();
    frame::write(&sender, &frame_of(2, "two"), &[files[0].as_fd(), files[1].as_fd()]).unwrap();
    frame::write(&sender, &frame_of(1, "one"), &[files[1].as_fd()]).unwrap();
    frame::write(&sender, &frame_of(0, "after"), &[]).unwrap();
    drop((files, sender));
    let mut reader = FrameReader::default();
    let mut received = Vec::new();
    while let Some((value, fds)) = reader.read::<String>(&receiver).unwrap() {
        for fd in &fds {
            let flags = rustix::io::fcntl_getfd(fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "a worker's children must not have it");
        }
        received.push((value, fds.into_iter().map(words_in).collect::<Vec<_>>()));
    }
    let text = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let expected =
        [("before", text(&[])), ("two", text(&["weights", "KV"])), ("one", text(&["KV"])), ("after", text(&[]))];
    assert_eq!(received, expected.map(|(value, words)| (value.to_owned(), words)));
}

#[test]
fn descriptors_that_no_frame_has_are_refused() {
    let (sender, receiver) = pair();
    let file = file_with("stray");
    let mut bytes = Vec::new();
    frame::encode(&"none", &mut bytes).unwrap();
    frame::write(&sender, &bytes, &[file.as_fd()]).unwrap();
    let mut reader = FrameReader::default();
    assert_eq!(reader.read::<String>(&receiver).unwrap().unwrap().0, "none");
    let error = reader.read::<String>(&receiver).expect_err("a descriptor is left");
    assert!(matches!(error, FrameError::WrongFds { expected: 0, found: 1 }), "{error}");
    let too_many = frame::encode_with(&mut bytes, FDS_MAX + 1, |payload| frame::append(&0u8, payload));
    assert!(matches!(too_many, Err(FrameError::TooManyFds { found: 17 })));
}

// --- greetings ---------------------------------------------------------------------------------------------------------

#[test]
fn greetings_are_read_by_the_same_version_only() {
    let hello = Hello { host_pid: 7, threads: 3, spec: worker_support::spec() };
    let ours = Version::ours();
    let mut payload = Vec::new();
    append_greeting(&ours, &hello, &mut payload).unwrap();
    assert_eq!(read_greeting::<Hello>(&ours, &payload).unwrap(), hello);
    for theirs in [
        Version { protocol: ours.protocol + 1, ..ours.clone() },
        Version { build: format!("{}-other", ours.build), ..ours.clone() },
    ] {
        let error = read_greeting::<Hello>(&theirs, &payload).expect_err("another version").to_string();
        assert!(error.contains(&ours.to_string()) && error.contains(&theirs.to_string()), "{error}");
    }
    for n in 0..payload.len() {
        assert!(read_greeting::<Hello>(&ours, &payload[..n]).is_err(), "cut after {n} bytes");
    }
    assert!(matches!(read_greeting::<Hello>(&ours, b"SSH-2.0-OpenSSH"), Err(HandshakeError::Magic { .. })));
}

// --- sizes -------------------------------------------------------------------------------------------------------------

/// The plan and the worker agree: what the planner reckons with is what the engine then has.
#[test]
fn a_worker_takes_the_memory_that_was_planned() {
    let file = playhouse::gguf::GgufFile::from_static(playhouse::basho::LABEL, playhouse::basho::GGUF).unwrap();
    let model = playhouse::models::describe(&file).unwrap();
    for (kv_type, context, max_sequences) in
        [(KvType::F32, None, 1), (KvType::F16, Some(100), 5), (KvType::Q8_0, Some(256), 3)]
    {
        let config = Model { kv_type, context, max_sequences, max_batch_tokens: 48, ..Model::embedded_default() };
        let demand = sizing::demand(&config, &model).unwrap();
        assert_eq!(demand.kv_full_bytes, demand.kv_min_bytes * u64::from(max_sequences));
        for kv_bytes in [demand.kv_min_bytes, demand.kv_full_bytes, demand.kv_full_bytes + 1000] {
            let spec = playhouse_actors::messages::WorkerSpec {
                kv_type,
                context,
                max_sequences,
                max_batch_tokens: 48,
                kv_bytes,
                ..worker_support::spec()
            };
            assert_eq!(sizing::kv_min_bytes(&spec, &model).unwrap(), demand.kv_min_bytes);
            let mut engine = worker_support::engine(&spec);
            engine.submit(worker_support::request(1, 3)).unwrap();
            while engine.step(&mut Vec::new()).unwrap().busy {}
            let stats = engine.stats();
            assert_eq!(stats.weight_bytes, demand.weights_bytes);
            let block = demand.kv_min_bytes / u64::from(context.unwrap_or(256).div_ceil(32)).max(1);
            assert!(stats.kv_bytes <= kv_bytes && stats.kv_bytes + block > kv_bytes.min(demand.kv_full_bytes));
            assert!(stats.scratch_bytes <= demand.scratch_bytes, "{} > {}", stats.scratch_bytes, demand.scratch_bytes);
        }
        let less = Model { kv_budget_bytes: Some(demand.kv_min_bytes - 1), ..config };
        assert!(matches!(sizing::demand(&less, &model), Err(SizingError::KvTooSmall { .. })));
    }
    let refused = |config: Model| sizing::demand(&config, &model).expect_err("refused");
    let longer = Model { context: Some(1 << 30), ..Model::embedded_default() };
    assert!(matches!(refused(longer), SizingError::Context { context: 0x4000_0000, .. }));
}
