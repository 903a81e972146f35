//! A context made on a thread of its own, while a file is opened: making one takes longer than reading a large vocabulary.

use playhouse_cuda::CudaError;
use playhouse_cuda::gpu::Gpu;
use std::thread::JoinHandle;

/// A context that is being made, or was. Whoever opens the same GPU meanwhile waits for this one and shares it.
#[derive(Debug)]
pub struct Warm(Option<JoinHandle<Result<Gpu, CudaError>>>);

/// Begins to make a context on the GPU with this UUID. What fails here fails again, and is told, when the GPU is opened.
pub fn warm(uuid: &str) -> Warm {
    let uuid = uuid.to_owned();
    let thread = std::thread::Builder::new().name("warm up".into());
    Warm(thread.spawn(move || Gpu::open(&uuid)).ok())
}

impl Drop for Warm {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // Somebody else has it by now, or nobody could.
            let _ = thread.join();
        }
    }
}
