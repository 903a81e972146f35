//! Capture of a step's launches, and their replay as one.

use crate::error::CudaError;
use crate::gpu::Gpu;
use cudarc::driver::sys;

/// A captured sequence of launches, ready to run again.
///
/// Pointers and scalars are frozen at capture: what changes between steps lives in device buffers that are
/// written before the replay.
#[derive(Debug)]
pub struct Graph {
    gpu: Gpu,
    exec: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread that bound the context.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `enqueue` puts on the device's stream. Nothing runs. `enqueue` must not synchronise or allocate.
    ///
    /// # Errors
    /// What `enqueue` returns, or a failed driver call; the stream is usable afterwards.
    pub fn capture<E: From<CudaError>>(gpu: &Gpu, enqueue: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and not capturing.
        gpu.check(unsafe { sys::cuStreamBeginCapture_v2(gpu.stream(), mode) }, || "cuStreamBeginCapture".into())?;
        let enqueued = enqueue();
        let mut graph = std::ptr::null_mut();
        // SAFETY: capture began above; a handle is written.
        let ended = unsafe { sys::cuStreamEndCapture(gpu.stream(), &mut graph) };
        enqueued?;
        gpu.check(ended, || "cuStreamEndCapture".into())?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph is whole; a handle is written.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        // SAFETY: the executable graph does not need it any more.
        unsafe { sys::cuGraphDestroy(graph) };
        gpu.check(made, || "cuGraphInstantiate".into())?;
        // SAFETY: both handles are valid.
        gpu.check(unsafe { sys::cuGraphUpload(exec, gpu.stream()) }, || "cuGraphUpload".into())?;
        Ok(Graph { gpu: gpu.clone(), exec })
    }

    /// Enqueues one run.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn launch(&self) -> Result<(), CudaError> {
        // SAFETY: both handles are valid.
        self.gpu.check(unsafe { sys::cuGraphLaunch(self.exec, self.gpu.stream()) }, || "cuGraphLaunch".into())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; a failed device refuses.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuGraphExecDestroy(self.exec);
        }
    }
}
