//! Resident weights on a GPU: tiles for products, encoded rows for the embedding, f32 for what is read element by element.

use super::plan::{format, layout, padded_values, runs};
use super::staging::Staging;
use crate::backend::{Join, WeightShape, WeightSource};
use crate::dtype::DTypeError;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer};
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::embed::Table;
use playhouse_cuda::launch::matrix::{Format, Layout, Matrix, Part};
use std::sync::Arc;

/// A weight in the forms that its use asks for.
#[derive(Debug, Clone)]
pub struct CudaWeight {
    pub(super) name: String,
    pub(super) values: Option<Values>,
    pub(super) table: Option<Table>,
    pub(super) product: Option<Product>,
}

/// f32 elements, perhaps a part of joined vectors.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pub(super) own: Buffer<f32>,
    pub(super) joined: Option<JoinedValues>,
}

/// A place in joined vectors.
#[derive(Debug, Clone)]
pub(super) struct JoinedValues {
    pub(super) whole: Arc<Buffer<f32>>,
    /// The first element.
    pub(super) at: usize,
}

/// A matrix, perhaps a part of a joined one.
#[derive(Debug, Clone)]
pub(super) struct Product {
    /// The weight alone; none if it is the gate or up of a gated matrix.
    pub(super) own: Option<Matrix>,
    pub(super) joined: Option<Joined<Matrix>>,
}

/// A place in something that several weights share.
#[derive(Debug)]
pub(super) struct Joined<T> {
    pub(super) whole: Arc<T>,
    pub(super) part: usize,
    pub(super) n_parts: usize,
}

impl<T> Clone for Joined<T> {
    fn clone(&self) -> Self {
        Self { whole: self.whole.clone(), part: self.part, n_parts: self.n_parts }
    }
}

impl<T> Joined<T> {
    /// What `parts` are together, if they are all of it in order.
    pub(super) fn all<'a>(parts: &[Option<&'a Joined<T>>]) -> Option<&'a T> {
        let first = parts.first().copied().flatten()?;
        let mut places = parts.iter().enumerate();
        let is_place = |(i, part): (usize, &Option<&Joined<T>>)| {
            part.is_some_and(|p| p.part == i && Arc::ptr_eq(&p.whole, &first.whole))
        };
        (first.n_parts == parts.len() && places.all(is_place)).then_some(&*first.whole)
    }
}

/// Why a weight could not be made resident.
pub(super) enum WeightError {
    Cuda(CudaError),
    Unsupported(String),
}

impl From<CudaError> for WeightError {
    fn from(error: CudaError) -> Self {
        WeightError::Cuda(error)
    }
}

impl From<DTypeError> for WeightError {
    fn from(error: DTypeError) -> Self {
        WeightError::Unsupported(error.to_string())
    }
}

/// Where weights go.
pub(super) struct Target<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) arena: &'a Arena,
    pub(super) staging: &'a mut Staging,
}

