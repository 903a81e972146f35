//! Reads `lexicon.txt`: the sets, scenes, turns, classes and topics that the training poems are made of.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use super::inflect::{participle, third_person};
use super::syllables;

static LEXICON: LazyLock<Lexicon> = LazyLock::new(|| Lexicon::parse(include_str!("lexicon.txt")));

/// Seasons in the order of their bits in [`Fit::seasons`].
pub(super) const SEASONS: [&str; 4] = ["spring", "summer", "autumn", "winter"];
/// Times of day in the order of their bits in [`Fit::times`].
pub(super) const TIMES: [&str; 4] = ["morning", "day", "evening", "night"];

/// Where a phrase may stand: bit masks, 0 for "anywhere".
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fit {
    pub(super) seasons: u8,
    pub(super) times: u8,
    /// Only with a singular subject.
    pub(super) singular: bool,
}

impl Fit {
    /// Reads `@spring @night` and the like.
    fn parse<'a>(tags: impl Iterator<Item = &'a str>) -> Option<Fit> {
        let mut fit = Fit::default();
        for tag in tags.map(str::trim) {
            if let Some(bit) = SEASONS.iter().position(|season| *season == tag) {
                fit.seasons |= 1 << bit;
            } else if let Some(bit) = TIMES.iter().position(|time| *time == tag) {
                fit.times |= 1 << bit;
            } else if tag == "s" {
                fit.singular = true;
            } else {
                return None;
            }
        }
        Some(fit)
    }

    /// Both restrictions at once; `None` where no season or time is left.
    fn and(self, other: Fit) -> Option<Fit> {
        let mask = |a: u8, b: u8| match (a, b) {
            (0, x) | (x, 0) => Some(x),
            (a, b) => Some(a & b).filter(|both| *both != 0),
        };
        Some(Fit {
            seasons: mask(self.seasons, other.seasons)?,
            times: mask(self.times, other.times)?,
            singular: self.singular || other.singular,
        })
    }
}

/// Words with their syllables and where they fit.
#[derive(Debug, Clone)]
pub(super) struct Phrase {
    pub(super) text: String,
    pub(super) syllables: u32,
    pub(super) fit: Fit,
}

/// A verb phrase in the forms that the grammar needs.
#[derive(Debug, Clone)]
pub(super) struct Verb {
    /// "folds its wings", "fold their wings", "folding its wings", "folding their wings".
    pub(super) forms: [Phrase; 4],
}

/// How a topic's noun takes articles and agrees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    /// "a heron", "the heron waits".
    Singular,
    /// "snow", "the snow falls".
    Mass,
    /// "geese", "the geese call".
    Plural,
    /// "my mother".
    Mine,
    /// "silence": no article at all.
    Abstract,
}

impl Number {
    /// The letter by which templates name it.
    pub(super) fn letter(self) -> char {
        match self {
            Number::Singular => 's',
            Number::Mass => 'm',
            Number::Plural => 'p',
            Number::Mine => 'y',
            Number::Abstract => 'a',
        }
    }
}

/// A noun (or noun phrase without article) that names a topic.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) phrase: Phrase,
    pub(super) number: Number,
}

/// Something a poem can be about.
#[derive(Debug, Clone, Default)]
pub struct Topic {
    pub(super) names: Vec<String>,
    pub(super) fit: Fit,
    pub(super) keys: Vec<String>,
    pub(super) heads: Vec<Head>,
    pub(super) adjectives: Vec<Phrase>,
    pub(super) verbs: Vec<Verb>,
    pub(super) acts: Vec<Verb>,
    pub(super) places: Vec<Phrase>,
    pub(super) companions: Vec<usize>,
    pub(super) lines: Vec<Phrase>,
}

impl Topic {
    /// The topic's name, as in a prompt.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    /// Other words by which a prompt may ask for it.
    pub fn aliases(&self) -> &[String] {
        &self.names[1..]
    }

    /// The words by which a poem speaks of the topic.
    pub fn keys(&self) -> &[String] {
        &self.keys
    }

