//! Weight matrices in tensor-core tiles (`kernels/tiles.cuh`), repacked on the GPU from GGUF's blocks.

use crate::arena::{Arena, Buffer};
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};
use half::f16;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns (k) of a tile.
pub const TILE_K: usize = 64;

/// How a matrix's weights are kept on the device. Mirrors `Kind` of `tiles.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// f16 with a power of two per tensor.
    F16,
    /// 8 bits, an f16 scale per 32.
    Q8,
    /// 4 bits, f16 scale and minimum per 32.
    Q4,
    /// 4 bits, f16 scale and minimum per 16.
    Q4G16,
    /// E2M1, an exponent per 32.
    Mx4,
    /// 5 bits, f16 scale and minimum per 32.
    Q5,
    /// 6 bits, an f16 scale per 16.
    Q6,
}

impl Kind {
    /// The kind's part of a kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::F16 => "f16",
            Kind::Q8 => "q8",
            Kind::Q4 => "q4",
            Kind::Q4G16 => "q4g16",
            Kind::Mx4 => "mx4",
            Kind::Q5 => "q5",
            Kind::Q6 => "q6",
        }
    }

    /// The kind's number in the kernels: `Kind` of `tiles.cuh`.
    pub(super) fn number(self) -> i32 {
        self as i32
    }

    /// Bytes of one tile in the planes of quants, high bits and scales.
    pub fn plane_bytes(self) -> [usize; 3] {
        match self {
            Kind::F16 => [2048, 0, 0],
            Kind::Q8 => [1024, 0, 64],
            Kind::Q4 => [512, 0, 128],
            Kind::Q4G16 => [512, 0, 256],
            Kind::Mx4 => [512, 0, 32],
            Kind::Q5 => [512, 128, 128],
            Kind::Q6 => [512, 256, 128],
        }
    }

    /// Scales are stored times this: small products of scales stay clear of f16's subnormals.
    fn factor(self) -> f32 {
        match self {
            Kind::F16 | Kind::Mx4 => 1.0,
            _ => 64.0,
        }
    }
}

/// A file format, as the repacking kernels name it; the crate knows no enum of its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// The format's name in GGUF's documentation: `Q4_K`.
    pub name: &'static str,
    kernel: &'static str,
    kind: Kind,
    block: (usize, usize),
}

/// Every format with its kind on the device, its elements and bytes per block.
pub const FORMATS: &[Format] = &[
    Format { name: "F32", kernel: "repack_f32", kind: Kind::F16, block: (1, 4) },
    Format { name: "F16", kernel: "repack_f16", kind: Kind::F16, block: (1, 2) },
    Format { name: "BF16", kernel: "repack_bf16", kind: Kind::F16, block: (1, 2) },
    Format { name: "Q8_0", kernel: "repack_q8_0", kind: Kind::Q8, block: (32, 34) },
    Format { name: "IQ4_NL", kernel: "repack_iq4_nl", kind: Kind::Q8, block: (32, 18) },
    Format { name: "IQ4_XS", kernel: "repack_iq4_xs", kind: Kind::Q8, block: (256, 136) },
    Format { name: "Q4_0", kernel: "repack_q4_0", kind: Kind::Q4, block: (32, 18) },
    Format { name: "Q4_1", kernel: "repack_q4_1", kind: Kind::Q4, block: (32, 20) },
    Format { name: "Q4_K", kernel: "repack_q4_k", kind: Kind::Q4, block: (256, 144) },
    Format { name: "Q2_K", kernel: "repack_q2_k", kind: Kind::Q4G16, block: (256, 84) },
    Format { name: "MXFP4", kernel: "repack_mxfp4", kind: Kind::Mx4, block: (32, 17) },
    Format { name: "Q5_0", kernel: "repack_q5_0", kind: Kind::Q5, block: (32, 22) },
    Format { name: "Q5_1", kernel: "repack_q5_1", kind: Kind::Q5, block: (32, 24) },
    Format { name: "Q5_K", kernel: "repack_q5_k", kind: Kind::Q5, block: (256, 176) },
    Format { name: "Q6_K", kernel: "repack_q6_k", kind: Kind::Q6, block: (256, 210) },
    Format { name: "Q3_K", kernel: "repack_q3_k", kind: Kind::Q6, block: (256, 110) },
];

