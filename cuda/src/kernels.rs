//! The embedded kernels: loaded into a context on first use, launched with a checked configuration.

use crate::error::CudaError;
use crate::gpu::Gpu;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::sync::Mutex;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Grid, block and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: (u32, u32, u32),
    /// Threads per block in x, y, z.
    pub block: (u32, u32, u32),
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Start before the preceding kernel ends (programmatic dependent launch, sm_90 and later): the kernel must execute
    /// `griddepcontrol.wait` before it touches anything the predecessor writes or reads.
    pub overlap: bool,
}

impl Launch {
    /// A launch without dynamic shared memory that waits for its predecessor.
    pub fn new(grid: (u32, u32, u32), block: (u32, u32, u32)) -> Launch {
        Launch { grid, block, shared_bytes: 0, overlap: false }
    }
}

/// The arguments of a launch, copied by value in the order of the kernel's parameters.
#[derive(Debug, Default)]
pub struct Args {
    /// Each argument in a slot of its own, aligned for any scalar or struct of up to 16 bytes' alignment.
    slots: Vec<Box<[u128]>>,
}

impl Args {
    /// No arguments yet.
    pub fn new() -> Args {
        Args::default()
    }

    /// Appends a scalar, a device pointer or a `#[repr(C)]` struct of parameters.
    #[must_use]
    pub fn with<T: Copy + 'static>(mut self, value: T) -> Args {
        assert!(align_of::<T>() <= align_of::<u128>(), "over-aligned kernel argument");
        let mut slot = vec![0_u128; size_of::<T>().div_ceil(16).max(1)].into_boxed_slice();
        // SAFETY: the slot is large enough and aligned; T is Copy.
        unsafe { slot.as_mut_ptr().cast::<T>().write(value) };
        self.slots.push(slot);
        self
    }
}

/// A kernel in a context.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
}

/// The kernels of one context.
#[derive(Debug)]
pub struct Kernels {
    gpu: Gpu,
    modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
    functions: Mutex<HashMap<&'static str, Kernel>>,
}

// SAFETY: module and function handles belong to the context and may be used from any thread that bound it.
unsafe impl Send for Kernels {}
// SAFETY: as above; the maps are behind locks.
unsafe impl Sync for Kernels {}

/// Whether this binary has kernels.
///
/// # Errors
/// [`CudaError::Unavailable`] with what was missing when it was built.
pub fn built() -> Result<(), CudaError> {
    if FATBINS.is_empty() {
        return Err(CudaError::Unavailable(format!("this binary has no GPU kernels ({TOOLCHAIN})")));
    }
    Ok(())
}

impl Kernels {
    /// The embedded kernels for this device; nothing is loaded yet.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] if the binary was built without nvcc.
    pub fn new(gpu: &Gpu) -> Result<Kernels, CudaError> {
        built()?;
        Ok(Kernels { gpu: gpu.clone(), modules: Mutex::default(), functions: Mutex::default() })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether the device is a Hopper and the kernels were compiled for all it can do: products of warpgroups.
    pub fn has_wgmma(&self) -> bool {
        self.gpu.info().capability == (9, 0) && ARCHS.split(',').any(|arch| arch.trim() == "90a")
    }

    /// Whether the device lets blocks of a cluster read each other's shared memory, and the kernels were compiled for it: what was compiled
    /// for older chips runs on newer ones as well, without clusters.
    pub fn has_clusters(&self) -> bool {
        compiled_with_clusters(ARCHS, self.gpu.info().capability)
    }

    /// The kernel `function` of `kernels/<file>.cu`, with `shared_bytes` of dynamic shared memory allowed.
    ///
    /// # Errors
    /// [`CudaError::Contract`] for an unknown file; a failed driver call, such as an image without code for this chip.
    pub fn get(&self, file: &'static str, function: &'static str, shared_bytes: u32) -> Result<Kernel, CudaError> {
        if let Some(kernel) = self.functions.lock().expect("no panic while locked").get(function) {
            return Ok(*kernel);
        }
        let module = self.module(file)?;
        let name = CString::new(function).expect("kernel names have no zero byte");
        let mut handle = std::ptr::null_mut();
        // SAFETY: the module is loaded; a handle is written.
        let result = unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) };
        self.gpu.check(result, || format!("cuModuleGetFunction({file}.cu, {function})"))?;
        if shared_bytes > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            let result = unsafe { sys::cuFuncSetAttribute(handle, attribute, shared_bytes as i32) };
            self.gpu.check(result, || format!("{function}: {shared_bytes} bytes of shared memory"))?;
        }
        let kernel = Kernel { function: handle, name: function };
        self.functions.lock().expect("no panic while locked").insert(function, kernel);
        Ok(kernel)
    }

    fn module(&self, file: &'static str) -> Result<sys::CUmodule, CudaError> {
        let mut modules = self.modules.lock().expect("no panic while locked");
        if let Some(module) = modules.get(file) {
            return Ok(*module);
        }
        let fatbin = FATBINS.iter().find(|(name, _)| *name == file).ok_or_else(|| CudaError::Contract {
            op: "Kernels::get".into(),
            expected: "the name of a file in cuda/kernels".into(),
            found: file.into(),
        })?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin in static memory; a handle is written.
        let result = unsafe { sys::cuModuleLoadData(&mut module, fatbin.1.as_ptr().cast()) };
        self.gpu.check(result, || format!("cuModuleLoadData({file}.cu, built by {TOOLCHAIN})"))?;
        modules.insert(file, module);
        Ok(module)
    }
}