    /// Whether one of the topic's own words stands in the text.
    pub fn is_in(&self, text: &str) -> bool {
        syllables::words(text).any(|word| {
            let word = word.to_lowercase();
            let word = word.trim_end_matches("'s");
            self.keys.iter().any(|key| key == word)
        })
    }
}

/// A mood: the words by which a prompt asks for it, and the lines that have it.
#[derive(Debug, Clone, Default)]
pub(super) struct Mood {
    pub(super) words: Vec<String>,
    pub(super) turns: Vec<Phrase>,
}

/// Everything in `lexicon.txt`, checked and with its syllables counted.
#[derive(Debug, Default)]
pub(super) struct Lexicon {
    pub(super) adverbs: Vec<Phrase>,
    /// The words of each season, "fall" beside "autumn".
    pub(super) seasons: [Vec<Phrase>; 4],
    pub(super) clock: Vec<Phrase>,
    pub(super) weather: Vec<Phrase>,
    pub(super) scenes: Vec<Phrase>,
    pub(super) moods: Vec<Mood>,
    /// Turns of no mood in particular.
    pub(super) turns: Vec<Phrase>,
    pub(super) topics: Vec<Topic>,
    /// What is wrong with the file; a test demands that there is nothing.
    pub(super) faults: BTreeSet<String>,
}

/// The lexicon of the training poems.
pub(super) fn lexicon() -> &'static Lexicon {
    &LEXICON
}

/// The phrases of a class or topic, before their syllables are counted.
#[derive(Debug, Default, Clone)]
struct Raw {
    entries: HashMap<String, Vec<String>>,
}

impl Raw {
    fn add(&mut self, key: &str, entries: Vec<String>) {
        match key.strip_suffix('!') {
            // The first `adj!` of a topic replaces what its class says; later ones add to it.
            Some(key) if !self.entries.contains_key(&format!("{key}!")) => {
                self.entries.insert(format!("{key}!"), Vec::new());
                self.entries.insert(key.to_string(), entries);
            }
            _ => self.entries.entry(key.trim_end_matches('!').to_string()).or_default().extend(entries),
        }
    }

    fn get(&self, key: &str) -> &[String] {
        self.entries.get(key).map_or(&[], Vec::as_slice)
    }
}

/// The state of reading: named sets and classes, and the lexicon so far.
#[derive(Default)]
struct Reader {
    lexicon: Lexicon,
    sets: HashMap<String, Vec<String>>,
    classes: HashMap<String, Raw>,
    topics: Vec<(Vec<String>, Raw)>,
    in_class: Option<String>,
}

fn split(entries: &str) -> Vec<String> {
    entries.split(';').map(|entry| entry.trim().to_string()).filter(|entry| !entry.is_empty()).collect()
}

impl Lexicon {
    fn parse(text: &str) -> Lexicon {
        let mut reader = Reader::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            reader.statement(line);
        }
        reader.finish()
    }
}

impl Reader {
    fn fault(&mut self, what: impl Into<String>) {
        self.lexicon.faults.insert(what.into());
    }

    fn statement(&mut self, line: &str) {
        let (left, right) = line.split_once('|').unwrap_or((line, ""));
        let (keyword, name) = left.trim().split_once(' ').unwrap_or((left.trim(), ""));
        let entries = split(right);
        match (keyword, name) {
            ("set", name) => self.sets.entry(name.to_string()).or_default().extend(entries),
            ("class", name) => {
                self.classes.insert(name.to_string(), Raw::default());
                self.in_class = Some(name.to_string());
            }
            ("topic", name) => {
                let names = std::iter::once(name.to_string()).chain(entries).collect();
                self.topics.push((names, Raw::default()));
                self.in_class = None;
            }
            ("is", class) => match (self.classes.get(class), self.topics.last_mut()) {
                (Some(class), Some(topic)) => topic.1 = class.clone(),
                _ => self.fault(format!("{line}: no such class, or not in a topic")),
            },
            ("mood", name) => {
                let words =
                    std::iter::once(name.to_string()).chain(entries.into_iter().filter(|w| w != name)).collect();
                self.lexicon.moods.push(Mood { words, turns: Vec::new() });
            }
            ("season", name) if !name.is_empty() => self.season(name, &entries),
            ("turn" | "scene", name) => self.lines(keyword, name, &entries),
            ("adverb" | "clock" | "weather", _) => {
                let phrases = self.phrases(&entries);
                let list = match keyword {
                    "adverb" => &mut self.lexicon.adverbs,
                    "clock" => &mut self.lexicon.clock,
                    _ => &mut self.lexicon.weather,
                };
                list.extend(phrases);
            }
            (key, "") => match (&self.in_class, self.topics.last_mut()) {
                (Some(class), _) => {
                    let class = class.clone();
                    self.classes.entry(class).or_default().add(key, entries);
                }
                (None, Some(topic)) => topic.1.add(key, entries),
                (None, None) => self.fault(format!("{line}: outside a class or topic")),
            },
            _ => self.fault(format!("{line}: not a statement")),
        }
    }

