//! The names of pre-tokenizers and the expressions they stand for.
//!
//! The names are those that GGUF files carry in `tokenizer.ggml.pre`, as llama.cpp's converter writes them; the
//! expressions are those of the models' own tokenizer.json files. A name that is missing here is refused: a wrong
//! pre-tokenizer gives text that looks right and a model that answers worse.

use super::{DigitGroups, Pattern, PatternError, Stage};

/// What a name stands for.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// The spellings of `tokenizer.ggml.pre`.
    pub(crate) names: &'static [&'static str],
    stages: &'static [Source],
    /// A word that is a token is that token, even where the merges would not reach it.
    pub(crate) ignore_merges: bool,
    /// Whether a BOS token is added where the metadata does not say.
    pub(crate) add_bos: bool,
}

/// A stage before it is compiled.
#[derive(Debug)]
enum Source {
    Split(&'static str),
    DigitGroups(DigitGroups),
}
use Source::Split;

impl PreTokenizer {
    /// Compiles the stages.
    ///
    /// # Errors
    /// None for the rows of this table; a test compiles them all.
    pub(crate) fn stages(&self) -> Result<Vec<Stage>, PatternError> {
        self.stages
            .iter()
            .map(|source| match source {
                Split(pattern) => Pattern::new(pattern).map(Stage::Split),
                Source::DigitGroups(which) => Ok(Stage::DigitGroups(*which)),
            })
            .collect()
    }
}

/// The row that has `name` among its names.
pub(crate) fn find(name: &str) -> Option<&'static PreTokenizer> {
    PRE_TOKENIZERS.iter().find(|row| row.names.contains(&name))
}

/// All names, in the order of the table.
pub(crate) fn names() -> Vec<&'static str> {
    PRE_TOKENIZERS.iter().flat_map(|row| row.names).copied().collect()
}

const fn row(names: &'static [&'static str], stages: &'static [Source]) -> PreTokenizer {
    PreTokenizer { names, stages, ignore_merges: false, add_bos: false }
}

const fn whole_words(row: PreTokenizer) -> PreTokenizer {
    PreTokenizer { ignore_merges: true, ..row }
}

const fn with_bos(row: PreTokenizer) -> PreTokenizer {
    PreTokenizer { add_bos: true, ..row }
}

// Expressions that several rows share.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const HAN: &str = r"[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";
const HAN_AND_KANA: &str = r"[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";
/// The cased letters, as the model's makers listed them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-",
    r"\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-",
    r"\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-",
    r"\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}",
    r"\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-",
    r"\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-",
    r"\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}",
    r"\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}",
    r"\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}",
    r"\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-",
    r"\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}",
    r"\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-",
    r"\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+"
);
const NOT_PUNCTUATION: &str = r" ?[^(\s|.,!?\u{2026}\u{3002}\u{FF0C}\u{3001}\u{964}\u{6D4}\u{60C})]+";

/// Every known name.
pub(crate) const PRE_TOKENIZERS: &[PreTokenizer] = &[
    // What files without a name get: the first converter knew only Falcon.
    row(&["default"], &[Split(r"[\p{P}\$\+<=>\^~\|]+"), Split(GPT2), Split(r"\p{N}+"), Split("[0-9][0-9][0-9]")]),
    row(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "mellum",
            "gigachat",
            "a.x-4.0",
            "modern-bert",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
        ],
        &[Split(GPT2)],
    ),
    row(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[Split(r"\p{N}"), Split(GPT2)],
    ),
    row(&["falcon"], &[Split(r"[\p{P}\$\+<=>\^~\|`]+"), Split(GPT2), Split("[0-9][0-9][0-9]")]),
    whole_words(with_bos(row(
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        &[Split(LLAMA3)],
    ))),
    row(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[Split(LLAMA3)]),
    whole_words(row(&["glm4", "glm5"], &[Split(LLAMA3)])),
    row(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[Split(QWEN2)],
    ),
    row(
        &["qwen35"],
        &[Split(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
    ),
    row(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[Split(GPT4O)]),
    row(&["tiny_aya", "cohere2moe"], &[Source::DigitGroups(DigitGroups::WholeWords), Split(GPT4O)]),
    whole_words(with_bos(row(&["tekken"], &[Split(TEKKEN)]))),
    row(
        &["deepseek-llm"],
        &[
            Split(r"[\r\n]"),
            Split(DEEPSEEK_LETTERS),
            Split(r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+"),
            Split(r"\s+$"),
            Split(HAN),
            Split(r"\p{N}+"),
        ],
    ),
    row(
        &["deepseek-coder"],
        &[Split(r"[\r\n]"), Split(r"\s?\p{L}+"), Split(r"\s?\p{P}+"), Split(HAN), Split(r"\p{N}")],
    ),
    row(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Split(r"\p{N}{1,3}"), Split(HAN_AND_KANA), Split(DEEPSEEK3)],
    ),
    row(&["poro-chat", "bloom", "gpt3-finnish"], &[Split(NOT_PUNCTUATION)]),
    row(&["viking"], &[Split(NOT_PUNCTUATION), Split(r"\p{N}")]),
    row(&["superbpe"], &[Split(r"\p{N}+"), Source::DigitGroups(DigitGroups::All)]),
    row(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[Split(concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ))],
    ),
    row(
        &["seed-coder"],
        &[Split(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
    ),
    row(
        &["exaone-moe"],
        &[Split(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        ))],
    ),
    whole_words(row(
        &["youtu"],
        &[
            Split(concat!(
                r"[\u{AC00}-\u{D7A3}\u{3131}-\u{318E}]+|[\u{FF01}\u{2026}\u{201C}\u{201D}\u{2018}\u{2019}\u{2014}",
                r"\u{FF1A}\u{FF1B}\u{FF0C}\u{3001}-\u{303F}\u{FE30}-\u{FE4F}]+|[\u{3105}-\u{312F}]+|[\u{4E00}-\u{9FA5}",
                r"\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+"
            )),
            Split(YOUTU_WORDS),
        ],
    )),
    whole_words(row(&["minicpm5"], &[Split(r"\p{N}{1,3}"), Split(LLAMA3_ANY_NUMBER)])),
    row(&["laguna"], &[Split(r"[^\n]+|[\n]+"), Split(QWEN2)]),
];

/// As GPT-4o's, with numbers digit by digit.
const YOUTU_WORDS: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const LLAMA3_ANY_NUMBER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
