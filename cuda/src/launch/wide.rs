//! Products of many columns on Hopper (`kernels/matmul_wide.cu`): which cells of y a cluster of blocks takes, and the maps by which the
//! copy engine finds x and W. The choice changes speed, never bits.

use super::matmul::{MatmulArgs, Product};
use super::matrix::{HalfRows, Kind, Matrix, TILE_K};
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};
use cudarc::driver::sys;

/// Stripes of 16 rows that a block takes. Mirrors `STRIPES_PER_BLOCK`.
const STRIPES_PER_BLOCK: usize = 8;
/// Threads of a block. Mirrors `WIDE_THREADS`.
const THREADS: u32 = 384;
/// Shared memory that a block may use. Mirrors `SHARED_BYTES`.
const SHARED_BYTES: usize = 227 << 10;
/// Most stages. Mirrors `Ring::STAGES`.
const MOST_STAGES: usize = 8;

/// Blocks of a cluster, side by side in columns, which share W. Mirrors `CLUSTER`.
const CLUSTER: usize = 2;

/// Cells of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wide {
    /// Columns of a block: 64, 128 or 192.
    pub columns: usize,
}

/// A map of a matrix as the copy engine reads it. Mirrors `TensorMap`.
#[derive(Clone, Copy)]
#[repr(C)]
struct TensorMap([u64; 16]);

/// Mirrors `WideMaps`.
#[derive(Clone, Copy)]
#[repr(C)]
struct WideMaps {
    x: TensorMap,
    lo: TensorMap,
    hi: TensorMap,
    scale: TensorMap,
}

/// A matrix for [`TensorMap::new`]: rows of elements, and the part of it that a copy moves.
struct Mapped {
    address: u64,
    element: sys::CUtensorMapDataType,
    columns: u64,
    rows: u64,
    row_bytes: u64,
    box_columns: u32,
    box_rows: u32,
    swizzle: sys::CUtensorMapSwizzle,
}

/// How a product of `n` columns is run: the cheapest by rounds of cells over the device.
///
/// Llama-3-8B's 4096 x 4096 at 512 columns is 32 rows of cells: with 128 columns a block they are one round of 64 clusters. At
/// 256 columns half of the device would be idle, and blocks of 64 columns are the better choice.
pub(super) fn choose(kind: Kind, n_stripes: usize, n: usize, n_sms: usize) -> Wide {
    let rows = n_stripes.div_ceil(STRIPES_PER_BLOCK);
    let cost = |wide: &Wide| {
        let cells = rows * n.div_ceil(wide.columns * CLUSTER);
        cells.div_ceil((n_sms / CLUSTER).max(1)) * round_cost(kind, wide.columns)
    };
    [192, 128, 64].map(|columns| Wide { columns }).into_iter().min_by_key(cost).expect("there are some")
}

/// Time of a round of blocks, one of 64 columns 100: measured on an H200 over the shapes of Phi-3-mini and Llama-3-8B. Turning
/// quants into f16 costs the same for many columns as for few.
fn round_cost(kind: Kind, columns: usize) -> usize {
    match (kind, columns) {
        (_, 64) => 100,
        (Kind::F16, 128) => 141,
        (Kind::F16, _) => 225,
        (_, 128) => 124,
        _ => 170,
    }
}

impl Product<'_> {
    /// Enqueues the product of one matrix with more columns than the small kernel takes.
    pub(super) fn launch_wide(&self, kernels: &Kernels, wide: Wide, args: MatmulArgs) -> Result<(), CudaError> {
        let shape = self.matrix.shape();
        let kind = self.matrix.kind();
        let maps = maps(kernels, self.matrix, self.x, self.n, wide)?;
        let shared_bytes = ring_bytes(kind, wide.columns) as u32;
        let kernel = kernels.get("matmul_wide", name(kind, wide.columns), shared_bytes)?;
        let cells = shape.n_stripes.div_ceil(STRIPES_PER_BLOCK) * self.n.div_ceil(wide.columns * CLUSTER);
        let n_clusters = cells.min(kernels.gpu().info().n_sms as usize / CLUSTER);
        let mut launch = Launch::new(((n_clusters * CLUSTER) as u32, 1, 1), (THREADS, 1, 1));
        launch.shared_bytes = shared_bytes;
        launch.overlap = true;
        let args = Args::new().with(maps).with(args);
        // SAFETY: WideMaps and MatmulArgs mirror the kernel's parameters; `Product::check` held every buffer against the shapes.
        unsafe { kernel.launch_clusters(kernels.gpu(), launch, CLUSTER as u32, args) }
    }
}