impl Format {
    /// The format with this name.
    pub fn by_name(name: &str) -> Option<Format> {
        FORMATS.iter().copied().find(|f| f.name == name)
    }

    /// How its weights are kept on the device.
    pub fn kind(self) -> Kind {
        self.kind
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        self.block
    }

    /// Bytes of an encoded row, if the row is whole blocks.
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        n_cols.is_multiple_of(self.block.0).then(|| n_cols / self.block.0 * self.block.1)
    }
}

/// Shape of a matrix in tiles: `n_mats` matrices of `n_stripes` stripes of `n_tiles` tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TileShape {
    /// Stacked matrices (experts).
    pub n_mats: usize,
    /// Stripes of 16 rows of one matrix.
    pub n_stripes: usize,
    /// Tiles of 64 k of one stripe.
    pub n_tiles: usize,
}

impl TileShape {
    /// Tiles in all.
    pub fn count(self) -> usize {
        self.n_mats * self.n_stripes * self.n_tiles
    }
}

fn row_step(layout: Layout) -> usize {
    match layout {
        Layout::Stacked => TILE_ROWS,
        Layout::Gated => TILE_ROWS / 2,
    }
}

/// The shape of `n_mats` matrices of `n_cols` columns made of `parts`.
pub fn tile_shape(parts: &[Part], layout: Layout, n_cols: usize, n_mats: usize) -> TileShape {
    let n_stripes = match layout {
        Layout::Stacked => parts.iter().map(|part| part.n_rows.div_ceil(TILE_ROWS)).sum(),
        Layout::Gated => parts.first().map_or(0, |part| part.n_rows.div_ceil(TILE_ROWS / 2)),
    };
    TileShape { n_mats, n_stripes, n_tiles: n_cols.div_ceil(TILE_K) }
}

/// Bytes that a matrix of this shape and kind takes in an arena: what [`Matrix::new`] allocates.
pub fn matrix_bytes(kind: Kind, shape: TileShape) -> u64 {
    kind.plane_bytes().iter().map(|b| ((b * shape.count()) as u64).next_multiple_of(crate::arena::ALIGN)).sum()
}

/// Rows joined into one matrix, as one product computes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Parts one below the other, each padded to whole stripes.
    Stacked,
    /// Two parts of the same shape, gate and up: stripes of 8 rows of the one above 8 rows of the other.
    Gated,
}

/// One part of a matrix: rows encoded in a format.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// The encoding.
    pub format: Format,
    /// Rows of each matrix.
    pub n_rows: usize,
}

/// A matrix, or a stack of them, resident in tiles.
#[derive(Debug, Clone)]
pub struct Matrix {
    kind: Kind,
    shape: TileShape,
    n_cols: usize,
    layout: Layout,
    parts: Vec<(usize, usize)>, // first stripe and rows of each part
    lo: Buffer<u8>,
    hi: Option<Buffer<u8>>,
    scale: Option<Buffer<u8>>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RepackArgs {
    source: u64,
    second: u64,
    lo: u64,
    hi: u64,
    scale: u64,
    row_bytes: u64,
    first_stripe: u64,
    n_rows: i32,
    n_cols: i32,
    n_tiles: i32,
    factor: f32,
}

/// Rows of one part of one matrix of a stack, in the order of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRange {
    /// Which part; 0 for gated parts, which are filled together.
    pub part: usize,
    /// Which matrix of the stack.
    pub mat: usize,
    /// First row: a multiple of [`Matrix::row_step`].
    pub first: usize,
    /// Rows; a multiple of [`Matrix::row_step`] unless they are the last.
    pub n_rows: usize,
}

