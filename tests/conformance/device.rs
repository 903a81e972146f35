//! The devices of this machine, and what a test needs to use one.

use playhouse::backend::cuda::CudaBackend;
use playhouse::backend::{BLOCK_TOKENS, Backend, Batch, Join, KvDtype, KvLayout, SeqSpan, WeightSource, WeightUse};
use playhouse::dtype::DType;
use playhouse::engine::DeviceName;
use playhouse::gguf::TensorBytes;

/// Runs a generic test body on every device: `on_every_backend!(name, body)`.
macro_rules! on_every_backend {
    ($($name:ident = $body:path;)*) => {$(
        #[test]
        fn $name() {
            for (name, backend) in playhouse::backend::cpu::CpuBackend::each_instruction_set(2) {
                let mut device = $crate::device::Device::cpu(name, backend);
                $body(&mut device);
            }
            if let Some(mut device) = $crate::device::gpu(stringify!($name)) {
                $body(&mut device);
            }
        }
    )*};
}
pub(crate) use on_every_backend;

/// A backend under test.
pub(crate) struct Device<B> {
    pub(crate) name: &'static str,
    pub(crate) backend: B,
    /// Largest error of an op relative to the sum of magnitudes that went into it.
    pub(crate) tolerance: f64,
    /// Head sizes that it takes; all if `None`.
    pub(crate) head_dims: Option<&'static [usize]>,
    /// How it can store keys and values, the most exact first.
    pub(crate) kv_dtypes: &'static [KvDtype],
}

impl<B> Device<B> {
    /// A CPU: f32 throughout.
    pub(crate) fn cpu(name: &'static str, backend: B) -> Self {
        let kv_dtypes = &[KvDtype::F32, KvDtype::F16, KvDtype::Q8_0];
        Self { name, backend, tolerance: 4e-6, head_dims: None, kv_dtypes }
    }

    pub(crate) fn has_head(&self, head_dim: usize) -> bool {
        self.head_dims.is_none_or(|all| all.contains(&head_dim))
    }

    /// The way to store keys and values that comes nearest to a wanted one, if it has it or a finer one is wanted.
    pub(crate) fn kv_like(&self, wanted: KvDtype) -> Option<KvDtype> {
        match wanted {
            KvDtype::F32 => self.kv_dtypes.first().copied(),
            other => self.kv_dtypes.contains(&other).then_some(other),
        }
    }
}

/// The first GPU, or `None` with a line that says why the test does not run on one.
///
/// Weights and activations are rounded to f16 on the way into a product, half a unit in the last place (2^-12) each, and
/// what they were rounded from may itself come out of such a product: 2^-10 of the magnitudes.
pub(crate) fn gpu(test: &str) -> Option<Device<CudaBackend>> {
    let opened = DeviceName::find("gpu")
        .map_err(|e| e.to_string())
        .and_then(|name| CudaBackend::open(&name.to_string(), None).map_err(|e| e.to_string()));
    match opened {
        Ok(backend) => Some(Device {
            name: "cuda",
            backend,
            tolerance: 1.0 / 1024.0,
            head_dims: Some(&[16, 32, 64, 96, 128]),
            kv_dtypes: &[KvDtype::F16, KvDtype::Q8_0],
        }),
        Err(reason) => {
            println!("{test} does not run on a GPU: {reason}");
            None
        }
    }
}

/// Numbers that went to a device: what was encoded, as it decodes.
pub(crate) struct Held<W> {
    pub(crate) weight: W,
    pub(crate) values: Vec<f32>,
}

