//! A kernel that traps: what a faulty kernel does to a process, on command. Not part of a release build.
//!
//! After it the process can use no GPU any more, and no new context can be made in it (measured on two H200).

use crate::error::{CudaError, check};
use cudarc::driver::sys;
use std::ffi::CStr;

/// Needs no compiler: the driver translates it.
const PTX: &CStr = c".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry stumble() { trap; ret; }\n";

/// Launches a kernel that traps, in the context that is current on this thread, and waits for what follows: an error, here and
/// in every call after this one.
///
/// # Errors
/// Always, if there is a context: the trap, or that it could not be launched.
pub fn trap() -> Result<(), CudaError> {
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a zero; a handle is written.
    check(unsafe { sys::cuModuleLoadData(&mut module, PTX.as_ptr().cast()) }, "-", || "cuModuleLoadData(trap)".into())?;
    let mut function = std::ptr::null_mut();
    // SAFETY: the module is loaded and has this function; a handle is written.
    let found = unsafe { sys::cuModuleGetFunction(&mut function, module, c"stumble".as_ptr()) };
    check(found, "-", || "cuModuleGetFunction(trap)".into())?;
    let (stream, none) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the kernel takes no arguments.
    let launched = unsafe { sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, none, none) };
    check(launched, "-", || "cuLaunchKernel(trap)".into())?;
    // SAFETY: a context is current.
    check(unsafe { sys::cuCtxSynchronize() }, "-", || "cuCtxSynchronize after a trap".into())
}
