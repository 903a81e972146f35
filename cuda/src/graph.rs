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

/// A capture under way on the device's stream: what is enqueued is recorded and does not run. Nothing may synchronise or
/// allocate until it is finished. Dropping it forgets what was recorded.
#[derive(Debug)]
pub struct Capture {
    gpu: Gpu,
    open: bool,
}

impl Capture {
    /// Begins.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn begin(gpu: &Gpu) -> Result<Capture, CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and not capturing.
        gpu.check(unsafe { sys::cuStreamBeginCapture_v2(gpu.stream(), mode) }, || "cuStreamBeginCapture".into())?;
        Ok(Capture { gpu: gpu.clone(), open: true })
    }

    /// Ends, and makes what was recorded ready to run.
    ///
    /// # Errors
    /// A failed driver call; the stream is usable afterwards.
    pub fn finish(mut self) -> Result<Graph, CudaError> {
        let gpu = self.gpu.clone();
        let graph = self.end()?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph is whole; a handle is written.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        // SAFETY: the executable graph does not need it any more.
        unsafe { sys::cuGraphDestroy(graph) };
        gpu.check(made, || "cuGraphInstantiate".into())?;
        // SAFETY: both handles are valid.
        gpu.check(unsafe { sys::cuGraphUpload(exec, gpu.stream()) }, || "cuGraphUpload".into())?;
        Ok(Graph { gpu, exec })
    }

    fn end(&mut self) -> Result<sys::CUgraph, CudaError> {
        self.open = false;
        let mut graph = std::ptr::null_mut();
        // SAFETY: capture began in `begin`; a handle is written.
        let ended = unsafe { sys::cuStreamEndCapture(self.gpu.stream(), &mut graph) };
        self.gpu.check(ended, || "cuStreamEndCapture".into())?;
        Ok(graph)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        if let Ok(graph) = self.end() {
            // SAFETY: the graph is ours and not used any more.
            unsafe { sys::cuGraphDestroy(graph) };
        }
    }
}

impl Graph {
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
