//! The reader on valid files: what the writer wrote comes back, from memory, from a file and from parts.

use std::path::Path;

use super::writer::{GgufWriteError, GgufWriter};
use super::*;
use crate::dtype::DType;

fn every_type() -> GgufWriter {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "test")
        .set("u8", 200u8)
        .set("i8", -100i8)
        .set("u16", 60_000u16)
        .set("i16", -30_000i16)
        .set("u32", u32::MAX)
        .set("i32", i32::MIN)
        .set("f32", 1.5f32)
        .set("bool", true)
        .set("str", "héllo")
        .set("u64", u64::MAX)
        .set("i64", i64::MIN)
        .set("f64", 0.1f64)
        .set("u8s", vec![1u8, 2, 3])
        .set("i8s", vec![-1i8])
        .set("u16s", vec![1u16, 65535])
        .set("i16s", vec![-1i16])
        .set("u32s", vec![7u32; 5])
        .set("i32s", vec![-7i32; 5])
        .set("f32s", vec![0.5f32, -0.0])
        .set("bools", vec![true, false])
        .set("strs", vec!["", "a", "", "日本"])
        .set("u64s", vec![1u64 << 40])
        .set("i64s", vec![-1i64 << 40])
        .set("f64s", Vec::<f64>::new())
        .tensor("a", &[3, 5], DType::F32)
        .tensor("b", &[32], DType::Q8_0)
        .tensor("c", &[2, 1, 1, 2], DType::F16);
    w
}

fn every_type_bytes() -> Vec<u8> {
    every_type().to_vec(&[&[1; 60], &[2; 34], &[3; 8]]).unwrap()
}

fn check_every_type(file: &GgufFile) {
    let m = file.metadata();
    assert_eq!(m.len(), 25);
    assert_eq!(m.iter().next().unwrap(), ("general.architecture", &Value::from("test")));
    assert_eq!(m.u32("u32").unwrap(), u32::MAX);
    assert_eq!(m.i32("i32").unwrap(), i32::MIN);
    assert_eq!(m.u64("u64").unwrap(), u64::MAX);
    assert_eq!((m.u32("u8").unwrap(), m.i32("i8").unwrap(), m.u64("u16").unwrap()), (200, -100, 60_000));
    assert_eq!(m.f32("f32").unwrap(), 1.5);
    assert!(m.bool("bool").unwrap());
    assert_eq!(m.str("str").unwrap(), "héllo");
    assert_eq!(m.strs("strs").unwrap().iter().collect::<Vec<_>>(), ["", "a", "", "日本"]);
    assert_eq!(&m.strs("strs").unwrap()[3], "日本");
    assert_eq!(m.u8s("u8s").unwrap(), [1, 2, 3]);
    assert_eq!(m.u32s("u32s").unwrap(), [7; 5]);
    assert_eq!(m.i32s("i32s").unwrap(), [-7; 5]);
    assert_eq!(m.f32s("f32s").unwrap(), [0.5, -0.0]);
    assert_eq!(m.bools("bools").unwrap(), [true, false]);
    assert_eq!(m.get("f64s"), Some(&Value::Array(Array::F64(vec![]))));
    assert_eq!(m.get("i64s"), Some(&Value::from(vec![-1i64 << 40])));

    let names: Vec<_> = file.tensors().map(|t| (t.name.as_str(), t.dtype, &t.dims[..])).collect();
    let dims: [&[u64]; 3] = [&[3, 5], &[32], &[2, 1, 1, 2]];
    assert_eq!(names, [("a", DType::F32, dims[0]), ("b", DType::Q8_0, dims[1]), ("c", DType::F16, dims[2])]);
    for (name, byte, len) in [("a", 1, 60), ("b", 2, 34), ("c", 3, 8)] {
        let t = file.require(name).unwrap();
        let bytes = file.bytes(t).unwrap();
        assert_eq!(&bytes[..], vec![byte; len]);
        assert_eq!(bytes.as_ptr().addr() % 8, 0);
        assert_eq!(&bytes.slice(2..5)[..], [byte; 3]);
    }
}

