//! A second stream of a device, and events that order streams.

use crate::error::CudaError;
use crate::gpu::Gpu;
use cudarc::driver::sys::{self, CUevent_flags, CUstream_flags};
use std::ffi::c_uint;

/// A stream beside the device's own, for copies that run beside its kernels.
#[derive(Debug)]
pub struct Stream {
    gpu: Gpu,
    raw: sys::CUstream,
}

// SAFETY: the handle may be used from any thread that bound the context.
unsafe impl Send for Stream {}

impl Stream {
    /// Makes one.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn new(gpu: &Gpu) -> Result<Stream, CudaError> {
        let mut raw = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: a context is current; a handle is written.
        gpu.check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, || "cuStreamCreate".into())?;
        Ok(Stream { gpu: gpu.clone(), raw })
    }

    /// The handle, for driver calls.
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything enqueued has run.
    ///
    /// # Errors
    /// The first failure of anything enqueued.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives as long as self.
        self.gpu.check(unsafe { sys::cuStreamSynchronize(self.raw) }, || "cuStreamSynchronize".into())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; a failed device refuses.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuStreamDestroy_v2(self.raw);
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    gpu: Gpu,
    raw: sys::CUevent,
}

// SAFETY: the handle may be used from any thread that bound the context.
unsafe impl Send for Event {}

impl Event {
    /// An event that orders; it takes no times. Until it is recorded, nobody waits for it.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn new(gpu: &Gpu) -> Result<Event, CudaError> {
        Self::with_flags(gpu, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that takes times, for measurements.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn timed(gpu: &Gpu) -> Result<Event, CudaError> {
        Self::with_flags(gpu, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(gpu: &Gpu, flags: CUevent_flags) -> Result<Event, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a context is current; a handle is written.
        gpu.check(unsafe { sys::cuEventCreate(&mut raw, flags as c_uint) }, || "cuEventCreate".into())?;
        Ok(Event { gpu: gpu.clone(), raw })
    }

    /// Makes it the point after everything enqueued so far, on the device's own stream or on another.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn record(&self, stream: Option<&Stream>) -> Result<(), CudaError> {
        // SAFETY: event and stream are of the same context.
        self.gpu.check(unsafe { sys::cuEventRecord(self.raw, self.handle(stream)) }, || "cuEventRecord".into())
    }

    /// Makes what is enqueued from now on wait for it, on the device's own stream or on another.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn hold(&self, stream: Option<&Stream>) -> Result<(), CudaError> {
        // SAFETY: event and stream are of the same context.
        let result = unsafe { sys::cuStreamWaitEvent(self.handle(stream), self.raw, 0) };
        self.gpu.check(result, || "cuStreamWaitEvent".into())
    }

    fn handle(&self, stream: Option<&Stream>) -> sys::CUstream {
        stream.map_or(self.gpu.stream(), |stream| stream.raw)
    }

    /// Makes the calling thread wait for it.
    ///
    /// # Errors
    /// The first failure of anything before it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event is ours.
        self.gpu.check(unsafe { sys::cuEventSynchronize(self.raw) }, || "cuEventSynchronize".into())
    }

    /// Milliseconds from an earlier event to this one, both timed and both passed.
    ///
    /// # Errors
    /// A failed driver call, such as of an event that has not passed.
    pub fn since(&self, earlier: &Event) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are ours; one number is written.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.raw, self.raw) };
        self.gpu.check(result, || "cuEventElapsedTime".into())?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; a failed device refuses.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuEventDestroy_v2(self.raw);
        }
    }
}
