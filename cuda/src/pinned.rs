//! Page-locked host memory, for copies that run beside the host.

use crate::arena::{Buffer, Element};
use crate::error::CudaError;
use crate::gpu::Gpu;
use cudarc::driver::sys;
use std::ops::{Deref, DerefMut};

/// `len` elements of page-locked host memory, zeroed. Cached by the CPU, so that reading it is fast.
#[derive(Debug)]
pub struct Pinned<T: Element> {
    gpu: Gpu,
    ptr: *mut T,
    len: usize,
}

// SAFETY: plain memory that this value owns.
unsafe impl<T: Element> Send for Pinned<T> {}

impl<T: Element> Pinned<T> {
    /// Allocates.
    ///
    /// # Errors
    /// A failed driver call, such as no memory to lock.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Pinned<T>, CudaError> {
        // Whole quads of words, as kernels read it.
        let bytes = (len * size_of::<T>()).max(1).next_multiple_of(16);
        let mut ptr = std::ptr::null_mut();
        // SAFETY: a context is current; a pointer is written.
        let result = unsafe { sys::cuMemHostAlloc(&mut ptr, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        gpu.check(result, || format!("cuMemHostAlloc({bytes})"))?;
        // SAFETY: the range is ours; zeros are valid elements.
        unsafe { ptr.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { gpu: gpu.clone(), ptr: ptr.cast(), len })
    }

    /// Where kernels find it: host memory of ours has one address everywhere.
    pub fn device_ptr(&self) -> sys::CUdeviceptr {
        self.ptr as sys::CUdeviceptr
    }

    /// Enqueues a copy of the first `n` elements to the first `n` of `target`. They must not change before it has run.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if either side is shorter; a failed driver call.
    pub fn copy_to(&self, target: &Buffer<T>, n: usize) -> Result<(), CudaError> {
        self.fits("Pinned::copy_to", target, n)?;
        let bytes = n * size_of::<T>();
        // SAFETY: both ranges hold `n` elements; the caller keeps them.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(target.ptr(), self.ptr.cast(), bytes, self.gpu.stream()) };
        self.gpu.check(result, || format!("cuMemcpyHtoDAsync({bytes})"))
    }

    /// Enqueues a copy of the first `n` elements of `source` to the first `n` here. Read them after a synchronisation.
    ///
    /// # Errors
    /// As [`Pinned::copy_to`].
    pub fn copy_from(&mut self, source: &Buffer<T>, n: usize) -> Result<(), CudaError> {
        self.fits("Pinned::copy_from", source, n)?;
        let bytes = n * size_of::<T>();
        // SAFETY: both ranges hold `n` elements; the caller keeps them.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(self.ptr.cast(), source.ptr(), bytes, self.gpu.stream()) };
        self.gpu.check(result, || format!("cuMemcpyDtoHAsync({bytes})"))
    }

    fn fits(&self, op: &str, other: &Buffer<T>, n: usize) -> Result<(), CudaError> {
        if n <= self.len && n <= other.len() {
            return Ok(());
        }
        let expected = format!("at most {} (host) and {} (device) elements", self.len, other.len());
        Err(CudaError::Contract { op: op.to_owned(), expected, found: n.to_string() })
    }
}

impl<T: Element> Deref for Pinned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements that this value owns.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T: Element> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: the range is ours; a copy still under way is waited for, a failed device refuses.
        unsafe {
            let _ = self.gpu.bind();
            let _ = self.gpu.synchronize();
            sys::cuMemFreeHost(self.ptr.cast());
        }
    }
}