impl<B: Backend> Device<B> {
    /// A stack of `n_mats` random matrices in `dtype`, with values of about `scale`.
    pub(crate) fn matrices(
        &mut self,
        random: &mut Random,
        dtype: DType,
        (n_mats, n_rows, n_cols): (usize, usize, usize),
        scale: f32,
    ) -> Held<B::Weight> {
        let n = n_mats * n_rows * n_cols;
        let bytes = random.encoded(dtype, n, scale);
        let mut values = vec![0.0; n];
        dtype.decode(&bytes, &mut values).unwrap();
        let bytes = TensorBytes::from_vec(bytes);
        let source = WeightSource { name: "test.weight", dtype, n_mats, n_rows, n_cols, bytes, uses: WeightUse::ANY };
        Held { weight: self.backend.weight(source).unwrap(), values }
    }

    /// Random matrices that one op uses together, made resident by one call if `join` says so.
    pub(crate) fn group(
        &mut self,
        random: &mut Random,
        dtype: DType,
        shapes: &[(usize, usize, usize)],
        scale: f32,
        join: Option<Join>,
    ) -> Vec<Held<B::Weight>> {
        let Some(join) = join else {
            return shapes.iter().map(|shape| self.matrices(random, dtype, *shape, scale)).collect();
        };
        let mut all_values = Vec::new();
        let mut sources = Vec::new();
        for &(n_mats, n_rows, n_cols) in shapes {
            let bytes = random.encoded(dtype, n_mats * n_rows * n_cols, scale);
            let mut values = vec![0.0; n_mats * n_rows * n_cols];
            dtype.decode(&bytes, &mut values).unwrap();
            all_values.push(values);
            let (name, uses, bytes) = ("test.joined", WeightUse::PRODUCT, TensorBytes::from_vec(bytes));
            sources.push(WeightSource { name, dtype, n_mats, n_rows, n_cols, bytes, uses });
        }
        let weights = self.backend.joined(sources, join).unwrap();
        weights.into_iter().zip(all_values).map(|(weight, values)| Held { weight, values }).collect()
    }

    /// f32 vectors, made resident by one call.
    pub(crate) fn joined_vectors(&mut self, all: &[Vec<f32>]) -> Vec<B::Weight> {
        let source = |values: &Vec<f32>| {
            let bytes = TensorBytes::from_vec(bytemuck::cast_slice(values).to_vec());
            let (name, dtype, uses) = ("test.biases", DType::F32, WeightUse::VALUES);
            WeightSource { name, dtype, n_mats: 1, n_rows: 1, n_cols: values.len(), bytes, uses }
        };
        self.backend.joined(all.iter().map(source).collect(), Join::Stacked).unwrap()
    }

    /// An f32 vector.
    pub(crate) fn vector(&mut self, values: &[f32]) -> B::Weight {
        self.matrix_of(values, 1)
    }

    /// An f32 matrix of `n_rows` rows.
    pub(crate) fn matrix_of(&mut self, values: &[f32], n_rows: usize) -> B::Weight {
        let bytes = TensorBytes::from_vec(bytemuck::cast_slice(values).to_vec());
        let n_cols = values.len() / n_rows;
        let source = WeightSource {
            name: "test.vector",
            dtype: DType::F32,
            n_mats: 1,
            n_rows,
            n_cols,
            bytes,
            uses: WeightUse::ANY,
        };
        self.backend.weight(source).unwrap()
    }

    /// A tensor that holds `values` as `n_rows` rows; leaves a batch of `n_rows` tokens begun.
    pub(crate) fn tensor_of(&mut self, values: &[f32], n_rows: usize) -> B::Tensor {
        let table = self.matrix_of(values, n_rows);
        let mut tensor = self.backend.tensor(n_rows, values.len() / n_rows).unwrap();
        self.backend.begin(&plain_batch(n_rows)).unwrap();
        self.backend.embed(&table, 1.0, &mut tensor);
        tensor
    }

