//! What the GPU tests share: the device if there is one, random numbers, comparisons.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod formats;
pub(crate) mod kv;

use playhouse_cuda::arena::{Arena, Buffer, Element};
use playhouse_cuda::gpu::{Gpu, visible_gpus};
use playhouse_cuda::kernels::Kernels;

/// A device with its kernels and memory for a test.
pub(crate) struct Bench {
    pub(crate) gpu: Gpu,
    pub(crate) kernels: Kernels,
    pub(crate) arena: Arena,
}

/// The first visible GPU, or `None` with a line that says why the test cannot run.
pub(crate) fn bench(test: &str) -> Option<Bench> {
    let opened = visible_gpus().and_then(|all| {
        let gpu = Gpu::open(&all[0].uuid)?;
        let kernels = Kernels::new(&gpu)?;
        let arena = Arena::apart(&gpu, "test");
        Ok(Bench { gpu, kernels, arena })
    });
    match opened {
        Ok(bench) => Some(bench),
        Err(error) => {
            println!("{test} needs a GPU and is skipped: {error}");
            None
        }
    }
}

impl Bench {
    pub(crate) fn upload<T: Element>(&self, data: &[T]) -> Buffer<T> {
        let buffer = self.arena.alloc(data.len(), "test data").expect("the arena is large enough");
        buffer.write(data).expect("a copy to the device");
        buffer
    }

    pub(crate) fn zeros<T: Element>(&self, len: usize) -> Buffer<T> {
        let buffer = self.arena.alloc(len, "test output").expect("the arena is large enough");
        buffer.zero().expect("a memset");
        buffer
    }
}

pub(crate) fn download<T: Element + Default>(buffer: &Buffer<T>) -> Vec<T> {
    let mut out = vec![T::default(); buffer.len()];
    buffer.read(&mut out).expect("everything enqueued ran");
    out
}

/// SplitMix64 (Steele et al. 2014): enough for test data.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u32 << 24) as f32
    }

    /// About normal: twelve uniforms.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
}