#[test]
fn a_file_in_memory_reads_back() {
    let bytes = every_type_bytes();
    check_every_type(&GgufFile::from_vec("memory", bytes.clone()).unwrap());
    // A misaligned copy, as `include_bytes!` may give.
    let mut shifted = vec![0u8; bytes.len() + 1];
    shifted[1..].copy_from_slice(&bytes);
    let shifted: &'static [u8] = Vec::leak(shifted);
    check_every_type(&GgufFile::from_static("static", &shifted[1..]).unwrap());
}

#[test]
fn a_file_on_disk_is_mapped_only_for_tensor_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, every_type_bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert!(!is_mapped(&path));
    check_every_type(&file);
    assert!(is_mapped(&path));
    let b = file.require("b").unwrap();
    let bytes = file.bytes(b).unwrap();
    assert_eq!(bytes.slice(4..10).file_range(), Some((path.as_path(), b.offset() + 4, 6)));
}

fn is_mapped(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap())
}

#[test]
fn version_2_reads_like_version_3() {
    let mut bytes = every_type_bytes();
    bytes[4] = 2;
    let file = GgufFile::from_vec("v2", bytes).unwrap();
    assert_eq!(file.version(), 2);
    check_every_type(&file);
}

#[test]
fn a_file_that_changes_after_opening_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, every_type_bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let f = std::fs::File::options().write(true).open(&path).unwrap();
    f.set_len(f.metadata().unwrap().len() - 1).unwrap();
    let e = file.bytes(file.require("a").unwrap()).unwrap_err();
    assert_eq!(e.kind(), GgufErrorKind::Changed);
}

#[test]
fn getters_name_key_and_file() {
    let file = GgufFile::from_vec("memory", every_type_bytes()).unwrap();
    let m = file.metadata();
    let e = m.u32("absent").unwrap_err();
    assert_eq!(e.kind(), GgufErrorKind::MissingKey);
    assert!(e.to_string().starts_with("memory: byte 0: key `absent`: missing key"), "{e}");
    assert_eq!(m.opt_u32("absent").unwrap(), None);
    let wrong = [
        m.u32("i8").unwrap_err(),
        m.opt_u32("str").unwrap_err(),
        m.str("u8s").unwrap_err(),
        m.f32("f64").unwrap_err(),
        m.f32s("i8s").unwrap_err(),
        m.i32s("u32s").unwrap_err(),
        m.bool("u8").unwrap_err(),
        m.u32("u64").unwrap_err(),
    ];
    for e in wrong {
        assert_eq!(e.kind(), GgufErrorKind::WrongType);
        assert!(e.offset() > 0);
        assert!(e.to_string().contains("memory") && e.to_string().contains("key `"), "{e}");
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let check = |w: &GgufWriter, want: fn(&GgufWriteError) -> bool| {
        let e = w.clone().begin(Vec::new()).unwrap_err();
        assert!(want(&e), "{e:?}");
    };
    let mut w = GgufWriter::new();
    w.tensor("t", &[33], DType::Q8_0);
    check(&w, |e| matches!(e, GgufWriteError::BadShape { .. }));
    let mut w = GgufWriter::new();
    w.tensor("t", &[32], DType::Q8_0).tensor("t", &[32], DType::Q8_0);
    check(&w, |e| matches!(e, GgufWriteError::DuplicateTensor { .. }));
    let mut w = GgufWriter::new();
    w.tensor("t".repeat(65), &[32], DType::F32);
    check(&w, |e| matches!(e, GgufWriteError::NameLength { .. }));
    let mut w = GgufWriter::new();
    w.set("", 1u8);
    check(&w, |e| matches!(e, GgufWriteError::NameLength { .. }));
    let mut w = GgufWriter::new();
    w.set("general.alignment", 48u32);
    check(&w, |e| matches!(e, GgufWriteError::BadAlignment));

    let mut w = GgufWriter::new();
    w.tensor("t", &[4], DType::F32);
    assert!(matches!(w.clone().to_vec(&[]), Err(GgufWriteError::WrongLength { .. })));
    assert!(matches!(w.clone().to_vec(&[&[0; 15]]), Err(GgufWriteError::WrongLength { .. })));
    assert!(matches!(w.clone().to_vec(&[&[0; 16], &[0]]), Err(GgufWriteError::Surplus { .. })));
    let mut sink = w.begin(Vec::new()).unwrap();
    assert!(matches!(sink.write_named("u", &[0; 16]), Err(GgufWriteError::WrongOrder { .. })));
}