    /// The first `n` elements of a tensor.
    pub(crate) fn read(&mut self, tensor: &B::Tensor, n: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; n];
        self.backend.read(tensor, &mut out).unwrap();
        out
    }

    /// Replaces the KV cache.
    pub(crate) fn kv(&mut self, n_layers: usize, n_kv_heads: usize, head_dim: usize, dtype: KvDtype) {
        let dtype = self.kv_like(dtype).expect("tests ask only for what there is");
        self.backend.kv_cache(KvLayout { n_layers, n_kv_heads, head_dim, n_blocks: 32, dtype }).unwrap();
    }

    /// Asserts `|found - expected| <= tolerance * magnitude` element by element.
    pub(crate) fn assert_close(&self, what: &str, found: &[f32], expected: &[(f64, f64)], slack: f64) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (f, (e, magnitude))) in found.iter().zip(expected).enumerate() {
            let bound = slack * self.tolerance * magnitude.max(1e-30);
            let error = (f64::from(*f) - e).abs();
            assert!(error <= bound, "{} {what} [{i}]: expected {e}, found {f}, error {error:e} > {bound:e}", self.name);
        }
    }
}

/// `n` tokens of one sequence with ids `0 .. n`, in blocks 0, 1, 2 ..., logits of all.
pub(crate) fn plain_batch(n: usize) -> Batch {
    let ids: Vec<u32> = (0..n as u32).collect();
    let blocks = (0..n.div_ceil(BLOCK_TOKENS) as u32).collect();
    Batch {
        tokens: ids.clone(),
        positions: ids.clone(),
        slots: ids.clone(),
        spans: vec![SeqSpan { first: 0, n_tokens: n, kv_len: n, blocks }],
        logit_rows: ids,
        feeds: Vec::new(),
    }
}

/// A small generator of numbers (splitmix64): the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-scale .. scale`.
    pub(crate) fn f32(&mut self, scale: f32) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    }

    pub(crate) fn f32s(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.f32(scale)).collect()
    }

    /// `n` elements of `dtype` with values of about `scale`: random quants under small scales.
    fn encoded(&mut self, dtype: DType, n: usize, scale: f32) -> Vec<u8> {
        let n_bytes = dtype.row_bytes(n).unwrap();
        let mut bytes: Vec<u8> = (0..n_bytes).map(|_| self.next() as u8).collect();
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            let mut put = |at: usize, unit: f32| {
                block[at..at + 2].copy_from_slice(&half::f16::from_f32(unit * scale).to_le_bytes());
            };
            match dtype {
                DType::F32 => block.copy_from_slice(&self.f32(scale).to_le_bytes()),
                DType::F16 => put(0, self.f32(1.0)),
                DType::BF16 => block.copy_from_slice(&half::bf16::from_f32(self.f32(scale)).to_le_bytes()),
                DType::Q4_0 => put(0, 1.0 / 8.0),
                DType::Q5_0 => put(0, 1.0 / 16.0),
                DType::Q8_0 | DType::IQ4_NL => put(0, 1.0 / 127.0),
                DType::IQ4_XS => put(0, 1.0 / (32.0 * 127.0)),
                DType::Q4_1 => [(0, 1.0 / 8.0), (2, -1.0)].into_iter().for_each(|(at, unit)| put(at, unit)),
                DType::Q5_1 => [(0, 1.0 / 16.0), (2, -1.0)].into_iter().for_each(|(at, unit)| put(at, unit)),
                DType::Q2_K => [(80, 1.0 / 16.0), (82, 1.0 / 16.0)].into_iter().for_each(|(at, unit)| put(at, unit)),
                DType::Q3_K => put(108, 1.0 / 128.0),
                DType::Q4_K => [(0, 1.0 / 480.0), (2, 1.0 / 64.0)].into_iter().for_each(|(at, unit)| put(at, unit)),
                DType::Q5_K => [(0, 1.0 / 960.0), (2, 1.0 / 64.0)].into_iter().for_each(|(at, unit)| put(at, unit)),
                DType::Q6_K => put(208, 1.0 / 4096.0),
                // 2^-4 to 2^-3 times values up to 6.
                DType::MXFP4 => block[0] = (124.0 + scale.log2()) as u8 + block[0] % 2,
            }
        }
        bytes
    }
}
