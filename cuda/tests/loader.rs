//! The way of weights to the GPU: every byte in its place, in order, from memory and files; failures leave the loader usable.

mod support;

use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matrix::{Format, Layout, Matrix, Part, RowRange};
use playhouse_cuda::loader::{LoadError, Loader, LoaderSizes, Piece, Source};
use std::fs::File;
use std::path::PathBuf;
use support::formats::random_rows;
use support::{Random, bench, download};

/// Three chunks of 4 MiB.
fn thirds(source: Source<'_>) -> Vec<Vec<Piece<'_>>> {
    (0..3).map(|i| vec![Piece { source, offset: i << 22, len: 1 << 22 }]).collect()
}

const SIZES: LoaderSizes = LoaderSizes { chunk_bytes: 5 << 20, n_chunks: 3, n_readers: 3 };

/// A file that is removed with the test.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str, bytes: &[u8]) -> Temporary {
        let path = std::env::temp_dir().join(format!("playhouse-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).expect("room for a few megabytes");
        Temporary(path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn random_bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).take(n).collect()
}

/// Loads chunks into one buffer, copying each on arrival.
fn collect(loader: &mut Loader, chunks: &[Vec<Piece<'_>>], target: &Buffer<u8>) -> Result<Vec<u64>, LoadError> {
    let (mut at, mut progress) = (0, Vec::new());
    loader.load(chunks, |arrival| {
        assert_eq!(arrival.chunk, progress.len(), "in order");
        for piece in arrival.pieces {
            target.slice(at..at + piece.len()).copy_from(piece)?;
            at += piece.len();
        }
        progress.push(arrival.done_bytes);
        Ok::<(), LoadError>(())
    })?;
    Ok(progress)
}

#[test]
fn every_byte_arrives_from_memory_and_from_files() {
    let Some(bench) = bench("every_byte_arrives_from_memory_and_from_files") else { return };
    let mut random = Random(81);
    let bytes = random_bytes(&mut random, 40_000_003);
    let file = Temporary::new("every-byte", &bytes);
    let open = File::open(&file.0).expect("just written");
    let sources = [Source::Bytes(&bytes), Source::File { file: &open, name: "every-byte" }];
    let mut loader = Loader::new(&bench.gpu, SIZES).expect("fits");
    let target = bench.zeros::<u8>(bytes.len());
    for round in 0..4 {
        // Chunks of one to four pieces, from both sources in turn, none at a round offset.
        let (mut chunks, mut at) = (Vec::new(), 0_usize);
        while at < bytes.len() {
            let n_pieces = 1 + random.next() as usize % 4;
            let mut pieces = Vec::new();
            for i in 0..n_pieces {
                let most = SIZES.chunk_bytes / n_pieces;
                let len = (1 + random.next() as usize % most).min(bytes.len() - at);
                if len > 0 {
                    pieces.push(Piece { source: sources[(round + i) % 2], offset: at as u64, len });
                }
                at += len;
            }
            chunks.push(pieces);
        }
        target.zero().expect("a memset");
        let progress = collect(&mut loader, &chunks, &target).expect("loads");
        assert!(progress.is_sorted() && progress.last() == Some(&(bytes.len() as u64)), "{progress:?}");
        assert!(download(&target) == bytes, "round {round}");
    }
}

#[test]
fn a_matrix_filled_in_chunks_is_the_matrix_filled_at_once() {
    let Some(bench) = bench("a_matrix_filled_in_chunks_is_the_matrix_filled_at_once") else { return };
    let mut random = Random(82);
    let format = Format::by_name("Q6_K").expect("listed");
    let (n_rows, n_cols) = (1003, 2048);
    let rows = random_rows(&mut random, format, n_rows, n_cols);
    let matrix =
        || Matrix::new(&bench.arena, "w", &[Part { format, n_rows }], Layout::Stacked, n_cols, 1).expect("fits");
    let unpacked = |matrix: &Matrix| {
        let out = bench.zeros::<f32>(n_rows.next_multiple_of(16) * n_cols);
        matrix.unpack(&bench.kernels, &out).expect("launches");
        download(&out).iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    let (whole, parts) = (matrix(), matrix());
    whole.fill(&bench.kernels, 0, format, &[&bench.upload(&rows)]).expect("launches");
    let (row_bytes, step) = (rows.len() / n_rows, 10 * parts.row_step());
    let ranges: Vec<RowRange> = (0..n_rows)
        .step_by(step)
        .map(|first| RowRange { part: 0, mat: 0, first, n_rows: step.min(n_rows - first) })
        .collect();
    let piece = |r: &RowRange| Piece {
        source: Source::Bytes(&rows),
        offset: (r.first * row_bytes) as u64,
        len: r.n_rows * row_bytes,
    };
    let chunks: Vec<Vec<Piece<'_>>> = ranges.iter().map(|r| vec![piece(r)]).collect();
    let mut loader = Loader::new(&bench.gpu, SIZES).expect("fits");
    let arrived = loader.load(&chunks, |arrival| {
        parts.fill_rows(&bench.kernels, ranges[arrival.chunk], format, &[&arrival.pieces[0]]).map_err(LoadError::from)
    });
    arrived.expect("loads");
    assert!(unpacked(&whole) == unpacked(&parts));
}

#[test]
fn failures_are_typed_and_leave_the_loader_usable() {
    let Some(bench) = bench("failures_are_typed_and_leave_the_loader_usable") else { return };
    let bytes = random_bytes(&mut Random(83), 12 << 20);
    let file = Temporary::new("failures", &bytes[..9 << 20]);
    let open = File::open(&file.0).expect("just written");
    let mut loader = Loader::new(&bench.gpu, SIZES).expect("fits");
    let target = bench.zeros::<u8>(bytes.len());

    let short = collect(&mut loader, &thirds(Source::File { file: &open, name: "failures.gguf" }), &target);
    let error = short.expect_err("the file ends in the last chunk");
    assert!(matches!(&error, LoadError::Read { name, .. } if name == "failures.gguf"), "{error}");
    assert!(error.to_string().contains("failures.gguf"), "{error}");

    let mut seen = 0;
    let stopped = loader.load(&thirds(Source::Bytes(&bytes)), |arrival| {
        seen += 1;
        if arrival.chunk == 1 { Err(LoadError::from(CudaError::Unavailable("enough".into()))) } else { Ok(()) }
    });
    assert!(stopped.is_err_and(|e| e.to_string().contains("enough")) && seen == 2);

    let too_large = [vec![Piece { source: Source::Bytes(&bytes), offset: 0, len: SIZES.chunk_bytes + 1 }]];
    assert!(collect(&mut loader, &too_large, &target).is_err_and(|e| e.to_string().contains("a chunk")));
    let beyond = [vec![Piece { source: Source::Bytes(&bytes), offset: bytes.len() as u64 - 1, len: 2 }]];
    assert!(collect(&mut loader, &beyond, &target).is_err_and(|e| e.to_string().contains("a piece")));
    let nothing = [vec![]];
    assert!(collect(&mut loader, &nothing, &target).is_err_and(|e| e.to_string().contains("a chunk")));
    assert!(
        Loader::new(&bench.gpu, LoaderSizes { n_chunks: 1, ..SIZES }).is_err_and(|e| e.to_string().contains("sizes"))
    );

    collect(&mut loader, &thirds(Source::Bytes(&bytes)), &target).expect("loads");
    assert!(download(&target) == bytes, "usable after every failure");
    assert_eq!(collect(&mut loader, &[], &target).expect("nothing to do"), []);
}
