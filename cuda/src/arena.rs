//! Device memory: one growing, exportable arena per kind, and typed buffers cut from it.
//!
//! An arena reserves addresses for all it may ever hold and backs them with physical memory (`cuMemCreate`) as
//! it grows, so buffers never move and a plan can be checked against the ledger byte by byte. Physical memory made this way
//! survives a sticky fault and, exported as a file descriptor, the process.

use crate::error::CudaError;
use crate::gpu::Gpu;
use cudarc::driver::sys;
use std::marker::PhantomData;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

/// Buffers start at multiples of this, enough for 128-bit loads, bulk copies and whole L2 sectors.
pub const ALIGN: u64 = 256;
/// Physical memory grows in steps of at least this, so that few handles are needed.
const CHUNK: u64 = 64 << 20;

/// How many bytes some arenas may take together; clones share the count.
#[derive(Debug, Clone)]
pub struct Cap(Arc<Mutex<u64>>);

impl Cap {
    /// Up to `bytes`.
    pub fn new(bytes: u64) -> Cap {
        Cap(Arc::new(Mutex::new(bytes)))
    }

    /// Bytes that may still be taken.
    pub fn left(&self) -> u64 {
        *self.0.lock().expect("no panic while locked")
    }

    /// Takes `bytes`, or nothing where fewer are left.
    fn take(&self, bytes: u64) -> bool {
        let mut left = self.0.lock().expect("no panic while locked");
        match left.checked_sub(bytes) {
            Some(rest) => {
                *left = rest;
                true
            }
            None => false,
        }
    }

    fn give(&self, bytes: u64) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) += bytes;
    }
}

/// An arena; clones share it. Memory goes back to the device when the last clone and the last buffer are gone.
#[derive(Debug, Clone)]
pub struct Arena(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    gpu: Gpu,
    what: &'static str,
    cap: Option<Cap>,
    base: sys::CUdeviceptr,
    /// 0 where each buffer is an allocation of its own.
    reserved: u64,
    granularity: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    mapped: u64,
    chunks: Vec<Chunk>,
    /// Allocations of their own.
    apart: Vec<sys::CUdeviceptr>,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    handle: sys::CUmemGenericAllocationHandle,
    bytes: u64,
}

/// Elements of a type that has no invalid bit patterns.
///
/// # Safety
/// Every bit pattern is a valid value and the type has no padding.
pub unsafe trait Element: Copy + Send + 'static {}
macro_rules! elements {
    ($($t:ty),*) => { $(
        // SAFETY: a plain number.
        unsafe impl Element for $t {}
    )* };
}
elements!(u8, i8, u16, u32, i32, u64, f32, half::f16);

/// `len` elements of `T` in device memory. Freed with its arena, not one by one.
#[derive(Debug, Clone)]
pub struct Buffer<T: Element> {
    arena: Arena,
    ptr: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl Arena {
    /// Reserves addresses for up to `reserve` bytes; no memory is taken yet. `what` names the arena in errors.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn new(gpu: &Gpu, what: &'static str, reserve: u64) -> Result<Arena, CudaError> {
        Self::with_cap(gpu, what, reserve, None)
    }

