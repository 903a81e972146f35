//! Regressions after published holes in other GGUF readers: each file here is built as the advisory describes, and
//! must be refused with a typed error that names the field. For advisories that are not about files (RPC servers,
//! KV state) it is the nearest thing that a file can carry.

mod gguf_support;

use gguf_support::*;
use playhouse::gguf::{GgufErrorKind as Kind, GgufFile, Value};

/// `bytes` must be refused with `kind` about `subject`, and the message must contain both and the label.
fn refused(bytes: Vec<u8>, kind: Kind, subject: &str) {
    let e = GgufFile::from_vec("hostile.gguf", bytes).expect_err("a hostile file was accepted");
    let message = e.to_string();
    assert_eq!(e.kind(), kind, "{message}");
    assert_eq!(e.subject().to_string(), subject, "{message}");
    let start = format!("hostile.gguf: byte {}: {subject}: {}", e.offset(), kind.message());
    assert!(message.starts_with(&start), "{message}");
}

/// A named regression per row: `name: kind, subject, file`.
macro_rules! regressions {
    ($($(#[$doc:meta])* $name:ident: $kind:ident, $subject:expr, $file:expr;)*) => {
        $($(#[$doc])* #[test] fn $name() { refused($file, Kind::$kind, $subject); })*

        #[test]
        fn there_are_at_least_forty() {
            let names = [$(stringify!($name)),*];
            assert!(names.len() >= 40, "{}", names.len());
        }
    };
}

fn empty() -> RawFile {
    RawFile::default().str("general.architecture", "llama")
}

/// A file whose only tensor has these dimensions and this type, with 4 KiB of data.
fn tensor(dims: &[u64], type_id: u32) -> Vec<u8> {
    empty().tensor("t", dims, type_id, 0).data(4096).bytes()
}

/// A header with these counts and nothing else but zeros.
fn counts(n_tensors: u64, n_keys: u64) -> Vec<u8> {
    let file = RawFile { n_tensors: Some(n_tensors), n_keys: Some(n_keys), ..RawFile::default() };
    let mut bytes = file.bytes();
    bytes.resize(4096, 0);
    bytes
}

/// A file with one array of this element type, length and content.
fn array(type_id: u32, len: u64, content: &[u8]) -> Vec<u8> {
    empty().key("a", RawValue::Array(type_id, len, content.to_vec())).bytes()
}

/// A file whose key `s` says it is a string of `len` bytes.
fn string_of_len(len: u64) -> Vec<u8> {
    let built = empty().str("s", "abc").build();
    built.with(built.field(What::StrLen, "`s`").start, &len.to_le_bytes())
}

fn aligned_to(v: u32) -> Vec<u8> {
    empty().u32("general.alignment", v).tensor("t", &[8], 0, 0).data(64).bytes()
}

/// `depth` arrays in each other.
fn nested(depth: usize) -> Vec<u8> {
    let mut content = Vec::new();
    for _ in 1..depth {
        content.extend_from_slice(&ARRAY.to_le_bytes());
        content.extend_from_slice(&1u64.to_le_bytes());
    }
    content.extend_from_slice(&U8.to_le_bytes());
    content.extend_from_slice(&1u64.to_le_bytes());
    content.push(7);
    array(ARRAY, 1, &content)
}

/// Two tensors of 2^62 bytes and more, whose sum wraps.
fn sum_wraps(type_id: u32, row: u64) -> Vec<u8> {
    empty().tensor("a", &[row], type_id, 0).tensor("b", &[row], type_id, 1 << 62).data(4096).bytes()
}

fn version(v: u32) -> Vec<u8> {
    RawFile { version: v, ..empty() }.bytes()
}

/// Version 1 had 32-bit counts and lengths.
fn version_1_layout() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    for v in [1u32, 0, 1, 3] {
        bytes.extend_from_slice(&v.to_le_bytes());
    }
    bytes.extend_from_slice(b"abc");
    bytes.extend_from_slice(&STR.to_le_bytes());
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    bytes
}

fn first(bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes[..len].to_vec()
}

fn many_tensors_of_one_name() -> Vec<u8> {
    (0..20_000).fold(empty(), |f, i| f.tensor(if i < 19_999 { "t" } else { "u" }, &[8], 0, 0)).data(64).bytes()
}

fn long_key() -> Vec<u8> {
    empty().u32(&"k".repeat(65_536), 1).bytes()
}

regressions! {
    /// `info->ne` products overflowed and a heap buffer was too small.
    cve_2024_21802_tensor_dims_product_wraps: SizeOverflow, "tensor `t`", tensor(&[1 << 32, 1 << 32], 0);
    cve_2024_21802_tensor_dims_product_wraps_to_small: SizeOverflow, "tensor `t`", tensor(&[1 << 33, 1 << 31, 2, 8], 0);
    cve_2024_21802_more_dimensions_than_ne_has: BadDimCount, "tensor `t`", tensor(&[1, 1, 1, 1, 1], 0);
    /// Array lengths of keys were multiplied without a check.
    cve_2024_21825_array_bytes_wrap_u32: Truncated, "key `a`", array(U64, 1 << 26, &[0; 64]);
    cve_2024_21825_array_bytes_wrap_u64: TooLarge, "key `a`", array(U64, 1 << 61, &[0; 64]);
    cve_2024_21825_string_array_pointers_wrap: TooLarge, "key `a`", array(STR, 1 << 60, &[0; 64]);
    /// `header.n_tensors * sizeof(info)` wrapped.
    cve_2024_21836_tensor_count_wraps: TooLarge, "header field `n_tensors`", counts(0x0333_3333_3333_3334, 0);
    cve_2024_21836_tensor_count_max: TooLarge, "header field `n_tensors`", counts(u64::MAX, 0);
    cve_2024_21836_tensor_count_negative: TooLarge, "header field `n_tensors`", counts(1 << 63, 0);
    /// A string of length 2^64 - 1 got `length + 1` bytes.
    cve_2024_23496_string_length_plus_one_wraps: Truncated, "key `s`", string_of_len(u64::MAX);
    cve_2024_23496_string_length_one_too_many: Truncated, "key `s`", string_of_len(4);
    cve_2024_23496_key_length_plus_one_wraps: Truncated, "metadata entry 0", {
        let built = empty().build();
        built.with(built.field(What::KeyLen, "entry 0").start, &u64::MAX.to_le_bytes())
    };
    /// `header.n_kv * sizeof(kv)` wrapped.
    cve_2024_23605_key_count_wraps: TooLarge, "header field `n_kv`", counts(0, 0x0555_5555_5555_5556);
    cve_2024_23605_key_count_max: TooLarge, "header field `n_kv`", counts(0, u64::MAX);
    cve_2024_23605_key_count_over_the_file: Truncated, "header field `n_kv`", counts(0, 60_000);
    /// A failed read freed what was never read.
    cve_2024_32878_file_ends_in_a_key: Truncated, "metadata entry 0", first(empty().bytes(), 40);
    cve_2024_32878_file_ends_in_an_array_of_strings: Truncated, "key `a`", array(STR, 2, &[1, 0, 0, 0, 0, 0, 0, 0, 65, 9, 0, 0, 0, 0, 0, 0, 0]);
    /// A missing value was a null pointer.
    cve_2024_41130_file_ends_after_a_type: Truncated, "key `general.architecture`", first(empty().bytes(), 24 + 8 + 20 + 4);
    /// A token's length was cast to `int32_t`.
    cve_2025_49847_token_length_negative_as_i32: Truncated, "key `a`", {
        let mut content = 0x8000_0001u64.to_le_bytes().to_vec();
        content.extend_from_slice(b"token");
        array(STR, 1, &content)
    };
    /// Signed and unsigned lengths were compared.
    cve_2025_52566_token_length_negative_as_i64: Truncated, "key `a`", {
        let mut content = (-5i64).to_le_bytes().to_vec();
        content.extend_from_slice(b"token");
        array(STR, 1, &content)
    };
    /// Tensor sizes were summed without a check.
    cve_2025_53630_sum_of_sizes_wraps: TensorOutside, "tensor `a`", sum_wraps(0, 1 << 60);
    cve_2025_53630_sum_of_sizes_wraps_quantised: TensorOutside, "tensor `a`", sum_wraps(8, 1 << 61);
    /// The check for the above left `overhead + size` to wrap.
    cve_2026_27940_size_just_below_the_wrap: TensorOutside, "tensor `t`", tensor(&[(1 << 61) - 32], 0);
    cve_2026_27940_offset_plus_size_wraps: TensorOutside, "tensor `t`", empty().tensor("t", &[1024], 0, u64::MAX - 4095).data(4096).bytes();
    /// `ggml_nbytes` overflowed.
    cve_2026_33298_bytes_wrap_where_elements_do_not: SizeOverflow, "tensor `t`", tensor(&[1 << 62], 0);
    cve_2026_33298_strides_wrap: SizeOverflow, "tensor `t`", tensor(&[1 << 31, 1 << 31, 2, 2], 1);
    /// Unnumbered proofs of concept of 2026.
    poc_pad_of_size_wraps: SizeOverflow, "tensor `t`", tensor(&[u64::MAX / 4], 0);
    poc_row_size_of_ragged_row: RaggedRow, "tensor `t`", tensor(&[33], 8);
    poc_row_size_of_ragged_superblock: RaggedRow, "tensor `t`", tensor(&[128, 2], 12);
    poc_second_dimension_zero_divides: ZeroDim, "tensor `t`", tensor(&[32, 0], 0);
    poc_first_dimension_zero: ZeroDim, "tensor `t`", tensor(&[0], 0);
    poc_negative_dimension: SizeOverflow, "tensor `t`", tensor(&[(-32i64) as u64], 0);
    poc_alignment_0x80000000: BadAlignment, "key `general.alignment`", aligned_to(0x8000_0000);
    poc_nested_arrays_overflow_the_stack: NestedArray, "key `a`", nested(6_000);
    poc_nested_array_once: NestedArray, "key `a`", nested(2);
    poc_tensor_name_without_end: NameTooLong, "tensor entry 0", empty().tensor(&"n".repeat(65), &[8], 0, 0).data(64).bytes();
    poc_tensor_type_out_of_the_table: UnknownTensorType, "tensor `t`", tensor(&[32], 0x7fff_ffff);
    poc_tensor_type_negative: UnknownTensorType, "tensor `t`", tensor(&[32], u32::MAX);
    poc_tensor_type_withdrawn_has_block_size_zero: UnsupportedTensorType, "tensor `t`", tensor(&[32], 4);
    poc_value_type_negative: UnknownValueType, "key `k`", empty().key("k", RawValue::Scalar(u32::MAX, vec![0; 8])).bytes();
    poc_overlapping_tensors_alias_weights: TensorOverlap, "tensor `b`", empty().tensor("a", &[16], 0, 0).tensor("b", &[8], 0, 32).data(64).bytes();
    poc_header_as_tensor_data: MisalignedTensor, "tensor `t`", empty().tensor("t", &[8], 0, (-8i64) as u64).data(64).bytes();
    /// oss-security of 2026-05-15.
    oss_sec_2026_05_15_alignment_unbounded: BadAlignment, "key `general.alignment`", aligned_to(1 << 20);
    oss_sec_2026_05_15_array_exhausts_memory: TooLarge, "key `a`", array(U8, 1 << 40, &[0; 64]);
    oss_sec_2026_05_15_string_exhausts_memory: Truncated, "key `s`", string_of_len(1 << 40);
    /// Ollama.
    cve_2024_39720_only_the_magic: Truncated, "header field `version`", b"GGUF".to_vec();
    cve_2024_12055_array_reads_beyond_the_file: Truncated, "key `a`", array(F64, 9, &[0; 64]);
    cve_2024_8063_alignment_zero_divides: BadAlignment, "key `general.alignment`", aligned_to(0);
    cve_2025_0312_tensor_without_dimensions: BadDimCount, "tensor `t`", tensor(&[], 0);
    cve_2025_0315_unlimited_allocation: TooLarge, "key `a`", array(STR, u64::MAX, &[]);
    cve_2025_0315_long_key: NameTooLong, "metadata entry 1", long_key();
    cve_2025_0317_alignment_of_another_type: BadAlignment, "key `general.alignment`", empty().key("general.alignment", RawValue::Scalar(U64, vec![0; 8])).bytes();
    cve_2025_1975_more_tensors_than_described: Truncated, "tensor entry 1", {
        RawFile { n_tensors: Some(2), ..empty().tensor("t", &[8, 1, 1, 1], 0, 0) }.bytes()
    };
    cve_2025_66960_version_1_string_length: BadVersion, "header field `version`", version_1_layout();
    cve_2026_7482_bleeding_llama_tensor_beyond_the_file: TensorOutside, "tensor `t`", tensor(&[1025], 0);
    cve_2026_7482_bleeding_llama_offset_beyond_the_file: TensorOutside, "tensor `t`", empty().tensor("t", &[8], 0, 4096).data(4096).bytes();
    /// Readers with a list per name were quadratic here.
    duplicate_names_are_found_at_once: DuplicateTensor, "tensor `t`", many_tensors_of_one_name();
    duplicate_key_replaces_a_checked_one: DuplicateKey, "key `general.architecture`", empty().str("general.architecture", "gpt2").bytes();
    empty_key: EmptyName, "metadata entry 1", empty().u32("", 1).bytes();
    version_of_the_future: BadVersion, "header field `version`", version(4);
    big_endian_version: BigEndian, "header field `version`", version(3 << 24);
    bool_that_is_neither: BadBool, "key `b`", empty().key("b", RawValue::Scalar(BOOL, vec![2])).bytes();
}

/// Readers cast the pointer of `scores` to floats without looking at its type.
#[test]
fn poc_scores_of_bytes_are_not_read_as_floats() {
    let file = empty().key("tokenizer.ggml.scores", RawValue::Array(I8, 4, vec![0; 4])).bytes();
    let file = GgufFile::from_vec("hostile.gguf", file).unwrap();
    let e = file.metadata().f32s("tokenizer.ggml.scores").unwrap_err();
    assert_eq!(e.kind(), Kind::WrongType);
    assert!(e.to_string().contains("expected an array of f32, found array of 4 i8"), "{e}");
}

/// A block count of 0, a negative index: integers keep their sign and range whatever their width.
#[test]
fn cve_2026_21869_negative_counts_are_not_huge() {
    let minus_one = RawValue::Scalar(I32, (-1i32).to_le_bytes().to_vec());
    let file = GgufFile::from_vec("hostile.gguf", empty().key("n", minus_one).bytes()).unwrap();
    for e in [file.metadata().u32("n").unwrap_err(), file.metadata().u64("n").unwrap_err()] {
        assert_eq!(e.kind(), Kind::WrongType);
    }
    assert_eq!(file.metadata().i32("n").unwrap(), -1);
    assert_eq!(file.metadata().get("n"), Some(&Value::I32(-1)));
}

/// Two broken strings that would make a valid one together.
#[test]
fn utf8_is_checked_for_each_element() {
    let strs = RawValue::Strs(vec![b"a\xc3".to_vec(), b"\xa9b".to_vec()]);
    refused(empty().key("a", strs).bytes(), Kind::InvalidUtf8, "key `a`");
}

/// Names from a file are shortened and escaped: an error is one line, and cannot steer a terminal.
#[test]
fn hostile_names_cannot_steer_the_terminal() {
    let key = format!("\u{1b}[2J\n{}", "x".repeat(10_000));
    let bytes = empty().key(&key, RawValue::Scalar(99, vec![])).bytes();
    let message = GgufFile::from_vec("hostile.gguf", bytes).unwrap_err().to_string();
    assert!(message.len() < 400 && !message.contains(['\u{1b}', '\n']), "{message}");
    assert!(message.contains("\\u{1b}[2J\\n"), "{message}");
}
