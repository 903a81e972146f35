//! Which replica takes a request.

/// What the router knows of a replica when it chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Whether it takes requests now.
    pub ready: bool,
    /// Tokens that the requests it has may still need.
    pub open_tokens: u64,
}

/// The ready replica with the least to do; of equal ones the first. `None` if none is ready.
pub fn choose<K: Copy>(candidates: impl IntoIterator<Item = (K, Candidate)>) -> Option<K> {
    let ready = candidates.into_iter().filter(|(_, candidate)| candidate.ready);
    ready.min_by_key(|(_, candidate)| candidate.open_tokens).map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_least_busy_ready_one(list in prop::collection::vec((any::<bool>(), 0u64..4), 0..8)) {
            let candidates = list.iter().map(|(ready, open_tokens)| Candidate { ready: *ready, open_tokens: *open_tokens });
            let chosen = choose(candidates.enumerate());
            let ready: Vec<usize> = (0..list.len()).filter(|index| list[*index].0).collect();
            match chosen {
                None => prop_assert!(ready.is_empty()),
                Some(index) => {
                    prop_assert!(list[index].0);
                    prop_assert!(ready.iter().all(|other| list[*other].1 >= list[index].1));
                    prop_assert!(ready.iter().all(|other| *other >= index || list[*other].1 > list[index].1));
                }
            }
        }
    }
}