    /// [`Arena::new`], with a cap on the memory that it takes together with others.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn with_cap(gpu: &Gpu, what: &'static str, reserve: u64, cap: Option<Cap>) -> Result<Arena, CudaError> {
        let mut granularity = 0;
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: the properties are valid for the call; one size is written.
        let result = unsafe { sys::cuMemGetAllocationGranularity(&mut granularity, &properties(gpu), minimum) };
        gpu.check(result, || "cuMemGetAllocationGranularity".into())?;
        let granularity = granularity as u64;
        let reserved = reserve.max(1).next_multiple_of(granularity);
        let mut base = 0;
        // SAFETY: a fresh range is asked for; its address is written.
        let result = unsafe { sys::cuMemAddressReserve(&mut base, reserved as usize, 0, 0, 0) };
        gpu.check(result, || format!("cuMemAddressReserve({reserved})"))?;
        let state = Mutex::default();
        Ok(Arena(Arc::new(Shared { gpu: gpu.clone(), what, cap, base, reserved, granularity, state })))
    }

    /// An arena for tests, each buffer of which is an allocation of its own: `compute-sanitizer` sees where it ends and what of it
    /// was never written, which it cannot see of parts of one mapping. It grows on every call and cannot be exported.
    pub fn apart(gpu: &Gpu, what: &'static str) -> Arena {
        let (gpu, state) = (gpu.clone(), Mutex::default());
        Arena(Arc::new(Shared { gpu, what, cap: None, base: 0, reserved: 0, granularity: 1, state }))
    }

    /// Cuts a buffer of `len` elements; its contents are undefined.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] when the reservation or the device is full: nothing has changed then.
    pub fn alloc<T: Element>(&self, len: usize, what: &str) -> Result<Buffer<T>, CudaError> {
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        let shared = &self.0;
        let mut state = shared.state.lock().expect("no panic while locked");
        if shared.reserved == 0 {
            let ptr = shared.alloc_apart(&mut state, bytes).map_err(|e| shared.or_out_of_memory(e, what, bytes))?;
            return Ok(Buffer { arena: self.clone(), ptr, len, element: PhantomData });
        }
        let start = state.used;
        let end = bytes.checked_next_multiple_of(ALIGN).and_then(|b| start.checked_add(b));
        let Some(end) = end.filter(|end| *end <= shared.reserved) else {
            return Err(shared.out_of_memory(what, bytes, shared.reserved - start));
        };
        if end > state.mapped {
            shared.grow(&mut state, end, CHUNK).map_err(|e| shared.or_out_of_memory(e, what, bytes))?;
        }
        state.used = end;
        Ok(Buffer { arena: self.clone(), ptr: shared.base + start, len, element: PhantomData })
    }

    /// Takes memory for buffers of `bytes` in all, in one piece, so that [`Arena::alloc`] finds it there.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]: nothing has changed then.
    pub fn commit(&self, bytes: u64) -> Result<(), CudaError> {
        let shared = &self.0;
        let mut state = shared.state.lock().expect("no panic while locked");
        let end = state.used.saturating_add(bytes);
        if end > shared.reserved {
            return Err(shared.out_of_memory("all of it", bytes, shared.reserved - state.used));
        }
        if end <= state.mapped {
            return Ok(());
        }
        let missing = end - state.mapped;
        shared.grow(&mut state, end, missing).map_err(|e| shared.or_out_of_memory(e, "all of it", bytes))
    }

    /// Bytes cut into buffers.
    pub fn used_bytes(&self) -> u64 {
        self.0.state.lock().expect("no panic while locked").used
    }

    /// Bytes taken from the device.
    pub fn mapped_bytes(&self) -> u64 {
        self.0.state.lock().expect("no panic while locked").mapped
    }

    /// Forgets every buffer cut so far, keeping the memory. The caller must not use those buffers any more.
    pub fn reset(&self) {
        let mut state = self.0.state.lock().expect("no panic while locked");
        state.used = 0;
        self.0.free_apart(&mut state);
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// File descriptors of the physical memory in address order, with their sizes: another process can map them.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn export(&self) -> Result<Vec<(OwnedFd, u64)>, CudaError> {
        let state = self.0.state.lock().expect("no panic while locked");
        let export_one = |chunk: &Chunk| {
            let mut fd: i32 = -1;
            let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            // SAFETY: the handle is ours; for this handle type an int is written.
            let result = unsafe { sys::cuMemExportToShareableHandle((&raw mut fd).cast(), chunk.handle, kind, 0) };
            self.0.gpu.check(result, || "cuMemExportToShareableHandle".into())?;
            // SAFETY: the driver gave us a fresh descriptor that nobody else owns.
            Ok((unsafe { OwnedFd::from_raw_fd(fd) }, chunk.bytes))
        };
        state.chunks.iter().map(export_one).collect()
    }
}

/// An arena that something else keeps.
#[derive(Debug, Clone)]
pub(crate) struct WeakArena(Weak<Shared>);

impl WeakArena {
    /// [`Arena::mapped_bytes`], 0 once the arena is gone.
    pub(crate) fn mapped_bytes(&self) -> u64 {
        self.0.upgrade().map_or(0, |shared| Arena(shared).mapped_bytes())
    }

    /// Whether the arena is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Arena {
    pub(crate) fn weak(&self) -> WeakArena {
        WeakArena(Arc::downgrade(&self.0))
    }
}

