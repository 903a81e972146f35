//! The writer's bytes for a fixed input, which the `gguf` Python package has read back (`tests/golden/gguf`).

use std::path::PathBuf;

use playhouse::dtype::DType;
use playhouse::gguf::writer::GgufWriter;

/// The same list as in `read_back.py`.
fn golden() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("golden.u8", u8::MAX)
        .set("golden.i8", i8::MIN)
        .set("golden.u16", u16::MAX)
        .set("golden.i16", i16::MIN)
        .set("golden.u32", u32::MAX)
        .set("golden.i32", i32::MIN)
        .set("golden.f32", 1.5f32)
        .set("golden.bool", true)
        .set("golden.str", "häuschen 俳句 🎋")
        .set("golden.u64", u64::MAX)
        .set("golden.i64", i64::MIN)
        .set("golden.f64", 0.1f64)
        .set("golden.u8s", vec![0u8, 1, 255])
        .set("golden.i8s", vec![-128i8, 127])
        .set("golden.u16s", vec![65535u16])
        .set("golden.i16s", vec![-32768i16, 0])
        .set("golden.u32s", vec![1u32, 2, 3])
        .set("golden.i32s", vec![-1i32, 0, 1])
        .set("golden.f32s", vec![0.25f32, -0.5])
        .set("golden.bools", vec![true, false, true])
        .set("golden.strs", vec!["a", "", "古池や", "\n"])
        .set("golden.u64s", vec![1u64 << 63])
        .set("golden.i64s", vec![-1i64])
        .set("golden.f64s", vec![1e300f64, -0.0])
        .tensor("vector.f32", &[5], DType::F32)
        .tensor("matrix.f16", &[3, 4], DType::F16)
        .tensor("stack.q8_0", &[32, 2, 3], DType::Q8_0)
        .tensor("cube.q4_k", &[256, 1, 2, 1], DType::Q4_K)
        .tensor("experts.mxfp4", &[64, 2, 2], DType::MXFP4);
    let mut sink = w.begin(Vec::new()).unwrap();
    while let Some((_, n_bytes)) = sink.expects() {
        let data: Vec<u8> = (0..n_bytes).map(|i| (i % 251) as u8).collect();
        sink.write(&data).unwrap();
    }
    sink.finish().unwrap()
}

#[test]
fn the_writer_writes_what_the_python_package_read() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/written.gguf");
    let written = golden();
    if std::env::var_os("PLAYHOUSE_BLESS").is_some() {
        std::fs::write(&path, &written).unwrap();
        println!("wrote {}: now run read_back.py beside it", path.display());
    }
    let expected = std::fs::read(&path).unwrap();
    assert!(written == expected, "the writer's bytes changed: see tests/golden/gguf/README.md");
}
