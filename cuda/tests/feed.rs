//! What a step needs of the host arrives, and tokens come from where the step before chose them.

mod support;

use playhouse_cuda::launch::feed::{CHOSEN, Piece, feed};
use playhouse_cuda::pinned::Pinned;
use support::{Random, bench, download};

#[test]
fn arrays_of_any_length_arrive_and_chosen_tokens_are_put_in() {
    let Some(bench) = bench("arrays_of_any_length_arrive_and_chosen_tokens_are_put_in") else { return };
    let mut random = Random(81);
    for (n, n_tokens, n_other) in [(64, 1, 1), (64, 17, 3), (128, 65, 33), (4096, 127, 9001), (200_000, 4096, 70_001)] {
        bench.arena.reset();
        let chosen: Vec<u32> = (0..n_tokens).map(|_| random.next() as u32 % 1000).collect();
        let mut inputs = Pinned::<u32>::new(&bench.gpu, n).expect("host memory");
        let mut other = Pinned::<u64>::new(&bench.gpu, n_other).expect("host memory");
        inputs.iter_mut().for_each(|word| *word = random.next() as u32);
        inputs[..n_tokens].iter_mut().for_each(|id| *id &= !CHOSEN);
        other.iter_mut().for_each(|word| *word = random.next());
        let mut expected = inputs.to_vec();
        for i in (0..n_tokens).filter(|i| i % 3 != 1) {
            let row = random.next() as usize % n_tokens;
            inputs[i] = CHOSEN | row as u32;
            expected[i] = chosen[row];
        }
        let (to, to_other) = (bench.zeros::<u32>(n), bench.zeros::<u64>(n_other + 2));
        let piece = Piece::new(&other, &to_other, n_other).expect("it fits");
        feed(&bench.kernels, (&inputs, &to, n), n_tokens, &bench.upload(&chosen), &[piece]).expect("launches");
        assert_eq!(download(&to), expected, "{n} words");
        assert_eq!(download(&to_other)[..n_other], other[..], "{n_other} double words");
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let mut inputs = Pinned::<u32>::new(&bench.gpu, 64).expect("host memory");
    let (to, chosen) = (bench.zeros::<u32>(64), bench.zeros::<u32>(3));
    let refused = |result: Result<(), playhouse_cuda::CudaError>| result.expect_err("misuse").to_string();
    let run = |inputs: &Pinned<u32>, n, n_tokens, others: &[Piece<'_>]| {
        feed(&bench.kernels, (inputs, &to, n), n_tokens, &chosen, others)
    };
    assert!(refused(run(&inputs, 65, 1, &[])).contains("at most 64 (host)"));
    assert!(refused(run(&inputs, 64, 65, &[])).contains("at most 64 ids"));
    let other = Pinned::<u32>::new(&bench.gpu, 64).expect("host memory");
    let piece = Piece::new(&other, &to, 64).expect("it fits");
    assert!(refused(run(&inputs, 64, 1, &[piece; 6])).contains("5 other pieces"));
    assert!(Piece::new(&other, &to.slice(1..64), 4).is_err_and(|e| e.to_string().contains("aligned")));
    inputs[5] = CHOSEN | 3;
    assert!(refused(run(&inputs, 64, 6, &[])).contains("rows below 3, found 3"));
    run(&inputs, 64, 5, &[]).expect("what is no id is not looked at");
}
