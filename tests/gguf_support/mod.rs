//! Builds GGUF files field by field and remembers where each field stands, so that tests can break one of them and
//! know what the reader must say. Independent of the crate's writer: it can write what the format forbids.

#![allow(dead_code, unreachable_pub, reason = "each test binary, and the fuzz targets, use a part of it")]

/// What a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    Magic,
    Version,
    TensorCount,
    KeyCount,
    KeyLen,
    Key,
    ValueType,
    ElemType,
    ArrayLen,
    StrLen,
    Str,
    Bool,
    Scalar,
    Elems,
    NameLen,
    Name,
    DimCount,
    Dim,
    TensorType,
    Offset,
}

/// One field of a file.
#[derive(Debug, Clone)]
pub struct Field {
    pub what: What,
    /// The key, tensor or header field, as errors name it.
    pub subject: String,
    pub start: usize,
    pub len: usize,
}

/// The file must reach to `end`, or the reader complains about the field at `offset`.
#[derive(Debug, Clone)]
pub struct Need {
    pub end: u64,
    pub offset: u64,
    pub subject: String,
}

/// A metadata value that need not be valid.
#[derive(Debug, Clone)]
pub enum RawValue {
    /// Type id and bytes.
    Scalar(u32, Vec<u8>),
    Str(Vec<u8>),
    /// Element type id, number of elements and their bytes.
    Array(u32, u64, Vec<u8>),
    Strs(Vec<Vec<u8>>),
}

/// A tensor description that need not be valid.
#[derive(Debug, Clone)]
pub struct RawTensor {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub type_id: u32,
    pub offset: u64,
}

/// What a file is made of.
#[derive(Debug, Clone)]
pub struct RawFile {
    pub magic: [u8; 4],
    pub version: u32,
    /// `None`: as many as there are.
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, RawValue)>,
    pub tensors: Vec<RawTensor>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

impl Default for RawFile {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            data: Vec::new(),
        }
    }
}

/// A file's bytes and the map of its fields.
#[derive(Debug, Clone, Default)]
pub struct Built {
    pub bytes: Vec<u8>,
    pub fields: Vec<Field>,
    pub needs: Vec<Need>,
    pub data_start: usize,
}

pub const U8: u32 = 0;
pub const I8: u32 = 1;
pub const U16: u32 = 2;
pub const I16: u32 = 3;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STR: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;
pub const I64: u32 = 11;
pub const F64: u32 = 12;

/// Bytes of a scalar of a type; of a string's length and of an array's header for those.
pub fn type_bytes(id: u32) -> usize {
    match id {
        U8 | I8 | BOOL => 1,
        U16 | I16 => 2,
        U32 | I32 | F32 => 4,
        ARRAY => 12,
        _ => 8,
    }
}

impl RawFile {
    pub fn key(mut self, key: &str, value: RawValue) -> Self {
        self.keys.push((key.as_bytes().to_vec(), value));
        self
    }

    pub fn u32(self, key: &str, v: u32) -> Self {
        self.key(key, RawValue::Scalar(U32, v.to_le_bytes().to_vec()))
    }

    pub fn str(self, key: &str, v: &str) -> Self {
        self.key(key, RawValue::Str(v.as_bytes().to_vec()))
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
        self.tensors.push(RawTensor { name: name.as_bytes().to_vec(), dims: dims.to_vec(), type_id, offset });
        self
    }

    pub fn data(mut self, n_bytes: usize) -> Self {
        self.data = (0..n_bytes).map(|i| i as u8).collect();
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.build().bytes
    }

    pub fn build(&self) -> Built {
        let mut b = Built::default();
        let n_tensors = self.n_tensors.unwrap_or(self.tensors.len() as u64);
        let n_keys = self.n_keys.unwrap_or(self.keys.len() as u64);
        b.put(What::Magic, "header field `magic`", &self.magic);
        b.put(What::Version, "header field `version`", &self.version.to_le_bytes());
        b.put_count(What::TensorCount, "header field `n_tensors`", n_tensors, 33);
        b.put_count(What::KeyCount, "header field `n_kv`", n_keys, 14);
        for (i, (key, value)) in self.keys.iter().enumerate() {
            b.put_str(What::KeyLen, What::Key, &format!("metadata entry {i}"), key);
            b.put_value(&format!("key `{}`", String::from_utf8_lossy(key)), value);
        }
        for (i, t) in self.tensors.iter().enumerate() {
            b.put_str(What::NameLen, What::Name, &format!("tensor entry {i}"), &t.name);
            let subject = format!("tensor `{}`", String::from_utf8_lossy(&t.name));
            b.put(What::DimCount, &subject, &(t.dims.len() as u32).to_le_bytes());
            for d in &t.dims {
                b.put(What::Dim, &subject, &d.to_le_bytes());
            }
            b.put(What::TensorType, &subject, &t.type_id.to_le_bytes());
            b.put(What::Offset, &subject, &t.offset.to_le_bytes());
        }
        if !self.data.is_empty() {
            let padded = b.bytes.len().next_multiple_of(self.alignment);
            b.bytes.resize(padded, 0);
        }
        b.data_start = b.bytes.len();
        b.bytes.extend_from_slice(&self.data);
        b
    }
}

