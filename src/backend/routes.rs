//! Which experts tokens went to: told by one backend, followed by another.
//!
//! Two backends round differently, and a token whose fourth and fifth best scores all but tie goes to one expert here and to
//! another there. What follows is any distance apart, and says nothing about the kernels. So that models with experts can be
//! compared at all, the oracle may be told to follow the choices of the backend that it is held against. It still
//! computes its own scores: [`RouteDifference`] says how far they are from the other's, how often its own choice would have been
//! another, and by what difference of scores.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// The choices of one mixture-of-experts op.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Route {
    /// Experts in all.
    pub n_experts: usize,
    /// Experts that a token uses.
    pub n_used: usize,
    /// The router's scores, `[T, E]`.
    pub scores: Vec<f32>,
    /// The experts of each token in descending order of score, `[T, K]`.
    pub experts: Vec<usize>,
}

/// Choices in the order of the ops; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Routes(Arc<Mutex<VecDeque<Route>>>);

impl Routes {
    /// Adds the choices of the next op.
    pub fn push(&self, route: Route) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(route);
    }

    /// Takes the choices of the next op; `None` where there are no more.
    pub fn next(&self) -> Option<Route> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// How far a backend's scores are from those that it followed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RouteDifference {
    /// Choices looked at: one per token and op.
    pub n_choices: usize,
    /// Choices that would have been of other experts.
    pub n_flips: usize,
    /// Choices that are not the best by the scores that they were made with: there are none unless somebody chooses wrongly.
    pub n_wrong: usize,
    /// The largest difference between a score and the same score of the other.
    pub worst_error: f64,
    /// Sum of the squares of those differences.
    square_error: f64,
    n_scores: usize,
    /// The largest difference of scores between an expert that was followed and one that would have been chosen instead.
    pub worst_gap: f64,
}

impl RouteDifference {
    /// The root of the mean of squared differences between scores.
    pub fn error(&self) -> f64 {
        (self.square_error / self.n_scores.max(1) as f64).sqrt()
    }

    /// Counts one token's choice: its scores here and there, and the experts that were followed.
    fn add(&mut self, own: &[f32], route: &Route, token: usize) {
        let told = &route.scores[token * route.n_experts..][..route.n_experts];
        let followed = &route.experts[token * route.n_used..][..route.n_used];
        for (own, told) in own.iter().zip(told) {
            let error = f64::from(own - told).abs();
            self.worst_error = self.worst_error.max(error);
            self.square_error += error * error;
        }
        self.n_scores += own.len();
        self.n_choices += 1;
        self.n_wrong += usize::from(best(told, route.n_used) != followed);
        let chosen = best(own, route.n_used);
        let (here, there): (HashSet<usize>, HashSet<usize>) =
            (chosen.into_iter().collect(), followed.iter().copied().collect());
        let gaps = here.difference(&there).flat_map(|a| there.difference(&here).map(|b| own[*a] - own[*b]));
        if let Some(gap) = gaps.map(f64::from).reduce(f64::max) {
            self.n_flips += 1;
            self.worst_gap = self.worst_gap.max(gap);
        }
    }
}

/// The `n_used` best experts in descending order of score, ties by index.
pub(super) fn best(scores: &[f32], n_used: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Stable: equal scores stay in the order of their indices.
    order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(n_used);
    order
}

/// What a backend does with choices beside making them.
#[derive(Debug, Default)]
pub(super) struct Routing {
    told: Option<Routes>,
    followed: Option<Routes>,
    pub(super) difference: RouteDifference,
}

impl Routing {
    /// From now on every op's choices are added to the result.
    pub(super) fn tell(&mut self) -> Routes {
        self.told.get_or_insert_default().clone()
    }

    /// From now on every op takes its choices from here.
    pub(super) fn follow(&mut self, routes: Routes) {
        self.followed = Some(routes);
    }

    /// The experts of each token of an op with these scores, `[T, K]`.
    ///
    /// # Panics
    /// If the choices to follow are those of another model or of other steps: that is a mistake of the comparing code.
    pub(super) fn choose(&mut self, scores: &[f32], n_experts: usize, n_used: usize) -> Vec<usize> {
        let rows = scores.chunks_exact(n_experts);
        let experts = match &self.followed {
            None => rows.flat_map(|row| best(row, n_used)).collect(),
            Some(routes) => {
                let route = routes.next().expect("choices for as many ops as there are");
                let sizes = (route.n_experts, route.n_used, route.scores.len(), route.experts.len());
                assert_eq!(sizes, (n_experts, n_used, scores.len(), scores.len() / n_experts * n_used));
                rows.enumerate().for_each(|(token, own)| self.difference.add(own, &route, token));
                route.experts
            }
        };
        if let Some(told) = &self.told {
            told.push(Route { n_experts, n_used, scores: scores.to_vec(), experts: experts.clone() });
        }
        experts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(scores: &[f32], experts: &[usize]) -> Routes {
        let routes = Routes::default();
        let (scores, experts) = (scores.to_vec(), experts.to_vec());
        routes.push(Route { n_experts: 4, n_used: 2, scores, experts });
        routes
    }

    #[test]
    fn choices_are_followed_and_the_difference_is_told() {
        let mut routing = Routing::default();
        routing.follow(told(&[4.0, 3.0, 2.0, 1.0, 0.0, 2.0, 2.25, 5.0], &[0, 1, 3, 2]));
        let heard = routing.tell();
        // The first token agrees; the second would have gone to 1 and not to 2.
        let experts = routing.choose(&[4.0, 3.0, 2.0, 1.5, 0.0, 2.5, 2.0, 5.0], 4, 2);
        assert_eq!(experts, [0, 1, 3, 2]);
        assert_eq!(heard.next().map(|route| route.experts), Some(vec![0, 1, 3, 2]));
        let found = routing.difference;
        assert_eq!((found.n_choices, found.n_flips, found.n_wrong), (2, 1, 0));
        assert_eq!((found.worst_error, found.worst_gap), (0.5, 0.5));
        let square = (0.25 + 0.25 + 0.0625) / 8.0;
        assert!((found.error() - f64::sqrt(square)).abs() < 1e-12);
    }

    #[test]
    fn a_choice_that_is_not_the_best_of_its_own_scores_is_found() {
        let mut routing = Routing::default();
        routing.follow(told(&[4.0, 3.0, 2.0, 1.0], &[0, 2]));
        routing.choose(&[4.0, 3.0, 2.0, 1.0], 4, 2);
        assert_eq!((routing.difference.n_wrong, routing.difference.n_flips), (1, 1));
        assert_eq!((routing.difference.worst_error, routing.difference.worst_gap), (0.0, 1.0));
    }

    #[test]
    fn equal_scores_go_by_index() {
        assert_eq!(best(&[1.0, 2.0, 2.0, f32::NEG_INFINITY], 3), [1, 2, 0]);
    }
}
