//! Rows of the embedding table, decoded.

use super::matrix::Format;
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// A table of encoded rows, as the file has them.
#[derive(Debug, Clone)]
pub struct Table {
    /// The encoding.
    pub format: Format,
    /// Rows.
    pub n_rows: usize,
    /// Elements of a row.
    pub n_cols: usize,
    /// `n_rows` encoded rows.
    pub data: Buffer<u8>,
}

/// Enqueues `x[t] = scale * table[tokens[t]]` for `n` tokens, each below the table's rows; `x` is `[n, n_cols]`.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn embed(
    kernels: &Kernels,
    table: &Table,
    tokens: &Buffer<u32>,
    scale: f32,
    x: &Buffer<f32>,
    n: usize,
) -> Result<(), CudaError> {
    let row_bytes = table.format.row_bytes(table.n_cols).unwrap_or(0);
    if row_bytes == 0 || table.data.len() != table.n_rows * row_bytes {
        let expected = format!("{} rows of {row_bytes} bytes", table.n_rows);
        return Err(contract("table", expected, format!("{} bytes", table.data.len())));
    }
    if n == 0 || tokens.len() < n || x.len() < n * table.n_cols {
        let expected = format!("1 or more tokens and rows of {}, {n} said", table.n_cols);
        return Err(contract("x", expected, format!("{} tokens, {} elements", tokens.len(), x.len())));
    }
    let args = Args::new()
        .with(x.ptr())
        .with(table.data.ptr())
        .with(tokens.ptr())
        .with(row_bytes as u64)
        .with(table.n_cols as i32)
        .with(scale);
    // The one plain launch of a model's step. `feed` has held its successors until it ended; that is an order of starts. Kernels further
    // on read items, block tables and the cache of earlier steps before they wait for their predecessor, and so without the wait
    // that makes a predecessor's writes visible. The border of a plain launch does that for all that starts after it.
    let launch = Launch::new((n as u32, table.n_cols.div_ceil(1024) as u32, 1), (64, 1, 1));
    // SAFETY: the arguments are the kernel's parameters in order; the checks above held the buffers against the shapes, and
    // tokens are validated where the batch is made.
    unsafe { kernels.get("embed", name(table.format), 0)?.launch(kernels.gpu(), launch, args) }
}

fn name(format: Format) -> &'static str {
    match format.name {
        "F32" => "embed_f32",
        "F16" => "embed_f16",
        "BF16" => "embed_bf16",
        "Q8_0" => "embed_q8_0",
        "IQ4_NL" => "embed_iq4_nl",
        "IQ4_XS" => "embed_iq4_xs",
        "Q4_0" => "embed_q4_0",
        "Q4_1" => "embed_q4_1",
        "Q4_K" => "embed_q4_k",
        "Q2_K" => "embed_q2_k",
        "MXFP4" => "embed_mxfp4",
        "Q5_0" => "embed_q5_0",
        "Q5_1" => "embed_q5_1",
        "Q5_K" => "embed_q5_k",
        "Q6_K" => "embed_q6_k",
        _ => "embed_q3_k",
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: format!("embed: {what}"), expected: expected.to_string(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::matrix::FORMATS;
    use super::*;

    #[test]
    fn every_format_has_a_kernel_of_its_own() {
        let names: std::collections::BTreeSet<&str> = FORMATS.iter().map(|f| name(*f)).collect();
        assert_eq!(names.len(), FORMATS.len());
        for format in FORMATS {
            assert_eq!(name(*format), format!("embed_{}", format.name.to_lowercase()));
        }
    }
}