    fn season(&mut self, name: &str, words: &[String]) {
        let mut phrases = self.phrases(words);
        match SEASONS.iter().position(|season| *season == name) {
            Some(index) => {
                phrases.iter_mut().for_each(|phrase| phrase.fit.seasons = 1 << index);
                self.lexicon.seasons[index].extend(phrases);
            }
            None => self.fault(format!("{name}: not a season")),
        }
    }

    /// Whole lines of a scene or a mood; each must have five or seven syllables.
    fn lines(&mut self, keyword: &str, name: &str, entries: &[String]) {
        let mut phrases = self.phrases(entries);
        self.check_lines(&phrases);
        if keyword == "scene" {
            match Fit::parse(std::iter::once(name)) {
                Some(fit) => phrases.iter_mut().for_each(|phrase| phrase.fit = fit),
                None => self.fault(format!("scene {name}: neither season nor time")),
            }
            self.lexicon.scenes.extend(phrases);
            return;
        }
        match self.lexicon.moods.iter_mut().find(|mood| mood.words[0] == name) {
            Some(mood) => mood.turns.extend(phrases),
            None => self.lexicon.turns.extend(phrases),
        }
    }

    fn check_lines(&mut self, phrases: &[Phrase]) {
        for phrase in phrases.iter().filter(|phrase| ![5, 7].contains(&phrase.syllables)) {
            self.lexicon.faults.insert(format!("{} syllables: {}", phrase.syllables, phrase.text));
        }
    }

    /// Reads entries, their tags and sets, into phrases.
    fn phrases(&mut self, entries: &[String]) -> Vec<Phrase> {
        let expanded = self.expand(entries);
        expanded.into_iter().map(|(text, fit)| self.phrase(text, fit)).collect()
    }

    fn phrase(&mut self, text: String, fit: Fit) -> Phrase {
        let mut syllables = 0;
        for word in syllables::words(&text) {
            match syllables::syllables(word) {
                Some(n) => syllables += n,
                None => _ = self.lexicon.faults.insert(format!("no syllables: {word}")),
            }
        }
        Phrase { text, syllables, fit }
    }

    /// Replaces `{set}` by each of its phrases and reads the tags.
    fn expand(&mut self, entries: &[String]) -> Vec<(String, Fit)> {
        let mut done = Vec::new();
        for entry in entries {
            let mut parts = entry.split('@');
            let text = parts.next().unwrap_or_default().trim().to_string();
            let Some(fit) = Fit::parse(parts) else {
                self.fault(format!("{entry}: unknown tag"));
                continue;
            };
            let Some((before, set, after)) = set_in(&text) else {
                done.push((text, fit));
                continue;
            };
            let Some(members) = self.sets.get(set).cloned() else {
                self.fault(format!("{entry}: no set {set}"));
                continue;
            };
            for (member, member_fit) in self.expand(&members) {
                done.extend(fit.and(member_fit).map(|fit| (format!("{before}{member}{after}"), fit)));
            }
        }
        done
    }

    fn verbs(&mut self, entries: &[String]) -> Vec<Verb> {
        let bare = self.expand(entries);
        let form = |reader: &mut Reader, text: String, its: &str, fit| reader.phrase(text.replace("{its}", its), fit);
        bare.into_iter()
            .map(|(text, fit)| Verb {
                forms: [
                    form(self, third_person(&text), "its", fit),
                    form(self, text.clone(), "their", fit),
                    form(self, participle(&text), "its", fit),
                    form(self, participle(&text), "their", fit),
                ],
            })
            .collect()
    }