/// Addresses of a matrix's planes. Mirrors `Planes` of `tiles.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Planes {
    pub(crate) lo: u64,
    pub(crate) hi: u64,
    pub(crate) scale: u64,
}

impl Matrix {
    /// Takes memory for `n_mats` matrices made of `parts`, all of one kind and `n_cols` columns. Weights are filled in by
    /// [`Matrix::fill`], part by part.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if the parts do not go together; [`CudaError::OutOfMemory`].
    pub fn new(
        arena: &Arena,
        what: &str,
        parts: &[Part],
        layout: Layout,
        n_cols: usize,
        n_mats: usize,
    ) -> Result<Matrix, CudaError> {
        let kind = Self::common_kind(what, parts, layout, n_cols)?;
        let shape = tile_shape(parts, layout, n_cols, n_mats);
        let firsts = parts.iter().scan(0, |next, part| {
            let first = *next;
            *next += part.n_rows.div_ceil(TILE_ROWS);
            Some((first, part.n_rows))
        });
        let parts = match layout {
            Layout::Stacked => firsts.collect(),
            Layout::Gated => vec![(0, parts[0].n_rows)],
        };
        let [lo, hi, scale] = kind.plane_bytes().map(|bytes| bytes * shape.count());
        let plane = |bytes: usize| if bytes == 0 { Ok(None) } else { arena.alloc::<u8>(bytes, what).map(Some) };
        let lo = arena.alloc(lo, what)?;
        let (hi, scale) = (plane(hi)?, plane(scale)?);
        if let Some(hi) = &hi {
            hi.zero()?; // bits are put in with OR
        }
        Ok(Matrix { kind, shape, n_cols, layout, parts, lo, hi, scale })
    }

    /// One of several stacked parts as a matrix of its own; shares the memory.
    ///
    /// # Panics
    /// If the parts are gated, there are several matrices, or no such part.
    pub fn part(&self, part: usize) -> Matrix {
        assert!(self.layout == Layout::Stacked && self.shape.n_mats == 1, "parts of one stacked matrix");
        let (first, n_rows) = self.parts[part];
        let shape = TileShape { n_stripes: n_rows.div_ceil(TILE_ROWS), ..self.shape };
        let [lo, hi, scale] = self.kind.plane_bytes();
        let cut = |plane: &Buffer<u8>, bytes: usize| {
            let tile = bytes * self.shape.n_tiles;
            plane.slice(first * tile..(first + shape.n_stripes) * tile)
        };
        Matrix {
            shape,
            parts: vec![(0, n_rows)],
            lo: cut(&self.lo, lo),
            hi: self.hi.as_ref().map(|plane| cut(plane, hi)),
            scale: self.scale.as_ref().map(|plane| cut(plane, scale)),
            ..self.clone()
        }
    }

    fn common_kind(what: &str, parts: &[Part], layout: Layout, n_cols: usize) -> Result<Kind, CudaError> {
        let contract = |expected: &str, found: String| CudaError::Contract {
            op: format!("Matrix::new({what})"),
            expected: expected.to_owned(),
            found,
        };
        let first = parts.first().ok_or_else(|| contract("at least one part", "none".into()))?;
        if layout == Layout::Gated && (parts.len() != 2 || parts[0].n_rows != parts[1].n_rows) {
            return Err(contract("two parts of as many rows", format!("{parts:?}")));
        }
        for part in parts {
            if part.format.kind != first.format.kind {
                return Err(contract("parts of one kind", format!("{} and {}", first.format.name, part.format.name)));
            }
            if part.format.row_bytes(n_cols).is_none() || part.n_rows == 0 || n_cols == 0 {
                return Err(contract("rows of whole blocks", format!("{} rows of {n_cols} columns", part.n_rows)));
            }
        }
        Ok(first.format.kind)
    }

    /// Rows of the source that a stripe takes of each part.
    pub fn row_step(&self) -> usize {
        row_step(self.layout)
    }