impl Built {
    fn put(&mut self, what: What, subject: &str, bytes: &[u8]) {
        let (start, len) = (self.bytes.len(), bytes.len());
        self.fields.push(Field { what, subject: subject.to_owned(), start, len });
        self.bytes.extend_from_slice(bytes);
        let is_text = matches!(what, What::Key | What::Name | What::Str | What::Elems);
        if !is_text {
            self.need(start, self.bytes.len() as u64, subject);
        }
    }

    /// A later error than those before, about the field at `offset`.
    fn need(&mut self, offset: usize, end: u64, subject: &str) {
        self.needs.push(Need { end, offset: offset as u64, subject: subject.to_owned() });
    }

    fn put_count(&mut self, what: What, subject: &str, count: u64, min_bytes: u64) {
        let start = self.bytes.len();
        self.put(what, subject, &count.to_le_bytes());
        self.need(start, (start as u64 + 8).saturating_add(count.saturating_mul(min_bytes)), subject);
    }

    fn put_str(&mut self, len_what: What, what: What, subject: &str, text: &[u8]) {
        let start = self.bytes.len();
        self.put(len_what, subject, &(text.len() as u64).to_le_bytes());
        self.need(start, (start + 8 + text.len()) as u64, subject);
        if !text.is_empty() {
            self.put(what, subject, text);
        }
    }

    fn put_value(&mut self, subject: &str, value: &RawValue) {
        let type_field = |b: &mut Self, what, id: u32| b.put(what, subject, &id.to_le_bytes());
        match value {
            RawValue::Scalar(id, bytes) => {
                type_field(self, What::ValueType, *id);
                let what = if *id == BOOL { What::Bool } else { What::Scalar };
                self.put(what, subject, bytes);
            }
            RawValue::Str(text) => {
                type_field(self, What::ValueType, STR);
                self.put_str(What::StrLen, What::Str, subject, text);
            }
            RawValue::Array(id, n, bytes) => {
                type_field(self, What::ValueType, ARRAY);
                type_field(self, What::ElemType, *id);
                self.put_count(What::ArrayLen, subject, *n, type_bytes(*id) as u64);
                if !bytes.is_empty() {
                    self.put(What::Elems, subject, bytes);
                }
            }
            RawValue::Strs(strs) => {
                type_field(self, What::ValueType, ARRAY);
                type_field(self, What::ElemType, STR);
                self.put_count(What::ArrayLen, subject, strs.len() as u64, 8);
                for s in strs {
                    self.put_str(What::StrLen, What::Str, subject, s);
                }
            }
        }
    }

    /// The bytes with `new` written at `start`.
    pub fn with(&self, start: usize, new: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[start..start + new.len()].copy_from_slice(new);
        bytes
    }

    /// All fields of a kind.
    pub fn of(&self, what: What) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(move |f| f.what == what)
    }

    /// The first field of a kind whose subject contains `text`.
    pub fn field(&self, what: What, text: &str) -> &Field {
        self.of(what).find(|f| f.subject.contains(text)).expect("the file has this field")
    }
}

/// A valid file with a key of each type, an array of each type, and tensors of one to four dimensions.
pub fn valid() -> RawFile {
    let mut file = RawFile::default().str("general.architecture", "llama").u32("general.alignment", 32);
    for id in [U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64] {
        let n = type_bytes(id);
        let mut one = vec![0; n];
        one[0] = 1;
        file = file.key(&format!("scalar.{id:02}"), RawValue::Scalar(id, one.clone()));
        file = file.key(&format!("array.{id:02}"), RawValue::Array(id, 3, one.repeat(3)));
    }
    let tokens = ["<s>", "été", "日本", "ab"].map(|s| s.as_bytes().to_vec()).to_vec();
    file = file.key("tokenizer.tokens", RawValue::Strs(tokens));
    file = file.str("tokenizer.template", "{{ messages }} 🎋");
    file.tensor("token_embd.weight", &[64, 4], 0, 0)
        .tensor("blk.0.ffn.weight", &[32, 2, 3], 8, 1024)
        .tensor("blk.0.exps.weight", &[2, 2, 2, 2], 1, 1024 + 224)
        .tensor("output_norm.weight", &[8], 0, 1024 + 224 + 32)
        .data(1024 + 224 + 32 + 32)
}

