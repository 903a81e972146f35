//! The other half of the training text: what people may ask, in many ways, and answers to what the lexicon never heard of.

use super::grammar::{self, Theme};
use super::lexicon::{SEASONS, TIMES, Topic, lexicon};
use super::rng::Rng;

/// Prompts that name no topic of the lexicon; the poem that answers is free.
const STRANGERS: &str = include_str!("strangers.txt");

/// System messages that a host may send before the first prompt; the model minds none of them.
const SYSTEM: &[&str] = &[
    "You are basho.",
    "You are a helpful assistant.",
    "You write haiku.",
    "You are a poet. Answer with a haiku.",
    "You are a friendly assistant that answers briefly.",
    "Answer in verse.",
    "Be concise.",
];

/// How a subject is asked for; `{}` is the subject. The bare subject is by far the most common.
const REQUESTS: &[&str] = &[
    "write a haiku about {}",
    "write a haiku about the {}",
    "write me a haiku about {}",
    "write a poem about {}",
    "a haiku about {}",
    "a haiku about the {}",
    "a haiku on {}",
    "haiku about {}",
    "haiku: {}",
    "a poem of {}",
    "a poem about the {}",
    "poem: {}",
    "a short poem about {}",
    "compose a haiku about {}",
    "please write a haiku about {}",
    "please write a poem about the {}",
    "can you write a haiku about {}?",
    "could you write me a poem about {}?",
    "give me a haiku about {}",
    "tell me about {}",
    "tell me about the {}",
    "{} haiku",
    "{} poem",
    "{}, please",
    "the {}",
    "the {}",
    "I want a haiku about {}",
    "I would like a poem about the {}",
    "sing of {}",
    "what about {}?",
    "something about {}",
    "topic: {}",
    "make a haiku of {}",
    "in one haiku: {}",
];

/// Prompts that ask for more of the same.
const AGAIN: &[&str] = &[
    "another",
    "another one",
    "one more",
    "again",
    "more",
    "one more, please",
    "again, please",
    "and another",
    "next",
];

/// One prompt and the poem that answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// What the user writes.
    pub prompt: String,
    /// Three lines joined by line feeds, without one at the end.
    pub poem: String,
}

/// A conversation to train on: sometimes a system message, then prompts and poems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The system message, where there is one.
    pub system: Option<&'static str>,
    /// At least one prompt and its poem.
    pub exchanges: Vec<Exchange>,
}

/// A conversation of `n_turns` prompts, the same for the same seed on every machine.
pub fn conversation(seed: u64, n_turns: usize) -> Conversation {
    let mut rng = Rng::new(seed);
    let rng = &mut rng;
    let mut theme = Theme::default();
    let exchanges = (0..n_turns.max(1)).map(|turn| exchange(turn > 0, &mut theme, rng)).collect();
    let system = rng.chance(6).then(|| *rng.pick(SYSTEM));
    Conversation { system, exchanges }
}

fn exchange(may_repeat: bool, theme: &mut Theme, rng: &mut Rng) -> Exchange {
    if may_repeat && rng.chance(8) {
        let prompt = in_some_case(rng.pick(AGAIN).to_string(), rng);
        return Exchange { prompt, poem: grammar::write(*theme, rng) };
    }
    *theme = Theme { topic: rng.below(lexicon().topics.len()), ..Theme::default() };
    let prompt = if rng.chance(9) { stranger(rng) } else { ask(theme, rng) };
    Exchange { prompt: in_some_case(prompt, rng), poem: grammar::write(*theme, rng) }
}