    /// Enqueues the repacking of some rows from encoded rows in device memory; of a gated matrix `sources` are the rows of the
    /// gate and those of up, of another it is one buffer.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if the rows, the sources' size or the format are not the part's; a failed launch.
    pub fn fill_rows(
        &self,
        kernels: &Kernels,
        rows: RowRange,
        format: Format,
        sources: &[&Buffer<u8>],
    ) -> Result<(), CudaError> {
        let (first_stripe, part_rows) = self.parts[rows.part];
        let step = self.row_step();
        let row_bytes = format.row_bytes(self.n_cols).unwrap_or(0);
        let expected = rows.n_rows * row_bytes;
        let whole = rows.first.is_multiple_of(step)
            && rows.n_rows > 0
            && (rows.n_rows.is_multiple_of(step) || rows.first + rows.n_rows == part_rows)
            && rows.first + rows.n_rows <= part_rows
            && rows.mat < self.shape.n_mats;
        let n_sources = if self.is_gated() { 2 } else { 1 };
        if format.kind != self.kind
            || !whole
            || sources.len() != n_sources
            || sources.iter().any(|s| s.len() != expected)
        {
            return Err(CudaError::Contract {
                op: "Matrix::fill".into(),
                expected: format!(
                    "{n_sources} x {expected} bytes of kind {:?}, whole stripes of {part_rows} rows",
                    self.kind
                ),
                found: format!(
                    "{rows:?}: {:?} bytes of {}",
                    sources.iter().map(|s| s.len()).collect::<Vec<_>>(),
                    format.name
                ),
            });
        }
        let planes = self.planes();
        let args = RepackArgs {
            source: sources[0].ptr(),
            second: sources.get(1).map_or(0, |s| s.ptr()),
            lo: planes.lo,
            hi: planes.hi,
            scale: planes.scale,
            row_bytes: row_bytes as u64,
            first_stripe: (rows.mat * self.shape.n_stripes + first_stripe + rows.first / step) as u64,
            n_rows: rows.n_rows as i32,
            n_cols: self.n_cols as i32,
            n_tiles: self.shape.n_tiles as i32,
            factor: self.kind.factor(),
        };
        let grid = ((2 * self.shape.n_tiles).div_ceil(8) as u32, rows.n_rows.div_ceil(step) as u32, 1);
        let kernel = kernels.get("repack", format.kernel, 0)?;
        // SAFETY: RepackArgs mirrors the kernel's parameter; sources and planes are as large as the shapes say.
        unsafe { kernel.launch(kernels.gpu(), Launch::new(grid, (8, 8, 1)), Args::new().with(args)) }
    }