impl Shared {
    /// Backs the reservation with memory up to at least `end`, by at least `step` bytes.
    fn grow(&self, state: &mut State, end: u64, step: u64) -> Result<(), CudaError> {
        let missing = (end - state.mapped).max(step).next_multiple_of(self.granularity);
        let bytes = missing.min(self.reserved - state.mapped);
        if let Some(cap) = self.cap.as_ref().filter(|cap| !cap.take(bytes)) {
            return Err(self.out_of_memory("the memory cap", bytes, cap.left()));
        }
        self.grow_by(state, bytes).inspect_err(|_| self.give_back(bytes))
    }

    fn alloc_apart(&self, state: &mut State, bytes: u64) -> Result<sys::CUdeviceptr, CudaError> {
        let mut ptr = 0;
        // SAFETY: a context is current; an address is written.
        let result = unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes.max(1) as usize) };
        self.gpu.check(result, || format!("cuMemAlloc({bytes})"))?;
        state.apart.push(ptr);
        state.used += bytes;
        state.mapped += bytes;
        Ok(ptr)
    }

    /// Frees allocations of their own, if there are any.
    fn free_apart(&self, state: &mut State) {
        if state.apart.is_empty() {
            return;
        }
        // Kernels that use them may still run; a failed device refuses all of this, and the process's end frees.
        let _ = self.gpu.bind();
        let _ = self.gpu.synchronize();
        for ptr in state.apart.drain(..) {
            // SAFETY: the address is ours, freed once, and nothing enqueued uses it any more.
            unsafe { sys::cuMemFree_v2(ptr) };
        }
        state.mapped = 0;
    }

    fn grow_by(&self, state: &mut State, bytes: u64) -> Result<(), CudaError> {
        let mut handle = 0;
        // SAFETY: the properties are valid for the call; a handle is written.
        let result = unsafe { sys::cuMemCreate(&mut handle, bytes as usize, &properties(&self.gpu), 0) };
        self.gpu.check(result, || format!("cuMemCreate({bytes})"))?;
        let mapped = self.map(handle, state.mapped, bytes);
        if mapped.is_err() {
            // SAFETY: the handle is ours and maps nothing.
            unsafe { sys::cuMemRelease(handle) };
            return mapped;
        }
        state.chunks.push(Chunk { handle, bytes });
        state.mapped += bytes;
        Ok(())
    }

    fn give_back(&self, bytes: u64) {
        if let Some(cap) = &self.cap {
            cap.give(bytes);
        }
    }

    fn map(&self, handle: sys::CUmemGenericAllocationHandle, offset: u64, bytes: u64) -> Result<(), CudaError> {
        let address = self.base + offset;
        // SAFETY: the range lies in our reservation and is not mapped yet.
        let result = unsafe { sys::cuMemMap(address, bytes as usize, 0, handle, 0) };
        self.gpu.check(result, || format!("cuMemMap({bytes})"))?;
        let access = sys::CUmemAccessDesc {
            location: location(&self.gpu),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range was just mapped.
        let result = unsafe { sys::cuMemSetAccess(address, bytes as usize, &access, 1) };
        self.gpu.check(result, || format!("cuMemSetAccess({bytes})")).inspect_err(|_| {
            // SAFETY: the range was just mapped and nobody uses it.
            unsafe { sys::cuMemUnmap(address, bytes as usize) };
        })
    }

    fn or_out_of_memory(&self, error: CudaError, what: &str, requested: u64) -> CudaError {
        match error {
            CudaError::Driver { code: 2, .. } => {
                self.out_of_memory(what, requested, self.gpu.free_bytes().unwrap_or(0))
            }
            other => other,
        }
    }

    fn out_of_memory(&self, what: &str, requested: u64, free: u64) -> CudaError {
        let what = format!("{what} ({})", self.what);
        CudaError::OutOfMemory { device: self.gpu.uuid().to_owned(), what, requested, free }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = std::mem::take(self.state.get_mut().unwrap_or_else(|e| e.into_inner()));
        self.free_apart(&mut state);
        // SAFETY: no buffer is left (each holds the arena), so nothing uses the range; a failed device refuses, and the
        // process's end frees what it refused.
        unsafe {
            let _ = self.gpu.bind();
            let _ = self.gpu.synchronize();
            if state.mapped > 0 {
                sys::cuMemUnmap(self.base, state.mapped as usize);
            }
            for chunk in &state.chunks {
                sys::cuMemRelease(chunk.handle);
            }
            if self.reserved > 0 {
                sys::cuMemAddressFree(self.base, self.reserved as usize);
            }
        }
        let mapped = state.mapped;
        self.give_back(mapped);
    }
}

