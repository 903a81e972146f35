//! Random changes to a valid file, and random files through the writer: nothing panics, nothing is invented.

mod gguf_support;

use gguf_support::{EDGES, Mutation, check_any_bytes, mutate, rewrite, valid};
use playhouse::dtype::DType;
use playhouse::gguf::writer::GgufWriter;
use playhouse::gguf::{GgufFile, Value};
use proptest::prelude::*;

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => proptest::sample::select(EDGES.to_vec()),
        1 => any::<u64>(),
        2 => 0u64..2000,
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<usize>;
    prop_oneof![
        2 => (at(), any::<u8>()).prop_map(|(i, v)| Mutation::Byte(i, v)),
        6 => (at(), number()).prop_map(|(i, v)| Mutation::Field(i, v)),
        3 => (at(), at()).prop_map(|(i, j)| Mutation::CopyField(i, j)),
        1 => at().prop_map(Mutation::Truncate),
        1 => (at(), at()).prop_map(|(i, n)| Mutation::Remove(i, n)),
        1 => (at(), at()).prop_map(|(i, n)| Mutation::Repeat(i, n)),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let text = || ".{0,12}";
    prop_oneof![
        any::<u8>().prop_map(Value::from),
        any::<i16>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        text().prop_map(Value::from),
        proptest::collection::vec(text(), 0..6).prop_map(Value::from),
        proptest::collection::vec(any::<f64>(), 0..6).prop_map(Value::from),
        proptest::collection::vec(any::<bool>(), 0..6).prop_map(Value::from),
        proptest::collection::vec(any::<i8>(), 0..6).prop_map(Value::from),
    ]
}

/// Rows of whole blocks for every type.
fn shape() -> impl Strategy<Value = Vec<u64>> {
    (1u64..3, proptest::collection::vec(1u64..4, 0..3)).prop_map(|(blocks, mut rest)| {
        rest.insert(0, blocks * 256);
        rest
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_are_refused_or_whole(mutations in proptest::collection::vec(mutation(), 1..6)) {
        check_any_bytes(&mutate(&valid().build(), &mutations));
    }

    #[test]
    fn random_bytes_behind_a_header_are_refused_or_whole(
        n_tensors in 0u64..3,
        n_keys in 0u64..3,
        rest in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend_from_slice(&n_tensors.to_le_bytes());
        bytes.extend_from_slice(&n_keys.to_le_bytes());
        bytes.extend_from_slice(&rest);
        check_any_bytes(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_reads_back(
        keys in proptest::collection::hash_map("[a-z.]{1,20}", value(), 0..12),
        tensors in proptest::collection::hash_map(
            "[a-z.0-9]{1,64}",
            (shape(), proptest::sample::select(DType::ALL.to_vec()), any::<u8>()),
            0..6,
        ),
        alignment in prop_oneof![Just(None), (3u32..13).prop_map(|bits| Some(1u32 << bits))],
    ) {
        let mut w = GgufWriter::new();
        for (key, value) in &keys {
            w.set(key, value.clone());
        }
        if let Some(a) = alignment {
            w.set("general.alignment", a);
        }
        let mut sink = {
            for (name, (dims, dtype, _)) in &tensors {
                w.tensor(name, dims, *dtype);
            }
            w.begin(Vec::new()).unwrap()
        };
        for (_, _, byte) in tensors.values() {
            let (_, n_bytes) = sink.expects().unwrap();
            sink.write(&vec![*byte; n_bytes as usize]).unwrap();
        }
        let bytes = sink.finish().unwrap();
        let file = GgufFile::from_vec("written.gguf", bytes.clone()).unwrap();
        for (key, value) in &keys {
            // NaN is not equal to itself; its text is.
            prop_assert_eq!(format!("{:?}", file.metadata().get(key).unwrap()), format!("{value:?}"));
        }
        for (name, (dims, dtype, byte)) in &tensors {
            let t = file.require(name).unwrap();
            prop_assert_eq!((&t.dims, t.dtype), (dims, *dtype));
            prop_assert!(file.bytes(t).unwrap().iter().all(|b| b == byte));
            prop_assert_eq!(t.offset() % u64::from(alignment.unwrap_or(32)), 0);
        }
        prop_assert!(rewrite(&file) == bytes);
    }
}
