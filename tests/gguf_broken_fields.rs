//! Every field of a valid file is broken in every way we know; each time the reader must name exactly that field.

mod gguf_support;

use gguf_support::{Built, Field, RawFile, What, type_bytes, valid};
use playhouse::gguf::{GgufErrorKind as Kind, GgufFile};

/// A broken file and what the reader must say about it.
struct Case {
    name: String,
    bytes: Vec<u8>,
    kind: Kind,
    offset: u64,
    subject: String,
}

const LABEL: &str = "broken.gguf";

fn check(case: &Case) {
    let Case { name, bytes, kind, offset, subject } = case;
    let e = match GgufFile::from_vec(LABEL, bytes.clone()) {
        Ok(_) => panic!("{name}: accepted"),
        Err(e) => e,
    };
    let message = e.to_string();
    assert_eq!(e.kind(), *kind, "{name}: {message}");
    assert_eq!(e.offset(), *offset, "{name}: {message}");
    assert_eq!(e.subject().to_string(), *subject, "{name}: {message}");
    let start = format!("{LABEL}: byte {offset}: {subject}: {}: expected ", kind.message());
    assert!(message.starts_with(&start), "{name}: {message}");
    assert!(!e.expected().is_empty() && !e.found().is_empty(), "{name}: {message}");
    assert!(message.len() < 1000 && !message.contains('\n'), "{name}: {message}");
}

/// Collects cases against one file.
struct Table {
    file: Built,
    cases: Vec<Case>,
}

impl Table {
    /// `field` is overwritten by `new`; the error is about the field.
    fn overwrite(&mut self, field: &Field, new: &[u8], kind: Kind) {
        self.overwrite_at(field, 0, new, kind, 0);
    }

    /// The bytes `at` bytes into the field are overwritten; the error is `shift` bytes into it.
    fn overwrite_at(&mut self, field: &Field, at: usize, new: &[u8], kind: Kind, shift: usize) {
        let bytes = self.file.with(field.start + at, new);
        let name = format!("{:?} of {} at {} := {new:02x?}", field.what, field.subject, field.start + at);
        let offset = (field.start + shift) as u64;
        self.cases.push(Case { name, bytes, kind, offset, subject: field.subject.clone() });
    }

    fn fields(&self, what: What) -> Vec<Field> {
        self.file.of(what).cloned().collect()
    }

    /// Each field of this kind takes each of these values.
    fn each_u32(&mut self, what: What, values: &[u32], kind: Kind) {
        for field in self.fields(what) {
            for v in values {
                self.overwrite(&field, &v.to_le_bytes(), kind);
            }
        }
    }

    fn each_u64(&mut self, what: What, values: &[u64], kind: Kind) {
        for field in self.fields(what) {
            for v in values {
                self.overwrite(&field, &v.to_le_bytes(), kind);
            }
        }
    }

    /// Bytes from the end of a field to the end of the file.
    fn room_after(&self, field: &Field) -> u64 {
        (self.file.bytes.len() - field.start - field.len) as u64
    }
}

fn header(t: &mut Table) {
    let magic = t.fields(What::Magic).remove(0);
    for i in 0..4 {
        let byte = t.file.bytes[i];
        for new in [0, byte ^ 0x20, 0xff] {
            t.overwrite_at(&magic, i, &[new], Kind::BadMagic, 0);
        }
    }
    for other in [b"FUGG", b"ggml", b"lmgg", b"tjgg", b"PK\x03\x04", b"vers", b"<!DO"] {
        t.overwrite(&magic, other, Kind::BadMagic);
    }
    t.each_u32(What::Version, &[0, 1, 4, 5, 255, 0x0001_0003, u32::MAX], Kind::BadVersion);
    t.each_u32(What::Version, &[1 << 24, 2 << 24, 3 << 24, 3 << 16], Kind::BigEndian);
    for what in [What::TensorCount, What::KeyCount] {
        t.each_u64(what, &[65_537, 1 << 31, 1 << 32, 1 << 62, 1 << 63, i64::MAX as u64, u64::MAX], Kind::TooLarge);
        let min = if what == What::TensorCount { 33 } else { 14 };
        for field in t.fields(what) {
            let room = t.room_after(&field) / min;
            t.overwrite(&field, &(room + 1).to_le_bytes(), Kind::Truncated);
            t.overwrite(&field, &65_536u64.to_le_bytes(), Kind::Truncated);
        }
    }
}

