//! Whether a request's parameters are in range. What does not fit the context is the scheduler's to say.

use playhouse_actors::engine::{EngineRequest, RequestError, SamplingParams};

/// Checks every parameter of a request against its range and the vocabulary.
///
/// # Errors
/// [`RequestError::InvalidParam`] with the first field that is out of range.
pub fn validate(request: &EngineRequest, n_vocab: usize) -> Result<(), RequestError> {
    if request.prompt.is_empty() {
        return Err(invalid("prompt", "empty", "at least one token"));
    }
    check_ids("prompt", &request.prompt, n_vocab)?;
    check_ids("emitted", &request.emitted, n_vocab)?;
    check_ids("stop_ids", &request.stop_ids, n_vocab)?;
    validate_sampling(&request.sampling, n_vocab)
}

fn validate_sampling(params: &SamplingParams, n_vocab: usize) -> Result<(), RequestError> {
    for &(token, bias) in &params.logit_bias {
        check_ids("logit_bias", &[token], n_vocab)?;
        let is_valid = bias.is_finite() || bias == f32::NEG_INFINITY;
        check(is_valid, "logit_bias", bias, "finite, or minus infinity to forbid the token")?;
    }
    let repetition = params.repetition_penalty;
    check(repetition.is_finite() && repetition > 0.0, "repetition_penalty", repetition, "finite and above 0")?;
    check(params.presence_penalty.is_finite(), "presence_penalty", params.presence_penalty, "finite")?;
    check(params.frequency_penalty.is_finite(), "frequency_penalty", params.frequency_penalty, "finite")?;
    let temperature = params.temperature;
    check(temperature.is_finite() && temperature >= 0.0, "temperature", temperature, "finite and not negative")?;
    check((0.0..=1.0).contains(&params.top_p), "top_p", params.top_p, "between 0 and 1")?;
    check((0.0..=1.0).contains(&params.min_p), "min_p", params.min_p, "between 0 and 1")
}

fn check(is_valid: bool, param: &str, found: f32, expected: &str) -> Result<(), RequestError> {
    if is_valid { Ok(()) } else { Err(invalid(param, &found.to_string(), expected)) }
}

fn check_ids(param: &str, ids: &[u32], n_vocab: usize) -> Result<(), RequestError> {
    match ids.iter().find(|&&id| id as usize >= n_vocab) {
        Some(id) => Err(invalid(param, &format!("token {id}"), &format!("ids below {n_vocab}"))),
        None => Ok(()),
    }
}

fn invalid(param: &str, found: &str, expected: &str) -> RequestError {
    RequestError::InvalidParam { param: param.into(), found: found.into(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::engine::{RequestId, Task};

    fn request(change: impl FnOnce(&mut EngineRequest)) -> EngineRequest {
        let mut request = EngineRequest {
            id: RequestId(1),
            task: Task::Generate,
            prompt: vec![1],
            emitted: vec![],
            sampling: SamplingParams::greedy(),
            max_tokens: 1,
            min_tokens: 0,
            stop_ids: vec![],
            logprobs: None,
            constraint: None,
            priority: 0,
            deadline: None,
        };
        change(&mut request);
        request
    }

    #[test]
    fn each_field_is_named() {
        type Change = fn(&mut EngineRequest);
        let cases: [(&str, Change); 14] = [
            ("prompt", |r| r.prompt.clear()),
            ("prompt", |r| r.prompt = vec![10]),
            ("emitted", |r| r.emitted = vec![10]),
            ("stop_ids", |r| r.stop_ids = vec![u32::MAX]),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(10, 0.0)]),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(1, f32::INFINITY)]),
            ("repetition_penalty", |r| r.sampling.repetition_penalty = 0.0),
            ("repetition_penalty", |r| r.sampling.repetition_penalty = f32::NAN),
            ("presence_penalty", |r| r.sampling.presence_penalty = f32::INFINITY),
            ("frequency_penalty", |r| r.sampling.frequency_penalty = f32::NAN),
            ("temperature", |r| r.sampling.temperature = -0.5),
            ("temperature", |r| r.sampling.temperature = f32::NAN),
            ("top_p", |r| r.sampling.top_p = 1.5),
            ("min_p", |r| r.sampling.min_p = -0.1),
        ];
        for (field, change) in cases {
            match validate(&request(change), 10) {
                Err(RequestError::InvalidParam { param, .. }) => assert_eq!(param, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        assert_eq!(validate(&request(|r| r.sampling.logit_bias = vec![(9, f32::NEG_INFINITY)]), 10), Ok(()));
    }
}
