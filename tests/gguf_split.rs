//! A model split over several files loads as one, from any number of parts, and a wrong part is refused by name.

use playhouse::basho;
use playhouse::gguf::writer::GgufWriter;
use playhouse::gguf::{GgufErrorKind, GgufFile};
use std::path::{Path, PathBuf};

/// Writes the embedded model as `n_parts` files named as llama.cpp's splitter names them; gives back their paths.
fn split(folder: &Path, n_parts: usize) -> Vec<PathBuf> {
    let whole = GgufFile::from_static(basho::LABEL, basho::GGUF).unwrap();
    let tensors: Vec<_> = whole.tensors().collect();
    let chunks: Vec<_> = tensors.chunks(tensors.len().div_ceil(n_parts)).collect();
    assert_eq!(chunks.len(), n_parts);
    let write = |(part, chunk): (usize, &&[_])| {
        let chunk: &[&playhouse::gguf::TensorInfo] = chunk;
        let mut writer = GgufWriter::new();
        if part == 0 {
            for (key, value) in whole.metadata().iter() {
                writer.set(key, value.clone());
            }
        }
        writer.set("split.no", part as u16).set("split.count", n_parts as u16);
        writer.set("split.tensors.count", tensors.len() as i32);
        for tensor in chunk {
            writer.tensor(&tensor.name, &tensor.dims, tensor.dtype);
        }
        let bytes: Vec<_> = chunk.iter().map(|tensor| whole.bytes(tensor).unwrap()).collect();
        let slices: Vec<&[u8]> = bytes.iter().map(|bytes| &**bytes).collect();
        let path = folder.join(format!("basho-{:05}-of-{n_parts:05}.gguf", part + 1));
        std::fs::write(&path, writer.to_vec(&slices).unwrap()).unwrap();
        path
    };
    chunks.iter().enumerate().map(write).collect()
}

#[test]
fn parts_load_as_one_file() {
    let whole = GgufFile::from_static(basho::LABEL, basho::GGUF).unwrap();
    for n_parts in [1, 2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let parts = split(folder.path(), n_parts);
        let joined = GgufFile::open(&parts[0]).unwrap();
        assert_eq!(joined.tensors().count(), whole.tensors().count());
        for tensor in whole.tensors() {
            let found = joined.tensor(&tensor.name).unwrap_or_else(|| panic!("{} is lost", tensor.name));
            assert_eq!((&found.dims, found.dtype), (&tensor.dims, tensor.dtype));
            assert!(*joined.bytes(found).unwrap() == *whole.bytes(tensor).unwrap(), "{} of {n_parts}", tensor.name);
        }
        let architecture = |file: &GgufFile| file.metadata().str("general.architecture").unwrap().to_owned();
        assert_eq!(architecture(&joined), architecture(&whole));
    }
}

#[test]
fn a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path(), 3);
    std::fs::remove_file(&parts[2]).unwrap();
    let error = GgufFile::open(&parts[0]).unwrap_err();
    assert_eq!(error.kind(), GgufErrorKind::MissingShard);
    assert!(error.to_string().contains("basho-00003-of-00003.gguf"), "{error}");
}

#[test]
fn a_part_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path(), 3);
    // The first part again under the second's name: its number and its tensors are wrong.
    std::fs::copy(&parts[0], &parts[1]).unwrap();
    let error = GgufFile::open(&parts[0]).unwrap_err();
    assert_eq!(error.kind(), GgufErrorKind::BadValue);
    assert!(error.to_string().contains("split.no"), "{error}");
}