/// Whether one of the targets is this chip's own generation, sm_90 or later: code for a chip runs on those of the same generation that are
/// not older, and a target with a letter on that chip alone.
fn compiled_with_clusters(archs: &str, (major, minor): (u32, u32)) -> bool {
    let fits = |arch: &str| {
        let number = arch.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let exact = number.len() < arch.len();
        number.parse::<u32>().is_ok_and(|number| {
            let (own, least) = (number / 10, number % 10);
            own == major && if exact { least == minor } else { least <= minor }
        })
    };
    major >= 9 && archs.split(',').any(|arch| fits(arch.trim()))
}

impl Kernel {
    /// Enqueues the kernel.
    ///
    /// # Errors
    /// A failed launch, with name and configuration. Faults inside the kernel show at the next synchronisation.
    ///
    /// # Safety
    /// `args` match the kernel's parameters in number, type and order, and every pointer among them is valid for what
    /// the kernel does with it until it has run.
    pub unsafe fn launch(self, gpu: &Gpu, launch: Launch, args: Args) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { self.launch_clusters(gpu, launch, 1, args) }
    }

    /// As [`Kernel::launch`], the grid's x cut into clusters of `cluster` blocks, which divides it (sm_90 and later if above 1).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch_clusters(
        self,
        gpu: &Gpu,
        launch: Launch,
        cluster: u32,
        mut args: Args,
    ) -> Result<(), CudaError> {
        let mut pointers: Vec<*mut c_void> = args.slots.iter_mut().map(|s| s.as_mut_ptr().cast()).collect();
        // SAFETY: plain C data for which all zeros is valid.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut n_attributes = 0;
        if launch.overlap && gpu.info().capability.0 >= 9 {
            attributes[n_attributes].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[n_attributes].value.programmaticStreamSerializationAllowed = 1;
            n_attributes += 1;
        }
        if cluster > 8 {
            // Beyond 8 a cluster is not portable, and a kernel has to say that it knows.
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
            // SAFETY: the function is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(self.function, attribute, 1) };
            gpu.check(result, || format!("{} in clusters of {cluster}", self.name))?;
        }
        if cluster > 1 {
            attributes[n_attributes].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[n_attributes].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster, y: 1, z: 1 };
            n_attributes += 1;
        }
        // SAFETY: as above.
        let mut config: sys::CUlaunchConfig = unsafe { std::mem::zeroed() };
        (config.gridDimX, config.gridDimY, config.gridDimZ) = launch.grid;
        (config.blockDimX, config.blockDimY, config.blockDimZ) = launch.block;
        config.sharedMemBytes = launch.shared_bytes;
        config.hStream = gpu.stream();
        config.attrs = attributes.as_mut_ptr();
        config.numAttrs = n_attributes as c_uint;
        // SAFETY: the configuration and the argument slots live for the call, which copies them; the rest is the caller's.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        gpu.check(result, || format!("launch of {} with {launch:?} in clusters of {cluster}", self.name))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        for module in self.modules.get_mut().unwrap_or_else(|e| e.into_inner()).values() {
            // SAFETY: the module is ours and its kernels are not used any more; a failed device refuses.
            unsafe { sys::cuModuleUnload(*module) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_need_code_for_the_chip_itself() {
        let archs = "80,86,89, 90a,120";
        let has = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)].map(|chip| compiled_with_clusters(archs, chip));
        assert_eq!(has, [false, false, true, false, true, true], "a B200 would run what was compiled for sm_80");
        assert!(compiled_with_clusters("90", (9, 0)) && !compiled_with_clusters("80", (9, 0)));
        assert!(!compiled_with_clusters("", (9, 0)) && !compiled_with_clusters("100a", (10, 3)));
    }
}
