//! Products of the same few rows with matrices of different kinds, in one launch: q, k and v where v has a format of its own.

use super::matmul::{Experts, MatmulArgs, NormInput, Product, SMALL_BLOCKS, SMALL_COLUMNS};
use super::matmul::{chunks, leaves_room, most_shared, small_shared, staged_bytes};
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Most products of a launch. Mirrors `PARTS` of `matmul_mixed.cu`.
pub const MOST_PARTS: usize = 3;

/// Mirrors `MixedArgs` of `matmul_mixed.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MixedArgs {
    part: [MatmulArgs; MOST_PARTS],
    kind: [i32; MOST_PARTS],
    first_block: [i32; MOST_PARTS + 1],
}

/// Whether [`launch_together`] takes these products: two or three, of the same few rows and one matrix each, whose rows fit into
/// shared memory.
pub fn can_go_together(products: &[Product<'_>]) -> bool {
    let Some(first) = products.first() else { return false };
    let alike = |product: &Product<'_>| {
        matches!(product.experts, Experts::One)
            && product.n == first.n
            && product.matrix.n_cols() == first.matrix.n_cols()
            && product.x.data.ptr() == first.x.data.ptr()
            && product.x.stride == first.x.stride
    };
    (2..=MOST_PARTS).contains(&products.len())
        && products.iter().all(alike)
        && first.n <= SMALL_COLUMNS
        && staged_bytes(first.matrix.shape().n_tiles, first.n).is_some()
}

/// Enqueues products that [`can_go_together`], of their x or of rows that the kernel normalises instead: the same bits as each
/// product by itself.
///
/// # Errors
/// [`CudaError::Contract`] for products that cannot, or shapes that do not go together; a failed launch.
pub fn launch_together(
    kernels: &Kernels,
    products: &[Product<'_>],
    norm: Option<&NormInput<'_>>,
) -> Result<(), CudaError> {
    for product in products {
        product.check()?;
        norm.map_or(Ok(()), |norm| product.check_norm(norm))?;
    }
    let [first, .., last] = products else { return Err(apart(products)) };
    if !can_go_together(products) {
        return Err(apart(products));
    }
    let n_tiles = first.matrix.shape().n_tiles;
    let info = kernels.gpu().info();
    let stripes: Vec<usize> = products.iter().map(|product| product.matrix.shape().n_stripes).collect();
    let first_block = first_blocks(&stripes, SMALL_BLOCKS * info.n_sms as usize);
    let is_worth_it = leaves_room(first_block[MOST_PARTS], chunks(n_tiles), info.n_sms as usize);
    let shared = small_shared(n_tiles, first.n, is_worth_it, info.capability).ok_or_else(|| apart(products))?;
    // A part that there is not has no blocks; what it would be is not looked at.
    let part = |i: usize| products.get(i).unwrap_or(last);
    let args = MixedArgs {
        part: std::array::from_fn(|i| part(i).args(0, norm).with_early(shared.early)),
        kind: std::array::from_fn(|i| part(i).matrix.kind().number()),
        first_block: first_block.map(|block| block as i32),
    };
    let mut launch = Launch::new((first_block[MOST_PARTS] as u32, 1, 1), (32, chunks(n_tiles) as u32, 1));
    launch.shared_bytes = shared.bytes;
    launch.overlap = true;
    let kernel = kernels.get("matmul_mixed", "matmul_mixed", most_shared(info.capability))?;
    // SAFETY: MixedArgs mirrors the kernel's parameter; every product was held against its buffers, and the rows against each product.
    unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(args)) }
}

/// The first block of each part, and the number of all blocks in what follows the last one: as many as the device holds at once, `most`,
/// where every block has as many stripes as the others or one less. Parts without stripes have no blocks.
fn first_blocks(stripes: &[usize], most: usize) -> [usize; MOST_PARTS + 1] {
    let blocks_in = |rounds: usize| stripes.iter().map(move |stripes| stripes.div_ceil(rounds));
    let longest = stripes.iter().copied().max().unwrap_or(1).max(1);
    // Where there are more parts than the device holds blocks, each has one.
    let rounds = (1..longest).find(|rounds| blocks_in(*rounds).sum::<usize>() <= most).unwrap_or(longest);
    let mut first = [0; MOST_PARTS + 1];
    let mut blocks = blocks_in(rounds);
    for part in 0..MOST_PARTS {
        first[part + 1] = first[part] + blocks.next().unwrap_or(0);
    }
    first
}

fn apart(products: &[Product<'_>]) -> CudaError {
    let shapes: Vec<_> = products.iter().map(|p| (p.n, p.matrix.n_rows(), p.matrix.n_cols())).collect();
    CudaError::Contract {
        op: "launch_together".into(),
        expected: format!(
            "2 to {MOST_PARTS} products of the same x of up to {SMALL_COLUMNS} rows, with one matrix each"
        ),
        found: format!("(columns, n_rows, n_cols): {shapes:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_the_blocks_that_the_device_holds() {
        // Qwen2.5-0.5B: 896 + 128 rows of q and k, 128 of v: a stripe each.
        assert_eq!(first_blocks(&[64, 8], 264), [0, 64, 72, 72]);
        // Llama-3-8B: 5,120 and 1,024 rows, two stripes each; alone they would take 160 and 64 blocks.
        assert_eq!(first_blocks(&[320, 64], 264), [0, 160, 192, 192]);
        assert_eq!(first_blocks(&[256, 64, 64], 264), [0, 128, 160, 192]);
        assert_eq!(first_blocks(&[1, 1, 1], 1), [0, 1, 2, 3], "no part goes without");
    }

    #[test]
    fn every_stripe_has_a_block_and_no_block_is_idle() {
        for stripes in [[1, 1, 1], [7, 1, 3], [300, 2, 1], [264, 264, 264], [1000, 10, 500], [5, 0, 0]] {
            for most in [1, 3, 8, 264] {
                let first = first_blocks(&stripes, most);
                assert!(first[MOST_PARTS] <= most.max(MOST_PARTS), "{stripes:?}, {most}");
                for (part, n_stripes) in stripes.into_iter().enumerate() {
                    let n_blocks = first[part + 1] - first[part];
                    assert!(n_blocks <= n_stripes && (n_blocks > 0) == (n_stripes > 0), "{stripes:?}, {most}");
                }
            }
        }
    }

    #[test]
    fn a_part_that_there_is_not_begins_where_all_end() {
        // The kernel takes the last part whose first block is not above its own.
        let first = first_blocks(&[64, 8], 264);
        let which = |at: usize| usize::from(at >= first[1]) + usize::from(at >= first[2]);
        assert!((0..first[MOST_PARTS]).all(|at| which(at) < 2));
    }
}
