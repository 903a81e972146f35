//! A checkpoint taken apart, to be changed and put together again.

use playhouse::dtype::DType;
use playhouse::gguf::writer::GgufWriter;
use playhouse::gguf::{GgufFile, Value};

/// A file as lists.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) keys: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) dtype: DType,
    pub(crate) bytes: Vec<u8>,
}

impl Parts {
    pub(crate) fn of(file: &GgufFile) -> Self {
        let keys = file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        let tensor = |info: &playhouse::gguf::TensorInfo| Tensor {
            name: info.name.clone(),
            dims: info.dims.clone(),
            dtype: info.dtype,
            bytes: file.bytes(info).unwrap().to_vec(),
        };
        Self { keys, tensors: file.tensors().map(tensor).collect() }
    }

    pub(crate) fn file(&self, label: &str) -> GgufFile {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.keys {
            writer.set(key.clone(), value.clone());
        }
        for tensor in &self.tensors {
            writer.tensor(&tensor.name, &tensor.dims, tensor.dtype);
        }
        let data: Vec<&[u8]> = self.tensors.iter().map(|t| t.bytes.as_slice()).collect();
        GgufFile::from_vec(label, writer.to_vec(&data).unwrap()).unwrap()
    }

    pub(crate) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.to_owned(), value.into()));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    pub(crate) fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.name != name);
        self
    }

    /// Adds a tensor of zeros.
    pub(crate) fn with_tensor(mut self, name: &str, dims: &[u64]) -> Self {
        let n: u64 = dims.iter().product();
        let bytes = vec![0; 4 * n as usize];
        self.tensors.push(Tensor { name: name.into(), dims: dims.into(), dtype: DType::F32, bytes });
        self
    }

    /// Replaces a tensor's shape, with zeros for data.
    pub(crate) fn reshaped(self, name: &str, dims: &[u64]) -> Self {
        self.without_tensor(name).with_tensor(name, dims)
    }
}

impl Tensor {
    pub(crate) fn f32s(&self) -> Vec<f32> {
        let n: u64 = self.dims.iter().product();
        let mut values = vec![0.0; n as usize];
        self.dtype.decode(&self.bytes, &mut values).unwrap();
        values
    }

    /// The same values in another type.
    pub(crate) fn encoded(&self, dtype: DType) -> Tensor {
        let values = self.f32s();
        let row = dtype.row_bytes(self.dims[0] as usize).unwrap();
        let mut bytes = vec![0; row * (values.len() / self.dims[0] as usize)];
        dtype.encode(&values, &mut bytes).unwrap();
        Tensor { name: self.name.clone(), dims: self.dims.clone(), dtype, bytes }
    }
}