/// A change to a file's bytes; the numbers are taken modulo what the file has.
#[derive(Debug, Clone)]
pub enum Mutation {
    /// One byte.
    Byte(usize, u8),
    /// A whole field, little-endian, as far as it is long.
    Field(usize, u64),
    /// A field becomes what another one is.
    CopyField(usize, usize),
    /// Everything behind goes.
    Truncate(usize),
    /// A range goes.
    Remove(usize, usize),
    /// A range is there twice.
    Repeat(usize, usize),
}

/// Numbers at which checks go wrong.
pub const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    33,
    64,
    65,
    4096,
    65_536,
    1 << 26,
    1 << 31,
    1 << 32,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// The file's bytes after all mutations, each on what the one before left.
pub fn mutate(file: &Built, mutations: &[Mutation]) -> Vec<u8> {
    let mut bytes = file.bytes.clone();
    for m in mutations {
        let len = bytes.len().max(1);
        // Fields keep their place as long as nothing before them was removed; that is good enough.
        let field = |i: usize| &file.fields[i % file.fields.len()];
        match *m {
            Mutation::Byte(at, v) => {
                if let Some(b) = bytes.get_mut(at % len) {
                    *b = v;
                }
            }
            Mutation::Field(i, v) => {
                let f = field(i);
                bytes.iter_mut().skip(f.start).take(f.len).zip(v.to_le_bytes()).for_each(|(b, v)| *b = v);
            }
            Mutation::CopyField(from, to) => {
                let (from, to) = (field(from), field(to));
                let source: Vec<u8> = bytes.iter().skip(from.start).take(from.len).copied().collect();
                bytes.iter_mut().skip(to.start).take(to.len).zip(source).for_each(|(b, v)| *b = v);
            }
            Mutation::Truncate(at) => bytes.truncate(at % len),
            Mutation::Remove(at, n) => {
                let at = (at % len).min(bytes.len());
                let end = (at + n % 64).min(bytes.len());
                bytes.drain(at..end);
            }
            Mutation::Repeat(at, n) => {
                let at = (at % len).min(bytes.len());
                let end = (at + n % 64).min(bytes.len());
                let range = bytes[at..end].to_vec();
                bytes.splice(at..at, range);
            }
        }
    }
    bytes
}

/// Holds for any bytes: they are refused with a one-line error that names the file, or everything they say is there
/// and what the writer makes of it reads back the same.
pub fn check_any_bytes(bytes: &[u8]) {
    use playhouse::gguf::GgufFile;
    let file = match GgufFile::from_vec("any.gguf", bytes.to_vec()) {
        Ok(file) => file,
        Err(e) => {
            let message = e.to_string();
            assert!(message.starts_with("any.gguf: byte "), "{message}");
            assert!(message.len() < 2000 && !message.contains(|c: char| c.is_control()), "{message}");
            assert!(e.offset() <= bytes.len() as u64, "{message}");
            return;
        }
    };
    let once = rewrite(&file);
    let again = rewrite(&GgufFile::from_vec("once.gguf", once.clone()).expect("what we write is valid"));
    assert!(once == again, "a file changed by being written twice");
}

/// The file as our writer writes it.
pub fn rewrite(file: &playhouse::gguf::GgufFile) -> Vec<u8> {
    let mut w = playhouse::gguf::writer::GgufWriter::new();
    for (key, value) in file.metadata().iter() {
        w.set(key, value.clone());
    }
    let mut data = Vec::new();
    for t in file.tensors() {
        w.tensor(t.name.clone(), &t.dims, t.dtype);
        let bytes = file.bytes(t).expect("the bytes of a checked tensor");
        assert_eq!(bytes.len() as u64, t.n_bytes());
        assert_eq!(t.n_rows() * t.row_len(), t.n_elems());
        data.push(bytes);
    }
    let slices: Vec<&[u8]> = data.iter().map(|d| &d[..]).collect();
    w.to_vec(&slices).expect("what the reader accepts, the writer writes")
}
