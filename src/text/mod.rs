//! Tokens and text: tokenizers, detokenizer, chat templates, stop strings.