impl Target<'_> {
    /// Makes weights resident that are used together, all in the same way.
    pub(super) fn load(&mut self, sources: &[WeightSource<'_>], join: Join) -> Result<Vec<CudaWeight>, WeightError> {
        let Some(first) = sources.first() else { return Ok(Vec::new()) };
        let uses = first.uses;
        sources.iter().try_for_each(check)?;
        let blank = |s: &WeightSource<'_>| CudaWeight { name: s.name.into(), values: None, table: None, product: None };
        let mut weights: Vec<CudaWeight> = sources.iter().map(blank).collect();
        if uses.values {
            let all = self.values(sources)?;
            weights.iter_mut().zip(all).for_each(|(weight, values)| weight.values = Some(values));
        }
        for (weight, source) in weights.iter_mut().zip(sources).filter(|_| uses.rows) {
            weight.table = Some(self.table(source)?);
        }
        if uses.product {
            let all = self.products(sources, join)?;
            weights.iter_mut().zip(all).for_each(|(weight, product)| weight.product = Some(product));
        }
        Ok(weights)
    }

    /// Decoded to f32; several are joined, each padded to whole stripes of a product's rows.
    fn values(&mut self, sources: &[WeightSource<'_>]) -> Result<Vec<Values>, WeightError> {
        let is_joined = sources.len() > 1;
        let lens: Vec<usize> = sources.iter().map(|s| padded_values(&s.shape(), is_joined)).collect();
        let whole = Arc::new(self.arena.alloc::<f32>(lens.iter().sum(), sources[0].name)?);
        let mut host = vec![0.0; whole.len()];
        let mut all = Vec::new();
        let mut at = 0;
        for (source, len) in sources.iter().zip(&lens) {
            let n = source.n_mats * source.n_rows * source.n_cols;
            source.dtype.decode(&source.bytes, &mut host[at..at + n])?;
            let joined = is_joined.then(|| JoinedValues { whole: whole.clone(), at });
            all.push(Values { own: whole.slice(at..at + n), joined });
            at += len;
        }
        whole.write(&host)?;
        Ok(all)
    }

    /// Encoded rows as they are.
    fn table(&mut self, source: &WeightSource<'_>) -> Result<Table, WeightError> {
        let format = known(source)?;
        let data = self.arena.alloc::<u8>(source.bytes.len(), source.name)?;
        self.staging.copy(&source.bytes, &data)?;
        Ok(Table { format, n_rows: source.n_mats * source.n_rows, n_cols: source.n_cols, data })
    }

    fn products(&mut self, sources: &[WeightSource<'_>], join: Join) -> Result<Vec<Product>, WeightError> {
        let shapes: Vec<WeightShape> = sources.iter().map(WeightSource::shape).collect();
        let mut all = Vec::new();
        for run in runs(&shapes, join) {
            let layout = layout(join, &run);
            let sources = &sources[run];
            let parts: Vec<Part> = sources
                .iter()
                .map(|s| Ok(Part { format: known(s)?, n_rows: s.n_rows }))
                .collect::<Result<_, WeightError>>()?;
            let (n_cols, n_mats) = (sources[0].n_cols, sources[0].n_mats);
            let matrix = Matrix::new(self.arena, sources[0].name, &parts, layout, n_cols, n_mats)?;
            self.fill(&matrix, layout, &parts, sources)?;
            let matrix = Arc::new(matrix);
            for part in 0..sources.len() {
                let joined =
                    (sources.len() > 1).then(|| Joined { whole: matrix.clone(), part, n_parts: sources.len() });
                let own = match (layout, sources.len()) {
                    (_, 1) => Some((*matrix).clone()),
                    (Layout::Stacked, _) => Some(matrix.part(part)),
                    (Layout::Gated, _) => None,
                };
                all.push(Product { own, joined });
            }
        }
        Ok(all)
    }

    fn fill(
        &mut self,
        matrix: &Matrix,
        layout: Layout,
        parts: &[Part],
        sources: &[WeightSource<'_>],
    ) -> Result<(), CudaError> {
        match layout {
            Layout::Gated => {
                let bytes: Vec<&[u8]> = sources.iter().map(|s| &*s.bytes).collect();
                self.staging.fill(self.kernels, matrix, (0, parts[0]), &bytes)
            }
            Layout::Stacked => {
                let mut parts = parts.iter().zip(sources).enumerate();
                parts.try_for_each(|(i, (part, s))| self.staging.fill(self.kernels, matrix, (i, *part), &[&*s.bytes]))
            }
        }
    }
}

fn known(source: &WeightSource<'_>) -> Result<Format, WeightError> {
    format(source.dtype).ok_or_else(|| WeightError::Unsupported(format!("no kernel reads {}", source.dtype.name())))
}

/// Holds a source's bytes against its sizes.
fn check(source: &WeightSource<'_>) -> Result<(), WeightError> {
    let WeightSource { dtype, n_mats, n_rows, n_cols, .. } = *source;
    let Some(row_bytes) = dtype.row_bytes(n_cols) else {
        let reason = format!("rows of {n_cols} elements are no whole number of {} blocks", dtype.name());
        return Err(WeightError::Unsupported(reason));
    };
    let expected = n_mats.checked_mul(n_rows).and_then(|n| n.checked_mul(row_bytes));
    if expected != Some(source.bytes.len()) || source.bytes.is_empty() {
        return Err(WeightError::Unsupported(format!(
            "expected {n_mats} x {n_rows} rows of {row_bytes} bytes ({}), found {} bytes",
            dtype.name(),
            source.bytes.len()
        )));
    }
    Ok(())
}

impl CudaWeight {
    /// The elements, of which there must be `n`.
    ///
    /// # Panics
    /// If the weight was loaded for another use or has another size: shapes are validated when a model is loaded.
    pub(super) fn vector(&self, n: usize) -> &Buffer<f32> {
        let values = self.values.as_ref().unwrap_or_else(|| panic!("`{}` was not loaded as values", self.name));
        assert_eq!(values.own.len(), n, "`{}` is not a vector of {n}", self.name);
        &values.own
    }

    /// The matrix of this weight alone.
    ///
    /// # Panics
    /// If the weight was loaded for another use, or is half of a gated matrix.
    pub(super) fn matrix(&self) -> &Matrix {
        let own = self.product.as_ref().and_then(|p| p.own.as_ref());
        own.unwrap_or_else(|| panic!("`{}` was not loaded for products of its own", self.name))
    }

    pub(super) fn joined_matrix(&self) -> Option<&Joined<Matrix>> {
        self.product.as_ref()?.joined.as_ref()
    }
}