fn location(gpu: &Gpu) -> sys::CUmemLocation {
    // SAFETY: plain C data for which all zeros is valid.
    let mut location: sys::CUmemLocation = unsafe { std::mem::zeroed() };
    location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = gpu.device();
    location
}

fn properties(gpu: &Gpu) -> sys::CUmemAllocationProp {
    // SAFETY: plain C data for which all zeros is valid.
    let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location = location(gpu);
    prop
}

impl<T: Element> Buffer<T> {
    /// The address, for a kernel's argument.
    pub fn ptr(&self) -> sys::CUdeviceptr {
        self.ptr
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    /// A part of the buffer.
    ///
    /// # Panics
    /// If the range does not lie in the buffer.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Buffer<T> {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {}", self.len);
        let ptr = self.ptr + (range.start * size_of::<T>()) as u64;
        Buffer { arena: self.arena.clone(), ptr, len: range.len(), element: PhantomData }
    }

    /// The same bytes as elements of another type.
    ///
    /// # Panics
    /// If the bytes are no whole number of them.
    pub fn cast<U: Element>(&self) -> Buffer<U> {
        let bytes = self.len * size_of::<T>();
        assert!(bytes.is_multiple_of(size_of::<U>()), "{bytes} bytes as elements of {}", size_of::<U>());
        Buffer { arena: self.arena.clone(), ptr: self.ptr, len: bytes / size_of::<U>(), element: PhantomData }
    }

    /// Enqueues a copy of another buffer of the same length, which does not overlap with this one.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if the lengths differ; a failed driver call.
    pub fn copy_from(&self, source: &Buffer<T>) -> Result<(), CudaError> {
        self.same_len("copy_from", source.len)?;
        let gpu = self.arena.gpu();
        // SAFETY: both ranges are `bytes` long and belong to arenas that the buffers keep.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(self.ptr, source.ptr, self.bytes() as usize, gpu.stream()) };
        gpu.check(result, || format!("cuMemcpyDtoDAsync({})", self.bytes()))
    }

    /// Copies from the host, waiting until it is done.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if the lengths differ; a failed driver call.
    pub fn write(&self, data: &[T]) -> Result<(), CudaError> {
        self.same_len("write", data.len())?;
        let gpu = self.arena.gpu();
        let bytes = self.bytes() as usize;
        // SAFETY: both ranges are `bytes` long and live until the synchronisation below.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(self.ptr, data.as_ptr().cast(), bytes, gpu.stream()) };
        gpu.check(result, || format!("cuMemcpyHtoDAsync({bytes})"))?;
        gpu.synchronize()
    }

    /// Copies to the host, after everything enqueued before.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if the lengths differ; a failed driver call, of the copy or of anything before it.
    pub fn read(&self, data: &mut [T]) -> Result<(), CudaError> {
        self.same_len("read", data.len())?;
        let gpu = self.arena.gpu();
        let bytes = self.bytes() as usize;
        // SAFETY: both ranges are `bytes` long and live until the synchronisation below.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), self.ptr, bytes, gpu.stream()) };
        gpu.check(result, || format!("cuMemcpyDtoHAsync({bytes})"))?;
        gpu.synchronize()
    }

    /// Sets every byte to zero, in stream order.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn zero(&self) -> Result<(), CudaError> {
        let gpu = self.arena.gpu();
        // SAFETY: the range is ours.
        let result = unsafe { sys::cuMemsetD8Async(self.ptr, 0, self.bytes() as usize, gpu.stream()) };
        gpu.check(result, || format!("cuMemsetD8Async({})", self.bytes()))
    }

    fn same_len(&self, op: &str, found: usize) -> Result<(), CudaError> {
        if found == self.len {
            return Ok(());
        }
        let (expected, found) = (format!("{} elements", self.len), format!("{found}"));
        Err(CudaError::Contract { op: format!("Buffer::{op}"), expected, found })
    }
}