/// Shared memory of a block: stages of x and W, and two barriers for each. Mirrors `Ring`.
fn ring_bytes(kind: Kind, columns: usize) -> usize {
    let tile: usize = kind.plane_bytes().iter().sum();
    let stage = columns * TILE_K * 2 + STRIPES_PER_BLOCK * tile;
    let stages = ((SHARED_BYTES - 256) / stage).min(MOST_STAGES);
    stages * (stage + 16)
}

fn maps(kernels: &Kernels, matrix: &Matrix, x: &HalfRows, n: usize, wide: Wide) -> Result<WideMaps, CudaError> {
    let shape = matrix.shape();
    let columns = Mapped {
        address: x.data.ptr(),
        element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        columns: (shape.n_tiles * TILE_K) as u64,
        rows: n as u64,
        row_bytes: (x.stride * 2) as u64,
        box_columns: TILE_K as u32,
        box_rows: wide.columns as u32,
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    // A stripe's tiles are consecutive: a row of the map, in elements of 8 bytes, for a box has at most 256 of them in a row.
    let plane = |address: u64, bytes: usize| match bytes {
        0 => Ok(TensorMap([0; 16])),
        _ => TensorMap::new(
            kernels,
            &Mapped {
                address,
                element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT64,
                columns: (shape.n_tiles * bytes / 8) as u64,
                rows: shape.n_stripes as u64,
                row_bytes: (shape.n_tiles * bytes) as u64,
                box_columns: (bytes / 8) as u32,
                box_rows: (STRIPES_PER_BLOCK / CLUSTER) as u32,
                swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            },
        ),
    };
    let planes = matrix.planes();
    let [lo, hi, scale] = matrix.kind().plane_bytes();
    Ok(WideMaps {
        x: TensorMap::new(kernels, &columns)?,
        lo: plane(planes.lo, lo)?,
        hi: plane(planes.hi, hi)?,
        scale: plane(planes.scale, scale)?,
    })
}

impl TensorMap {
    fn new(kernels: &Kernels, mapped: &Mapped) -> Result<TensorMap, CudaError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, boxes) = ([mapped.columns, mapped.rows], [mapped.box_columns, mapped.box_rows]);
        // SAFETY: the arrays have two, one, two and two elements for a map of rank two, and live for the call, which writes the map.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                mapped.element,
                2,
                mapped.address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                [mapped.row_bytes].as_ptr(),
                boxes.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                mapped.swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        kernels.gpu().check(result, || format!("cuTensorMapEncodeTiled({sizes:?} in boxes of {boxes:?})"))?;
        Ok(TensorMap(map.opaque))
    }
}

macro_rules! names {
    ($kind:expr, $columns:expr, $($variant:ident $text:literal),*) => {
        match ($kind, $columns) {
            $(
                (Kind::$variant, 64) => concat!("matmul_wide_64_", $text),
                (Kind::$variant, 128) => concat!("matmul_wide_128_", $text),
                (Kind::$variant, _) => concat!("matmul_wide_192_", $text),
            )*
        }
    };
}

fn name(kind: Kind, columns: usize) -> &'static str {
    names!(kind, columns, F16 "f16", Q8 "q8", Q4 "q4", Q4G16 "q4g16", Mx4 "mx4", Q5 "q5", Q6 "q6")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_fill_the_device() {
        let columns = |kind, n_stripes, n| choose(kind, n_stripes, n, 132).columns;
        assert_eq!(columns(Kind::F16, 256, 512), 128); // 64 clusters, one round
        assert_eq!(columns(Kind::F16, 256, 256), 64); // 64 again
        assert_eq!(columns(Kind::F16, 1792, 4096), 128);
        assert_eq!(columns(Kind::Q6, 576, 4096), 192);
        assert_eq!(columns(Kind::Q4, 1, 129), 64);
    }

    #[test]
    fn stages_fit_shared_memory() {
        for kind in [Kind::F16, Kind::Q8, Kind::Q4, Kind::Q4G16, Kind::Mx4, Kind::Q5, Kind::Q6] {
            for columns in [64, 128, 192] {
                let bytes = ring_bytes(kind, columns);
                assert!(bytes <= SHARED_BYTES && bytes >= 4 * columns * TILE_K * 2, "{kind:?} {columns}: {bytes}");
            }
        }
    }
}
