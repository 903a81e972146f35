//! The sampling flags, with the names and defaults that users of llama.cpp know.

use std::hash::{BuildHasher, Hasher};

use clap::builder::NonEmptyStringValueParser;
use playhouse_actors::engine::{EngineRequest, RequestId, SamplingParams, Task};

use super::CliError;
use crate::text::Tokenizer;

/// How tokens are chosen and when the text ends.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// The same seed gives the same text [default: a random one, shown at the end]
    #[arg(long, short)]
    pub(crate) seed: Option<u64>,
    /// 0 always takes the most likely token; higher is more surprising
    #[arg(long, visible_alias = "temp", value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: u32,
    /// Keep the most likely tokens that together reach this probability; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Drop tokens less likely than this times the most likely; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Divide the logits of tokens in prompt and text by this; 1 is off
    #[arg(long, visible_alias = "repetition-penalty", value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Subtract this from tokens that are in the text; 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtract this for each time a token is in the text; 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Add to the logit of a token, such as `1234+2.5`, `1234-1`, or `1234-inf` to forbid it
    #[arg(long, value_name = "ID±X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Most tokens to generate; -1 is until the context is full
    #[arg(long, visible_aliases = ["n-predict", "predict"], value_name = "N", default_value_t = -1,
        allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=i64::from(u32::MAX)))]
    max_tokens: i64,
    /// Tokens to generate before the text may end
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: u32,
    /// End the text before this string; may be given several times
    #[arg(long, visible_alias = "reverse-prompt", value_name = "TEXT", allow_hyphen_values = true,
        value_parser = NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
    /// Do not end the text at the model's end-of-text tokens
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    /// The seed, drawn if none is given. Draw it once for a program's run and show it.
    pub(crate) fn seed(&self) -> u64 {
        // 32 random bits, so that people can type it. The hasher's keys are the standard library's only source.
        self.seed.unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish() >> 32)
    }

    /// The request for a prompt.
    ///
    /// # Errors
    /// A bias for a token that is not in the vocabulary. Ranges are the engine's to check.
    pub(crate) fn request(
        &self,
        prompt: Vec<u32>,
        seed: u64,
        logprobs: Option<u32>,
        tokenizer: &Tokenizer,
    ) -> Result<EngineRequest, CliError> {
        if let Some((id, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= tokenizer.n_vocab()) {
            let n_vocab = tokenizer.n_vocab();
            return Err(CliError::usage(format!("--logit-bias names token {id}; expected an id below {n_vocab}")));
        }
        let sampling = SamplingParams {
            logit_bias: self.logit_bias.clone(),
            repetition_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed,
            choice: 0,
        };
        Ok(EngineRequest {
            id: RequestId(0),
            task: Task::Generate,
            prompt,
            emitted: Vec::new(),
            sampling,
            max_tokens: u32::try_from(self.max_tokens).unwrap_or(u32::MAX),
            min_tokens: self.min_tokens,
            stop_ids: if self.ignore_eos { Vec::new() } else { tokenizer.stop_ids().to_vec() },
            logprobs,
            constraint: None,
            priority: 0,
            deadline: None,
        })
    }
}

/// `ID+X`, `ID-X` or `ID=X`.
fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let expected = || format!("expected a token id and a number, such as 1234+2.5 or 1234-inf, found `{text}`");
    let at = text.find(['+', '-', '=']).ok_or_else(expected)?;
    let (id, bias) = text.split_at(at);
    let bias = bias.strip_prefix('=').unwrap_or(bias);
    Ok((id.parse().map_err(|_| expected())?, bias.parse().map_err(|_| expected())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_are_read_with_their_sign() {
        assert_eq!(parse_bias("12+2.5"), Ok((12, 2.5)));
        assert_eq!(parse_bias("12-1"), Ok((12, -1.0)));
        assert_eq!(parse_bias("12=-1"), Ok((12, -1.0)));
        assert_eq!(parse_bias("12-inf"), Ok((12, f32::NEG_INFINITY)));
        for bad in ["", "12", "+1", "x+1", "12+", "12+x"] {
            assert!(parse_bias(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn drawn_seeds_can_be_typed() {
        use clap::Parser;
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            sampling: SamplingArgs,
        }
        assert!(Flags::parse_from(["x"]).sampling.seed() <= u64::from(u32::MAX));
        assert_eq!(Flags::parse_from(["x", "--seed", "7"]).sampling.seed(), 7);
    }
}
