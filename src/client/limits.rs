//! The bounds of every request, whoever sends it: below the library and the HTTP API alike.

use super::error::Invalid;
use super::request::{GenerateRequest, Prompt};
use playhouse_actors::engine::Constraint;

/// Most choices of a request.
pub const N_MAX: u32 = 16;
/// Most likely tokens reported beside the chosen one.
pub const LOGPROBS_MAX: u32 = 20;
/// Most stop strings.
pub const STOPS_MAX: usize = 16;
/// Bytes of a stop string.
pub const STOP_BYTES_MAX: usize = 1024;
/// Most stop ids.
pub const STOP_IDS_MAX: usize = 64;
/// Bytes of a schema, an expression or a grammar.
pub const CONSTRAINT_BYTES_MAX: usize = 64 << 10;
/// Most biased tokens.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Bytes of text in a prompt, before it is turned into tokens. A token is rarely more than a few bytes, and the longest
/// contexts have about a million tokens.
pub const PROMPT_BYTES_MAX: usize = 8 << 20;
/// Highest temperature.
pub const TEMPERATURE_MAX: f32 = 100.0;
/// Highest magnitude of a penalty or bias.
pub const PENALTY_MAX: f32 = 100.0;

/// Checks everything that can be checked without the model.
///
/// # Errors
/// The first parameter that is out of bounds.
pub fn check(request: &GenerateRequest) -> Result<(), Invalid> {
    at_most("n", u64::from(request.n), 1, u64::from(N_MAX))?;
    at_most("logprobs", u64::from(request.logprobs.unwrap_or(0)), 0, u64::from(LOGPROBS_MAX))?;
    if let Some(max_tokens) = request.max_tokens {
        at_most("max_tokens", u64::from(max_tokens), 1, u64::from(u32::MAX))?;
        at_most("min_tokens", u64::from(request.min_tokens), 0, u64::from(max_tokens))?;
    }
    if let Some(Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Lark(text)) = &request.constraint {
        at_most("response_format", text.len() as u64, 1, CONSTRAINT_BYTES_MAX as u64)?;
    }
    if request.constraint.is_some() {
        // A text that keeps its form must be free to end where the form does.
        at_most("min_tokens", u64::from(request.min_tokens), 0, 0)?;
        at_most("ignore_eos", u64::from(request.ignore_eos), 0, 0)?;
    }
    check_prompt(&request.prompt)?;
    check_stops(request)?;
    check_sampling(request)
}

fn check_prompt(prompt: &Prompt) -> Result<(), Invalid> {
    match prompt {
        Prompt::Text(text) => at_most("prompt", text.len() as u64, 0, PROMPT_BYTES_MAX as u64),
        Prompt::Tokens(tokens) => at_most("prompt", tokens.len() as u64, 1, PROMPT_BYTES_MAX as u64),
    }
}

fn check_stops(request: &GenerateRequest) -> Result<(), Invalid> {
    at_most("stop", request.stop.len() as u64, 0, STOPS_MAX as u64)?;
    for stop in &request.stop {
        at_most("stop", stop.len() as u64, 1, STOP_BYTES_MAX as u64)?;
    }
    at_most("stop_token_ids", request.stop_ids.len() as u64, 0, STOP_IDS_MAX as u64)
}

fn check_sampling(request: &GenerateRequest) -> Result<(), Invalid> {
    let sampling = &request.sampling;
    in_range("temperature", sampling.temperature, 0.0, TEMPERATURE_MAX)?;
    in_range("top_p", sampling.top_p, 0.0, 1.0)?;
    in_range("min_p", sampling.min_p, 0.0, 1.0)?;
    in_range("repetition_penalty", sampling.repetition_penalty, 0.01, PENALTY_MAX)?;
    in_range("presence_penalty", sampling.presence_penalty, -PENALTY_MAX, PENALTY_MAX)?;
    in_range("frequency_penalty", sampling.frequency_penalty, -PENALTY_MAX, PENALTY_MAX)?;
    at_most("logit_bias", sampling.logit_bias.len() as u64, 0, LOGIT_BIAS_MAX as u64)?;
    for (_, bias) in &sampling.logit_bias {
        // Minus infinity forbids a token; NaN and plus infinity mean nothing.
        if *bias != f32::NEG_INFINITY {
            in_range("logit_bias", *bias, -PENALTY_MAX, PENALTY_MAX)?;
        }
    }
    Ok(())
}

/// `found` counts something: between `min` and `max`.
///
/// # Errors
/// [`Invalid`] naming `param`.
pub fn at_most(param: &'static str, found: u64, min: u64, max: u64) -> Result<(), Invalid> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(Invalid { param, found: found.to_string(), expected: format!("{min} to {max}") })
}

fn in_range(param: &'static str, found: f32, min: f32, max: f32) -> Result<(), Invalid> {
    // A NaN is in no range.
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(Invalid { param, found: found.to_string(), expected: format!("{min} to {max}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::engine::SamplingParams;

    fn refused(change: impl FnOnce(&mut GenerateRequest)) -> &'static str {
        let mut request = GenerateRequest::text("moon");
        change(&mut request);
        check(&request).expect_err("it is out of bounds").param
    }

    #[test]
    fn what_is_usual_is_allowed() {
        let mut request = GenerateRequest::text("moon");
        request.stop = vec!["\n\n".into()];
        request.logprobs = Some(20);
        request.sampling = SamplingParams { logit_bias: vec![(3, f32::NEG_INFINITY)], ..SamplingParams::greedy() };
        assert_eq!(check(&request), Ok(()));
    }

    #[test]
    fn what_is_absurd_is_refused_by_name() {
        assert_eq!(refused(|r| r.n = 0), "n");
        assert_eq!(refused(|r| r.n = u32::MAX), "n");
        assert_eq!(refused(|r| r.logprobs = Some(1 << 20)), "logprobs");
        assert_eq!(refused(|r| r.max_tokens = Some(0)), "max_tokens");
        assert_eq!(refused(|r| (r.max_tokens, r.min_tokens) = (Some(4), 5)), "min_tokens");
        assert_eq!(refused(|r| r.prompt = Prompt::Tokens(Vec::new())), "prompt");
        assert_eq!(refused(|r| r.prompt = Prompt::Text("x".repeat(PROMPT_BYTES_MAX + 1))), "prompt");
        assert_eq!(refused(|r| r.stop = vec![String::new()]), "stop");
        assert_eq!(refused(|r| r.stop = vec!["x".into(); 1_000_000]), "stop");
        assert_eq!(refused(|r| r.stop_ids = vec![1; 65]), "stop_token_ids");
        assert_eq!(refused(|r| r.sampling.temperature = f32::NAN), "temperature");
        assert_eq!(refused(|r| r.sampling.temperature = -0.1), "temperature");
        assert_eq!(refused(|r| r.sampling.top_p = 1.5), "top_p");
        assert_eq!(refused(|r| r.sampling.min_p = f32::INFINITY), "min_p");
        assert_eq!(refused(|r| r.sampling.repetition_penalty = 0.0), "repetition_penalty");
        assert_eq!(refused(|r| r.sampling.presence_penalty = -101.0), "presence_penalty");
        assert_eq!(refused(|r| r.sampling.frequency_penalty = f32::NEG_INFINITY), "frequency_penalty");
        assert_eq!(refused(|r| r.sampling.logit_bias = vec![(1, f32::NAN)]), "logit_bias");
        assert_eq!(refused(|r| r.sampling.logit_bias = vec![(1, 0.5); 2000]), "logit_bias");
    }
}