    /// [`Matrix::fill_rows`] for all rows of a part of every matrix, from sources that hold all of them.
    ///
    /// # Errors
    /// As there.
    pub fn fill(
        &self,
        kernels: &Kernels,
        part: usize,
        format: Format,
        sources: &[&Buffer<u8>],
    ) -> Result<(), CudaError> {
        let n_rows = self.parts[part].1;
        let bytes = n_rows * format.row_bytes(self.n_cols).unwrap_or(0);
        for source in sources {
            if source.len() != self.shape.n_mats * bytes {
                let (expected, found) =
                    (format!("{} x {bytes} bytes", self.shape.n_mats), format!("{} bytes", source.len()));
                return Err(CudaError::Contract { op: "Matrix::fill".into(), expected, found });
            }
        }
        for mat in 0..self.shape.n_mats {
            let cut: Vec<Buffer<u8>> = sources.iter().map(|s| s.slice(mat * bytes..(mat + 1) * bytes)).collect();
            let rows = RowRange { part, mat, first: 0, n_rows };
            self.fill_rows(kernels, rows, format, &cut.iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// The weights as f32 `[n_mats, 16 rows a stripe, n_cols]`, exactly as the products see them: for tests.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if `out` has another size; a failed launch.
    pub fn unpack(&self, kernels: &Kernels, out: &Buffer<f32>) -> Result<(), CudaError> {
        let n_rows = self.shape.n_stripes * TILE_ROWS;
        let expected = self.shape.n_mats * n_rows * self.n_cols;
        if out.len() != expected {
            let (expected, found) = (expected.to_string(), out.len().to_string());
            return Err(CudaError::Contract { op: "Matrix::unpack".into(), expected, found });
        }
        let name = match self.kind {
            Kind::F16 => "untile_f16",
            Kind::Q8 => "untile_q8",
            Kind::Q4 => "untile_q4",
            Kind::Q4G16 => "untile_q4g16",
            Kind::Mx4 => "untile_mx4",
            Kind::Q5 => "untile_q5",
            Kind::Q6 => "untile_q6",
        };
        let args = Args::new()
            .with(self.planes())
            .with(out.ptr())
            .with(n_rows as i32)
            .with(self.n_cols as i32)
            .with(self.shape.n_tiles as i32)
            .with(1.0 / self.kind.factor());
        let grid = (self.shape.n_tiles as u32, self.shape.n_stripes as u32, self.shape.n_mats as u32);
        let kernel = kernels.get("repack", name, 0)?;
        // SAFETY: the arguments are the kernel's parameters in order; `out` is as large as the shapes say.
        unsafe { kernel.launch(kernels.gpu(), Launch::new(grid, (32, 1, 1)), args) }
    }

    /// How the weights are kept.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Shape in tiles.
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Columns (k) without padding.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Columns (k) with padding: what rows of activations must hold, zeros from [`Matrix::n_cols`] on.
    pub fn padded_cols(&self) -> usize {
        self.shape.n_tiles * TILE_K
    }

    /// Rows of the product: of all parts with their padding, or of one of two gated parts.
    pub fn n_rows(&self) -> usize {
        match self.layout {
            Layout::Stacked if self.parts.len() == 1 => self.parts[0].1,
            Layout::Stacked => self.shape.n_stripes * TILE_ROWS,
            Layout::Gated => self.parts[0].1,
        }
    }

    /// First row of a part in the product of stacked parts.
    pub fn first_row(&self, part: usize) -> usize {
        self.parts[part].0 * TILE_ROWS
    }

    /// Whether it holds gate and up.
    pub fn is_gated(&self) -> bool {
        self.layout == Layout::Gated
    }

    /// The power of two that undoes the scales' factor.
    pub(crate) fn out_scale(&self) -> f32 {
        1.0 / self.kind.factor()
    }

    pub(crate) fn planes(&self) -> Planes {
        let ptr = |plane: &Option<Buffer<u8>>| plane.as_ref().map_or(0, Buffer::ptr);
        Planes { lo: self.lo.ptr(), hi: ptr(&self.hi), scale: ptr(&self.scale) }
    }
}

/// Activations that a product reads: f16 `[rows, stride]`, zero from the matrix's columns to the stride.
#[derive(Debug, Clone)]
pub struct HalfRows {
    /// The elements.
    pub data: Buffer<f16>,
    /// Elements from one row to the next; a multiple of 64.
    pub stride: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_takes_what_its_bits_take() {
        let weights = (TILE_ROWS * TILE_K) as f64;
        let bits = |kind: Kind| kind.plane_bytes().iter().sum::<usize>() as f64 * 8.0 / weights;
        assert_eq!(bits(Kind::F16), 16.0);
        assert_eq!(bits(Kind::Q8), 8.5);
        assert_eq!(bits(Kind::Q4), 5.0);
        assert_eq!(bits(Kind::Mx4), 4.25);
        assert_eq!(bits(Kind::Q5), 6.0);
        assert_eq!(bits(Kind::Q6), 7.0);
    }

    #[test]
    fn rows_must_be_whole_blocks() {
        let q4_k = Format::by_name("Q4_K").expect("listed");
        assert_eq!(q4_k.row_bytes(512), Some(288));
        assert_eq!(q4_k.row_bytes(896), None);
        assert_eq!(Format::by_name("Q9_X"), None);
    }
}