fn lengths(t: &mut Table) {
    for what in [What::KeyLen, What::NameLen, What::StrLen] {
        for field in t.fields(what) {
            let room = t.room_after(&field);
            for v in [room + 1, 1 << 32, 1 << 63, u64::MAX, u64::MAX - 7] {
                t.overwrite(&field, &v.to_le_bytes(), Kind::Truncated);
            }
        }
    }
    for what in [What::KeyLen, What::NameLen] {
        t.each_u64(what, &[0], Kind::EmptyName);
    }
    t.each_u64(What::NameLen, &[65, 255, 1000], Kind::NameTooLong);
}

fn text(t: &mut Table) {
    for what in [What::Key, What::Name, What::Str] {
        for field in t.fields(what) {
            let last = field.len - 1;
            // No UTF-8 byte; a continuation without a start; a start without its end.
            t.overwrite_at(&field, 0, &[0xff], Kind::InvalidUtf8, 0);
            t.overwrite_at(&field, 0, &[0x80], Kind::InvalidUtf8, 0);
            // The error is at the start of the broken character, which may stand before its last byte.
            let original = &t.file.bytes[field.start..field.start + field.len];
            let shift = std::str::from_utf8(original).unwrap().char_indices().last().unwrap().0;
            t.overwrite_at(&field, last, &[0xf0], Kind::InvalidUtf8, shift);
            if field.len >= 3 {
                // A surrogate, and an overlong form of NUL.
                t.overwrite_at(&field, 0, &[0xed, 0xa0, 0x80], Kind::InvalidUtf8, 0);
                t.overwrite_at(&field, 0, &[0xc0, 0x80], Kind::InvalidUtf8, 0);
            }
        }
    }
}

fn values(t: &mut Table) {
    t.each_u32(What::ValueType, &[13, 14, 0x100, 0x8000_0000, u32::MAX], Kind::UnknownValueType);
    t.each_u32(What::ElemType, &[13, 14, 0x100, 0x8000_0000, u32::MAX], Kind::UnknownValueType);
    t.each_u32(What::ElemType, &[9], Kind::NestedArray);
    t.each_u64(What::ArrayLen, &[(1 << 26) + 1, 1 << 61, 1 << 62, 1 << 63, u64::MAX], Kind::TooLarge);
    for field in t.fields(What::ArrayLen) {
        let id_at = field.start - 4;
        let id = u32::from_le_bytes(t.file.bytes[id_at..field.start].try_into().unwrap());
        let room = t.room_after(&field) / type_bytes(id) as u64;
        t.overwrite(&field, &(room + 1).to_le_bytes(), Kind::Truncated);
    }
    for field in t.fields(What::Bool) {
        for v in [2, 127, 255] {
            t.overwrite(&field, &[v], Kind::BadBool);
        }
    }
    let bools = t.file.field(What::Elems, "array.07").clone();
    for i in 0..3 {
        t.overwrite_at(&bools, i, &[2], Kind::BadBool, i);
    }
}

fn tensors(t: &mut Table) {
    t.each_u32(What::DimCount, &[0, 5, 6, 0x100, 0x8000_0000, u32::MAX], Kind::BadDimCount);
    t.each_u64(What::Dim, &[0], Kind::ZeroDim);
    for name in ["token_embd", "ffn", "exps", "norm"] {
        let dims: Vec<Field> = t.file.of(What::Dim).filter(|f| f.subject.contains(name)).cloned().collect();
        // Multiples of every block size; the error is at the first dimension.
        for (i, dim) in dims.iter().enumerate() {
            for v in [1 << 63, u64::MAX - 31, i64::MAX as u64 - 31] {
                let bytes = t.file.with(dim.start, &u64::to_le_bytes(v));
                t.cases.push(Case {
                    name: format!("dimension {i} of {name} := {v}"),
                    bytes,
                    kind: Kind::SizeOverflow,
                    offset: dims[0].start as u64,
                    subject: dim.subject.clone(),
                });
            }
            let offset = t.file.field(What::Offset, name).start as u64;
            for v in [1u64 << 20, 1 << 40] {
                let bytes = t.file.with(dim.start, &v.to_le_bytes());
                let name = format!("dimension {i} of {name} := {v}");
                t.cases.push(Case { name, bytes, kind: Kind::TensorOutside, offset, subject: dim.subject.clone() });
            }
        }
    }
    // Q8_0 has blocks of 32.
    let row = t.file.field(What::Dim, "ffn").clone();
    for v in [1u64, 16, 31, 33, 48] {
        t.overwrite(&row, &v.to_le_bytes(), Kind::RaggedRow);
    }
    t.each_u32(What::TensorType, &[99, 255, 0x100, 0x8000_0000, u32::MAX], Kind::UnknownTensorType);
    t.each_u32(
        What::TensorType,
        &[4, 5, 9, 15, 16, 17, 18, 19, 21, 22, 24, 25, 26, 27, 28, 29, 31, 34, 35, 36],
        Kind::UnsupportedTensorType,
    );
    t.each_u64(What::Offset, &[1, 4, 8, 16, 31, 33, u64::MAX, u64::MAX - 1], Kind::MisalignedTensor);
    t.each_u64(What::Offset, &[1 << 20, 1 << 62, 1 << 63, u64::MAX - 31], Kind::TensorOutside);
    // Each tensor on the end, and on the start, of the one before: the later one is named.
    for (name, offsets) in [("ffn", [992, 0]), ("exps", [1024 + 192, 1024]), ("norm", [1024 + 192, 1024 + 224])] {
        let field = t.file.field(What::Offset, name).clone();
        for offset in offsets {
            t.overwrite(&field, &u64::to_le_bytes(offset), Kind::TensorOverlap);
        }
    }
}