    fn head(&mut self, entry: &str) -> Head {
        let (text, tags) =
            entry.split_once('@').map_or((entry, String::new()), |(text, tags)| (text, format!("@{tags}")));
        let (text, letter) = text.trim().split_once(':').unwrap_or((text.trim(), "s"));
        let number = match letter {
            "s" => Number::Singular,
            "m" => Number::Mass,
            "p" => Number::Plural,
            "y" => Number::Mine,
            "a" => Number::Abstract,
            _ => {
                self.fault(format!("{entry}: unknown number"));
                Number::Singular
            }
        };
        let fit = Fit::parse(tags.split('@').skip(1)).unwrap_or_default();
        Head { phrase: self.phrase(text.to_string(), fit), number }
    }

    fn finish(mut self) -> Lexicon {
        let raw_topics = std::mem::take(&mut self.topics);
        // Companions may be named before their topic is, so all names are taken first.
        let names: Vec<Vec<String>> = raw_topics.iter().map(|(names, _)| names.clone()).collect();
        for (topic_names, raw) in raw_topics {
            let topic = self.topic(topic_names, &raw, &names);
            self.lexicon.topics.push(topic);
        }
        self.lexicon
    }

    fn topic(&mut self, topic_names: Vec<String>, raw: &Raw, all_names: &[Vec<String>]) -> Topic {
        let fit = Fit::parse(raw.get("season").iter().chain(raw.get("time")).map(String::as_str)).unwrap_or_default();
        let companions = raw.get("with").iter();
        let companions = companions
            .filter_map(|with| {
                let index = all_names.iter().position(|names| names.contains(with));
                let index = index.or_else(|| all_names.iter().position(|names| names.contains(&format!("{with}s"))));
                if index.is_none() {
                    self.fault(format!("{}: no topic for companion {with}", topic_names[0]));
                }
                index
            })
            .collect();
        let topic = Topic {
            fit,
            companions,
            keys: raw.get("keys").to_vec(),
            heads: raw.get("head").iter().map(|entry| self.head(entry)).collect(),
            adjectives: self.phrases(raw.get("adj")),
            verbs: self.verbs(raw.get("verb")),
            acts: self.verbs(raw.get("vp")),
            places: self.phrases(raw.get("at")),
            lines: self.phrases(raw.get("line")),
            names: topic_names,
        };
        self.check_lines(&topic.lines);
        for text in topic.heads.iter().map(|head| &head.phrase.text) {
            if !topic.is_in(text) {
                self.fault(format!("{}: head {text} has no key", topic.name()));
            }
        }
        topic
    }
}

/// The first `{set}` of a text that is not the pronoun `{its}`: what stands before, its name, what stands after.
fn set_in(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(start) = text[from..].find('{').map(|at| at + from) {
        let end = start + text[start..].find('}')?;
        if &text[start + 1..end] != "its" {
            return Some((&text[..start], &text[start + 1..end], &text[end + 1..]));
        }
        from = end;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lexicon_has_no_faults() {
        let faults = &lexicon().faults;
        assert!(
            faults.is_empty(),
            "{} faults:\n{}",
            faults.len(),
            faults.iter().cloned().collect::<Vec<_>>().join("\n")
        );
    }

    #[test]
    fn it_has_forty_topics_and_more_and_all_seasons_and_moods() {
        let lexicon = lexicon();
        assert!(lexicon.topics.len() >= 40, "{} topics", lexicon.topics.len());
        assert!(lexicon.moods.len() >= 8);
        assert!(lexicon.seasons.iter().all(|names| !names.is_empty()));
        for topic in &lexicon.topics {
            assert!(
                topic.heads.len() >= 2 && topic.adjectives.len() >= 4 && topic.verbs.len() >= 4,
                "{}",
                topic.name()
            );
            assert!(!topic.acts.is_empty() && !topic.places.is_empty() && !topic.lines.is_empty(), "{}", topic.name());
        }
    }
}