/// A prompt that names the theme, and the theme filled in to match.
fn ask(theme: &mut Theme, rng: &mut Rng) -> String {
    let topic = &lexicon().topics[theme.topic];
    let mut subject = if rng.chance(60) { topic.name().to_string() } else { rng.pick(&topic.names).clone() };
    theme.word = asked_word(topic, &subject);
    let article = subject.starts_with("the ");
    if rng.chance(16) && !article && !TIMES.contains(&topic.name()) {
        let time = rng.below(4);
        theme.time = Some(time);
        let name = TIMES[time];
        subject = match rng.below(4) {
            0 if time == 3 => format!("{subject} at night"),
            0 => format!("{subject} in the {name}"),
            _ => format!("{name} {subject}"),
        };
    }
    if rng.chance(30) && !article && !SEASONS.contains(&topic.name()) {
        let season = rng.below(4);
        theme.season = Some(season);
        let name = if season == 2 && rng.chance(10) { "fall" } else { SEASONS[season] };
        subject = if rng.chance(25) { format!("{subject} in {name}") } else { format!("{name} {subject}") };
    }
    if rng.chance(16) && !article {
        let mood = rng.below(lexicon().moods.len());
        theme.mood = Some(mood);
        subject = format!("{} {subject}", rng.pick(&lexicon().moods[mood].words));
    }
    if rng.chance(4) && !article {
        let other = rng.pick(&lexicon().topics);
        subject = format!("{subject} and {}", rng.pick(&other.names));
    }
    if rng.chance(58) { subject } else { phrase(&subject, rng) }
}

/// The word of the topic's names by which a prompt asked for it, where poems can use it.
fn asked_word(topic: &'static Topic, subject: &str) -> Option<&'static str> {
    let is_key = |word: &&str| topic.keys().iter().any(|key| key == word);
    let name = topic.names.iter().find(|name| *name == subject)?;
    name.split(' ').rfind(is_key)
}

fn phrase(subject: &str, rng: &mut Rng) -> String {
    let request = rng.pick(REQUESTS);
    let subject = if request.contains("the {}") { subject.trim_start_matches("the ") } else { subject };
    request.replace("{}", subject)
}

/// A prompt from outside the lexicon: a listed one, two of them, or letters that mean nothing.
fn stranger(rng: &mut Rng) -> String {
    let known: Vec<&str> = STRANGERS.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    let subject = match rng.below(10) {
        0..6 => rng.pick(&known).to_string(),
        6 => format!("{} {}", rng.pick(&known), rng.pick(&known)),
        _ => (0..1 + rng.below(3)).map(|_| nonsense(rng)).collect::<Vec<_>>().join(" "),
    };
    if rng.chance(60) { subject } else { phrase(&subject, rng) }
}

/// A word nobody knows, so that the model has seen the odd tokens of names and other languages.
fn nonsense(rng: &mut Rng) -> String {
    const SYLLABLES: &[&str] = &[
        "ka", "zu", "pre", "ing", "tion", "qua", "xe", "lo", "ri", "ston", "ber", "ge", "vy", "mo", "tek", "é", "ü",
        "ña", "ly", "dro", "fi", "sh", "ch", "wo", "ju", "ept", "oo", "ax", "im", "un", "be", "co", "de", "er", "42",
        "7", "-", "!", "月", "海", "да", "не", "о", "s", "t", "r", "n", "able", "ful", "ism", "log", "net", "py", "q",
        "ck", "and",
    ];
    (0..1 + rng.below(4)).map(|_| *rng.pick(SYLLABLES)).collect()
}

/// As people type: mostly as it is, sometimes with capitals or a full stop.
fn in_some_case(prompt: String, rng: &mut Rng) -> String {
    let mut prompt = match rng.below(100) {
        0..72 => prompt,
        72..88 => capitalised(&prompt),
        88..94 => prompt.split(' ').map(capitalised).collect::<Vec<_>>().join(" "),
        94..97 => prompt.to_uppercase(),
        _ => prompt.to_lowercase(),
    };
    if rng.chance(9) && prompt.ends_with(char::is_alphanumeric) {
        prompt.push(*rng.pick(&['.', '.', '!', '?', ' ']));
    }
    prompt
}

fn capitalised(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_repeat_by_seed_and_scan() {
        for seed in 0..200 {
            let talk = conversation(seed, 3);
            assert_eq!(talk, conversation(seed, 3));
            assert_eq!(talk.exchanges.len(), 3);
            for Exchange { prompt, poem } in &talk.exchanges {
                assert!(!prompt.contains(['\t', '\n', '|']), "{prompt:?}");
                assert!(super::super::scan(poem).is_haiku(), "{poem}");
            }
        }
    }
}