fn alignment(t: &mut Table) {
    let ty = t.file.field(What::ValueType, "general.alignment").clone();
    for v in [0u32, 1, 2, 4, 7, 9, 12, 24, 31, 33, 48, 4095, 4097, 8192, 1 << 31, u32::MAX] {
        t.overwrite_at(&ty, 4, &v.to_le_bytes(), Kind::BadAlignment, 0);
    }
    // i32 and f32 have the same length as u32, so the rest of the file still parses.
    for id in [5u32, 6] {
        t.overwrite(&ty, &id.to_le_bytes(), Kind::BadAlignment);
    }
}

/// One more entry with the name of each that is there.
fn duplicates(file: &RawFile, cases: &mut Vec<Case>) {
    for i in 0..file.keys.len() {
        let mut twice = file.clone();
        let key = twice.keys[i].0.clone();
        twice.keys.push((key.clone(), twice.keys[0].1.clone()));
        let built = twice.build();
        let len = built.of(What::KeyLen).last().unwrap();
        let subject = format!("key `{}`", String::from_utf8(key).unwrap());
        let (name, offset) = (format!("second {subject}"), len.start as u64);
        cases.push(Case { name, bytes: built.bytes.clone(), kind: Kind::DuplicateKey, offset, subject });
    }
    for i in 0..file.tensors.len() {
        let mut twice = file.clone();
        twice.tensors.push(twice.tensors[i].clone());
        let built = twice.build();
        let len = built.of(What::NameLen).last().unwrap();
        let subject = format!("tensor `{}`", String::from_utf8(twice.tensors[i].name.clone()).unwrap());
        let (name, offset) = (format!("second {subject}"), len.start as u64);
        cases.push(Case { name, bytes: built.bytes.clone(), kind: Kind::DuplicateTensor, offset, subject });
    }
}

/// What the reader must say about the first `len` bytes of a file.
fn truncated(file: &Built, len: usize) -> Case {
    let name = format!("first {len} bytes");
    let bytes = file.bytes[..len].to_vec();
    if let Some(need) = file.needs.iter().find(|n| n.end > len as u64) {
        let (offset, subject) = (need.offset, need.subject.clone());
        return Case { name, bytes, kind: Kind::Truncated, offset, subject };
    }
    // The tables are whole: the first tensor in the file's order that reaches too far is named.
    let sizes = [1024, 204, 32, 32];
    let mut ends = file.of(What::Offset).zip(sizes).map(|(f, size)| {
        let at = u64::from_le_bytes(file.bytes[f.start..f.start + 8].try_into().unwrap());
        (f, file.data_start as u64 + at + size)
    });
    let (field, _) = ends.find(|&(_, end)| end > len as u64).expect("a tensor is cut");
    Case { name, bytes, kind: Kind::TensorOutside, offset: field.start as u64, subject: field.subject.clone() }
}

#[test]
fn each_broken_field_is_named() {
    let file = valid();
    GgufFile::from_vec(LABEL, file.bytes()).expect("the unbroken file is valid");
    let mut table = Table { file: file.build(), cases: Vec::new() };
    header(&mut table);
    lengths(&mut table);
    text(&mut table);
    values(&mut table);
    tensors(&mut table);
    alignment(&mut table);
    duplicates(&file, &mut table.cases);
    table.cases.iter().for_each(check);
    println!("{} broken files refused", table.cases.len());
    assert!(table.cases.len() >= 400, "only {} cases", table.cases.len());
}

#[test]
fn each_prefix_is_named() {
    let file = valid().build();
    let cases: Vec<Case> = (0..file.bytes.len()).map(|len| truncated(&file, len)).collect();
    cases.iter().for_each(check);
    println!("{} prefixes refused", cases.len());
}
