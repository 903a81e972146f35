//! The gate of a feed-forward network against f64.

mod support;

use half::f16;
use playhouse_cuda::launch::gate::gate_up;
use playhouse_cuda::launch::matmul::Gate;
use playhouse_cuda::launch::matrix::HalfRows;
use support::{Random, bench, download};

fn reference(gate: Gate, g: f64, u: f64) -> f64 {
    match gate {
        Gate::SwiGlu => g / (1.0 + (-g).exp()) * u,
        Gate::Clamped { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (g, u) = (g.min(limit), u.clamp(-limit, limit));
            g / (1.0 + (-alpha * g).exp()) * (u + 1.0)
        }
    }
}

#[test]
fn both_gates_agree_with_f64() {
    let Some(bench) = bench("both_gates_agree_with_f64") else { return };
    let mut random = Random(51);
    for gate in [Gate::SwiGlu, Gate::Clamped { alpha: 1.702, limit: 7.0 }] {
        for n_rows in [1_usize, 31, 256, 257, 4864] {
            for n in [1, 2, 3, 17, 31, 33, 127] {
                bench.arena.reset();
                let mut values = || (0..n * n_rows).map(|_| 5.0 * random.normal()).collect::<Vec<f32>>();
                let (mut g, u) = (values(), values());
                // Arguments at which exp overflows must come out as 0 or the argument, not as NaN.
                g[0] = -1e4;
                let stride = n_rows.next_multiple_of(64);
                let h = HalfRows { data: bench.upload(&vec![f16::NAN; n * stride]), stride };
                let both = (&bench.upload(&g), &bench.upload(&u));
                gate_up(&bench.kernels, gate, both, n_rows, &h, n).expect("launches");
                let found = download(&h.data);
                for (i, (g, u)) in g.iter().zip(&u).enumerate() {
                    let exact = reference(gate, f64::from(*g), f64::from(*u));
                    let found = found[i / n_rows * stride + i % n_rows].to_f64();
                    let budget = exact.abs() * 2f64.powi(-10) + 2f64.powi(-24);
                    assert!((found - exact).abs() <= budget, "{gate:?} of {g}, {u}: {found}, {exact}");
                }
            }
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let (g, u) = (bench.zeros::<f32>(300), bench.zeros::<f32>(299));
    let h = HalfRows { data: bench.zeros(3 * 128), stride: 128 };
    let refused = |n_rows: usize, h: &HalfRows, n: usize| {
        gate_up(&bench.kernels, Gate::SwiGlu, (&g, &u), n_rows, h, n).expect_err("misuse").to_string()
    };
    assert!(refused(100, &h, 3).contains("299 elements"));
    assert!(refused(100, &h, 0).contains("1 or more rows"));
    assert!(refused(0, &h, 1).contains("1 or more rows"));
    assert!(refused(129, &h, 2).contains("rows of 128"));
    assert!(refused(50, &HalfRows { stride: 192, ..h.clone() }, 3).contains("rows of 192"));
}
