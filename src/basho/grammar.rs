//! Writes haiku: picks a form, fills its templates with words that fit, and counts until each line is exact.
//!
//! A form says what each of the three lines is: a scene (season, time of day), a phrase or clause about the topic, a
//! clause about a companion of the topic, a turn in some mood. A template is a line with slots; the slots are filled by
//! choosing uniformly among all combinations that give exactly the syllables wanted, counted by dynamic programming.

use std::sync::LazyLock;

use super::lexicon::{Fit, Head, Lexicon, Number, Phrase, Topic, Verb, lexicon};
use super::rng::Rng;
use super::syllables;

/// What a poem has to be about; what is `None` is the poet's own choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Theme {
    /// Index into [`super::topics`].
    pub topic: usize,
    /// Index into spring, summer, autumn, winter; the poem shows it.
    pub season: Option<usize>,
    /// Index into morning, day, evening, night; the poem shows it.
    pub time: Option<usize>,
    /// Index of a mood of the lexicon; the poem ends in it.
    pub mood: Option<usize>,
    /// One of the topic's words that the poem should use: who asks for a crane is not answered with a heron.
    pub word: Option<&'static str>,
}

/// Noun phrases around the topic's noun `{T}`, each with the numbers it takes (see [`Number::letter`]).
const FRAGMENTS: &[(&str, &str)] = &[
    ("smpy", "the {adj} {T}"),
    ("smpy", "the {T} {at}"),
    ("smpy", "the {adj} {T} {at}"),
    ("smpy", "{ing}, the {T}"),
    ("smpy", "{ing} {at}, the {T}"),
    ("smpy", "the {T}, {adj} and {adj}"),
    ("smpy", "only the {T}"),
    ("smpy", "only the {adj} {T}"),
    ("smpy", "once more, the {T}"),
    ("smpy", "the {T} {again}"),
    ("smpy", "and still, the {T}"),
    ("s", "a {adj} {T}"),
    ("s", "one {adj} {T}"),
    ("s", "a {T} {at}"),
    ("s", "a {adj} {T} {at}"),
    ("s", "this {adj} {T}"),
    ("s", "a {T} {ing} {at}"),
    ("s", "a {adj} {T} {ing}"),
    ("s", "a {T} {acting}"),
    ("s", "one {T}, {adj} and {adj}"),
    ("mp", "{adj} {T}"),
    ("mp", "{adj} {T} {at}"),
    ("mp", "{T} {at}"),
    ("mp", "{adj} {T} {ing}"),
    ("mp", "{T} {ing} {at}"),
    ("mp", "{T} {acting}"),
    ("p", "two {adj} {T}"),
    ("p", "a few {adj} {T}"),
    ("p", "so many {T}"),
    ("p", "so many {adj} {T}"),
    ("a", "{adj} {T}"),
    ("a", "{T} {at}"),
    ("a", "{adj} {T} {at}"),
    ("a", "{T} {ing} {at}"),
    ("a", "{adj} {T} {ing}"),
    ("a", "{T}, {adj} and {adj}"),
    ("a", "{T} {acting}"),
    ("a", "only {T}"),
    ("a", "{ing} {at}, {T}"),
];

/// Noun phrases that a predicate on the next line can follow.
const SUBJECTS: &[(&str, &str)] = &[
    ("smpy", "the {adj} {T}"),
    ("smpy", "the {adj}, {adj} {T}"),
    ("smpy", "the {T} {at}"),
    ("smpy", "and still, the {adj} {T}"),
    ("s", "a {adj} {T}"),
    ("s", "a {adj}, {adj} {T}"),
    ("s", "a {T} {at}"),
    ("s", "one {adj} {T}"),
    ("mp", "{adj} {T}"),
    ("mp", "{adj}, {adj} {T}"),
    ("p", "two {adj} {T}"),
    ("a", "{adj} {T}"),
    ("a", "{adj}, {adj} {T}"),
    ("a", "{T} {at}"),
];

/// What a subject of the line before does.
const PREDICATES: &[(&str, &str)] = &[
    ("smpya", "{v} {at}"),
    ("smpya", "{v} {adv} {at}"),
    ("smpya", "{v} and {v} {at}"),
    ("smpya", "{act}"),
    ("smpya", "{act}"),
    ("smpya", "{ing} {at}"),
    ("smpya", "{acting}"),
];

/// Whole clauses about the topic.
const CLAUSES: &[(&str, &str)] = &[
    ("smpy", "the {T} {v}"),
    ("smpy", "the {adj} {T} {v}"),
    ("smpy", "the {T} {v} {at}"),
    ("smpy", "the {adj} {T} {v} {at}"),
    ("smpy", "the {T} {v} {adv}"),
    ("smpy", "the {adj} {T} {v} {adv}"),
    ("smpy", "the {T} {act}"),
    ("smpy", "the {adj} {T} {act}"),
    ("smpy", "{at} the {T} {v}"),
    ("smpy", "{at} the {adj} {T} {v}"),
    ("smpy", "again the {T} {v}"),
    ("smpy", "the {T} {v} and {v}"),
    ("smpy", "and the {T} {v} {at}"),
    ("smpy", "and the {T} {act}"),
    ("smpy", "how the {T} {v} {at}"),
    ("s", "a {adj} {T} {v} {at}"),
    ("s", "a {T} {v} {at}"),
    ("s", "a {T} {act}"),
    ("s", "one {adj} {T} {v} {at}"),
    ("s", "{at} a {T} {v}"),
    ("s", "{at} a {adj} {T} {v}"),
    ("mp", "{T} {v} {at}"),
    ("mp", "{adj} {T} {v} {at}"),
    ("mp", "{T} {act}"),
    ("mp", "{adj} {T} {act}"),
    ("mp", "{at} {adj} {T} {v}"),
    ("a", "{T} {v} {at}"),
    ("a", "{adj} {T} {v}"),
    ("a", "{adj} {T} {v} {at}"),
    ("a", "{T} {v} {adv}"),
    ("a", "{T} {act}"),
    ("a", "{adj} {T} {act}"),
    ("a", "and {T} {act}"),
    ("a", "again {T} {v} {at}"),
];

/// Scenes made of season, weather and clock.
const SCENES: &[(&str, &str)] = &[
    ("", "{weather} {season} {clock}"),
    ("", "the last {clock} of {season}"),
    ("", "the first {clock} of {season}"),
    ("", "first {clock} of {season}"),
    ("", "one {clock} in {season}"),
    ("", "late in the {season}"),
    ("", "deep in the {season}"),
    ("", "another {season}"),
    ("", "{weather} {weather} {clock}"),
    ("", "{season} {clock} again"),
    ("", "half way through {season}"),
    ("", "{weather} {clock}, and {season}"),
];

/// What a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Scene,
    Fragment,
    Subject,
    Predicate,
    Clause,
    /// A line written whole for the topic.
    Own,
    Companion,
    Turn,
}

/// The forms and how often each is chosen.
const FORMS: &[(usize, [Part; 3])] = &[
    (22, [Part::Scene, Part::Clause, Part::Turn]),
    (14, [Part::Fragment, Part::Companion, Part::Turn]),
    (16, [Part::Subject, Part::Predicate, Part::Turn]),
    (8, [Part::Clause, Part::Companion, Part::Turn]),
    (6, [Part::Scene, Part::Companion, Part::Fragment]),
    (6, [Part::Scene, Part::Own, Part::Turn]),
    (6, [Part::Fragment, Part::Own, Part::Turn]),
    (6, [Part::Own, Part::Companion, Part::Turn]),
    (6, [Part::Companion, Part::Clause, Part::Turn]),
    (5, [Part::Clause, Part::Turn, Part::Scene]),
    (5, [Part::Fragment, Part::Turn, Part::Scene]),
    (5, [Part::Scene, Part::Clause, Part::Own]),
    (3, [Part::Scene, Part::Turn, Part::Fragment]),
];

/// The syllables of the three lines.
const METRE: [u32; 3] = [5, 7, 5];

/// A slot of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Adjective,
    Place,
    Adverb,
    Again,
    Verb,
    Participle,
    Act,
    Acting,
    Season,
    Clock,
    Weather,
}

#[derive(Debug)]
enum Piece {
    /// Literal text and its syllables.
    Text(String, u32),
    /// The topic's noun.
    Noun,
    Slot(Slot),
}

impl Piece {
    fn text(text: &str) -> Piece {
        // A word that is not listed makes the template unfit for every line; the tests would miss it at once.
        Piece::Text(text.to_string(), syllables::count_line(text).unwrap_or(u32::MAX / 16))
    }
}

#[derive(Debug)]
struct Template {
    numbers: &'static str,
    pieces: Vec<Piece>,
    /// Whether "the" stands in it, which "my mother" turns into "my".
    source: &'static str,
}

impl Template {
    fn parse((numbers, source): (&'static str, &'static str)) -> Template {
        let mut pieces = Vec::new();
        let mut rest = source;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').unwrap_or((after, ""));
            pieces.push(Piece::text(before));
            pieces.push(match name {
                "adj" => Piece::Slot(Slot::Adjective),
                "at" => Piece::Slot(Slot::Place),
                "adv" => Piece::Slot(Slot::Adverb),
                "again" => Piece::Slot(Slot::Again),
                "v" => Piece::Slot(Slot::Verb),
                "ing" => Piece::Slot(Slot::Participle),
                "act" => Piece::Slot(Slot::Act),
                "acting" => Piece::Slot(Slot::Acting),
                "season" => Piece::Slot(Slot::Season),
                "clock" => Piece::Slot(Slot::Clock),
                "weather" => Piece::Slot(Slot::Weather),
                _ => Piece::Noun,
            });
            rest = after;
        }
        pieces.push(Piece::text(rest));
        Template { numbers, pieces, source }
    }
}

struct Templates {
    fragments: Vec<Template>,
    subjects: Vec<Template>,
    predicates: Vec<Template>,
    clauses: Vec<Template>,
    scenes: Vec<Template>,
}

static TEMPLATES: LazyLock<Templates> = LazyLock::new(|| {
    let parse = |list: &[(&'static str, &'static str)]| list.iter().copied().map(Template::parse).collect();
    Templates {
        fragments: parse(FRAGMENTS),
        subjects: parse(SUBJECTS),
        predicates: parse(PREDICATES),
        clauses: parse(CLAUSES),
        scenes: parse(SCENES),
    }
});

/// Season, time and mood of the poem being written; bit masks of at most one bit.
#[derive(Debug, Clone, Copy)]
struct World {
    seasons: u8,
    times: u8,
    mood: Option<usize>,
}

impl World {
    /// Chooses what the theme leaves open, within what is natural for the topic.
    fn choose(theme: Theme, topic: &Topic, rng: &mut Rng) -> World {
        World {
            seasons: choose_bit(theme.season, topic.fit.seasons, 70, rng),
            times: choose_bit(theme.time, topic.fit.times, 60, rng),
            mood: theme.mood.or_else(|| rng.chance(80).then(|| rng.below(lexicon().moods.len()))),
        }
    }

    fn admits(self, fit: Fit, plural: bool) -> bool {
        (fit.seasons == 0 || fit.seasons & self.seasons != 0)
            && (fit.times == 0 || fit.times & self.times != 0)
            && !(fit.singular && plural)
    }
}

/// One bit: the given one, or in `percent` of a hundred calls a random one of `natural` (0: any), or none.
fn choose_bit(given: Option<usize>, natural: u8, percent: usize, rng: &mut Rng) -> u8 {
    match given {
        Some(index) => 1 << index,
        None if !rng.chance(percent) => 0,
        None => {
            let bits: Vec<u8> = (0..4).map(|i| 1 << i).filter(|bit| natural == 0 || natural & bit != 0).collect();
            *rng.pick(&bits)
        }
    }
}

/// A line as written, and what it shows of season and time.
#[derive(Debug, Clone, Default)]
struct Line {
    text: String,
    fit: Fit,
}

/// The poet at work on one poem.
struct Poet<'a> {
    words: &'a Lexicon,
    topic: &'a Topic,
    world: World,
    rng: &'a mut Rng,
    /// The subject's number when the line before was a subject.
    subject: Option<Number>,
}

/// Words too small to count as a repetition.
const SMALL: &[&str] = &[
    "with", "from", "into", "over", "that", "this", "then", "them", "they", "what", "when", "where", "here", "there",
    "more", "than", "your", "their", "have", "once", "only", "still", "after", "through", "under", "along", "beside",
    "below", "behind", "above", "between", "across", "same", "last", "first", "down", "back", "some", "none",
    "nothing",
];

impl Poet<'_> {
    /// One attempt at the whole poem.
    fn attempt(&mut self, theme: Theme) -> Option<String> {
        let parts = self.form();
        let mut lines: Vec<Line> = Vec::new();
        self.subject = None;
        for (part, syllables) in parts.into_iter().zip(METRE) {
            let line = (0..4).find_map(|_| self.line(part, syllables))?;
            if lines.iter().any(|before| repeats(&before.text, &line.text)) {
                return None;
            }
            lines.push(line);
        }
        let seasons = lines.iter().fold(0, |mask, line| mask | line.fit.seasons);
        let times = lines.iter().fold(0, |mask, line| mask | line.fit.times);
        let shown = |given: Option<usize>, mask: u8| given.is_none_or(|bit| mask & (1 << bit) != 0);
        let text = self.punctuate(&parts, &lines);
        let named = theme.word.is_none_or(|word| syllables::words(&text).any(|w| w.starts_with(stem(word))));
        (named && shown(theme.season, seasons) && shown(theme.time, times) && self.topic.is_in(&text)).then_some(text)
    }

    fn form(&mut self) -> [Part; 3] {
        let total = FORMS.iter().map(|(weight, _)| weight).sum();
        let mut at = self.rng.below(total);
        for (weight, parts) in FORMS {
            if at < *weight {
                return *parts;
            }
            at -= weight;
        }
        FORMS[0].1
    }

    fn line(&mut self, part: Part, syllables: u32) -> Option<Line> {
        let templates = &*TEMPLATES;
        match part {
            Part::Scene if self.rng.chance(55) => self.fill(&templates.scenes, None, syllables),
            Part::Scene => self.whole(&self.words.scenes, syllables, true),
            Part::Own => self.whole(&self.topic.lines, syllables, false),
            Part::Turn => self.turn(syllables),
            Part::Companion => self.companion(syllables),
            Part::Predicate => {
                let number = self.subject?;
                let line = self.fill(&templates.predicates, Some((self.topic, None, number)), syllables);
                self.subject = None;
                line
            }
            Part::Fragment | Part::Subject | Part::Clause => {
                let list = match part {
                    Part::Fragment => &templates.fragments,
                    Part::Subject => &templates.subjects,
                    _ => &templates.clauses,
                };
                let head = self.head(self.topic)?;
                self.subject = Some(head.number);
                self.fill(list, Some((self.topic, Some(head), head.number)), syllables)
            }
        }
    }

    fn head<'t>(&mut self, topic: &'t Topic) -> Option<&'t Head> {
        let world = self.world;
        let heads: Vec<_> = topic.heads.iter().filter(|head| world.admits(head.phrase.fit, false)).collect();
        (!heads.is_empty()).then(|| *self.rng.pick(&heads))
    }

    /// A line written whole. Scenes must say something of the season or the time.
    fn whole(&mut self, list: &[Phrase], syllables: u32, tagged: bool) -> Option<Line> {
        let world = self.world;
        let fits = |phrase: &&Phrase| {
            let fit = phrase.fit;
            phrase.syllables == syllables
                && world.admits(fit, false)
                && (!tagged || fit.seasons & world.seasons != 0 || fit.times & world.times != 0)
        };
        let lines: Vec<_> = list.iter().filter(fits).collect();
        if lines.is_empty() {
            return None;
        }
        let phrase = self.rng.pick(&lines);
        Some(Line { text: phrase.text.clone(), fit: phrase.fit })
    }

    fn turn(&mut self, syllables: u32) -> Option<Line> {
        let words = self.words;
        let roll = self.rng.below(100);
        match self.world.mood {
            Some(mood) if roll < 72 => self.whole(&words.moods[mood].turns, syllables, false),
            _ if roll < 86 => self.whole(&words.turns, syllables, false),
            _ if roll < 94 => self.whole(&self.topic.lines, syllables, false),
            _ => self.companion(syllables),
        }
    }

    fn companion(&mut self, syllables: u32) -> Option<Line> {
        let index = *self.rng.pick(&self.topic.companions);
        let companion = &self.words.topics[index];
        let head = self.head(companion)?;
        let list = if self.rng.chance(75) { &TEMPLATES.clauses } else { &TEMPLATES.fragments };
        self.fill(list, Some((companion, Some(head), head.number)), syllables)
    }

    /// Fills one of the templates so that the line has exactly the syllables.
    fn fill(
        &mut self,
        templates: &[Template],
        about: Option<(&Topic, Option<&Head>, Number)>,
        syllables: u32,
    ) -> Option<Line> {
        let number = about.map(|(_, _, number)| number);
        let fitting: Vec<_> = templates
            .iter()
            .filter(|template| number.is_none_or(|number| template.numbers.contains(number.letter())))
            .collect();
        (0..6).find_map(|_| {
            let template = *self.rng.pick(&fitting);
            self.fill_one(template, about, syllables)
        })
    }

    fn fill_one(
        &mut self,
        template: &Template,
        about: Option<(&Topic, Option<&Head>, Number)>,
        syllables: u32,
    ) -> Option<Line> {
        let plural = matches!(about, Some((_, _, Number::Plural)));
        let noun = about.and_then(|(_, head, _)| head).map(|head| &head.phrase);
        let mut fixed = noun.map_or(0, |noun| noun.syllables);
        let mut choices: Vec<Vec<&Phrase>> = Vec::new();
        for piece in &template.pieces {
            match piece {
                Piece::Text(_, syllables) => fixed += syllables,
                Piece::Noun => {}
                Piece::Slot(slot) => choices.push(self.choices(*slot, about.map(|(topic, ..)| topic), plural)),
            }
        }
        let picked = self.choose_exactly(&choices, syllables.checked_sub(fixed)?)?;
        let mut line = Line { fit: noun.map(|noun| noun.fit).unwrap_or_default(), ..Line::default() };
        let mut picked = picked.into_iter();
        for piece in &template.pieces {
            let phrase = match piece {
                Piece::Text(text, _) => {
                    line.text.push_str(text);
                    continue;
                }
                Piece::Noun => noun?,
                Piece::Slot(_) => picked.next()?,
            };
            line.text.push_str(&phrase.text);
            line.fit.seasons |= phrase.fit.seasons & self.world.seasons;
            line.fit.times |= phrase.fit.times & self.world.times;
        }
        if matches!(about, Some((_, _, Number::Mine))) && template.source.contains("the ") {
            line.text = line.text.replacen("the ", "my ", if template.source.starts_with("{at}") { 0 } else { 1 });
        }
        line.fit.seasons &= self.world.seasons;
        (!repeats_itself(&line.text)).then_some(line)
    }

    /// The phrases that a slot may take.
    fn choices<'t>(&self, slot: Slot, topic: Option<&'t Topic>, plural: bool) -> Vec<&'t Phrase>
    where
        Self: 't,
    {
        let words = lexicon();
        let world = self.world;
        let plain = |list: &'t [Phrase]| -> Vec<&'t Phrase> {
            list.iter().filter(|phrase| world.admits(phrase.fit, plural)).collect()
        };
        let form = |list: fn(&Topic) -> &[Verb], form: usize| -> Vec<&'t Phrase> {
            let forms = topic.map_or(&[][..], list).iter().map(|verb| &verb.forms[form + usize::from(plural)]);
            forms.filter(|phrase| world.admits(phrase.fit, plural)).collect()
        };
        let of_topic = |list: fn(&Topic) -> &[Phrase]| plain(topic.map_or(&[][..], list));
        match slot {
            Slot::Adjective => of_topic(|topic| &topic.adjectives),
            Slot::Place => of_topic(|topic| &topic.places),
            Slot::Verb => form(|topic| &topic.verbs, 0),
            Slot::Participle => form(|topic| &topic.verbs, 2),
            Slot::Act => form(|topic| &topic.acts, 0),
            Slot::Acting => form(|topic| &topic.acts, 2),
            Slot::Adverb => plain(&words.adverbs),
            Slot::Again => plain(&words.adverbs).into_iter().filter(|p| is_plain_adverb(&p.text)).collect(),
            Slot::Season => words.seasons.iter().flatten().filter(|p| world.admits(p.fit, false)).collect(),
            Slot::Clock => plain(&words.clock),
            Slot::Weather => plain(&words.weather),
        }
    }

    /// One phrase for each slot, chosen uniformly among all choices whose syllables add up to `total`.
    fn choose_exactly<'c>(&mut self, choices: &[Vec<&'c Phrase>], total: u32) -> Option<Vec<&'c Phrase>> {
        let total = total as usize;
        // ways[k][n]: in how many ways the slots from k on can take n syllables.
        let mut ways = vec![vec![0u64; total + 1]; choices.len() + 1];
        ways[choices.len()][0] = 1;
        for (k, list) in choices.iter().enumerate().rev() {
            for phrase in list {
                let n = phrase.syllables as usize;
                for left in n..=total {
                    ways[k][left] += ways[k + 1][left - n];
                }
            }
        }
        if ways[0][total] == 0 {
            return None;
        }
        let mut left = total;
        let mut picked = Vec::with_capacity(choices.len());
        for (k, list) in choices.iter().enumerate() {
            let mut at = self.rng.below(ways[k][left] as usize) as u64;
            let phrase = list.iter().find(|phrase| {
                let n = phrase.syllables as usize;
                let here = if n <= left { ways[k + 1][left - n] } else { 0 };
                let found = at < here;
                at = at.saturating_sub(here);
                found
            })?;
            left -= phrase.syllables as usize;
            picked.push(*phrase);
        }
        Some(picked)
    }

    /// Joins the lines, with a cut (a dash) after one of them in some poems.
    fn punctuate(&mut self, parts: &[Part; 3], lines: &[Line]) -> String {
        let runs_on = parts[0] == Part::Subject;
        let cut = match self.rng.below(100) {
            0..35 if !runs_on => Some(0),
            35..55 => Some(1),
            _ => None,
        };
        let mut text = String::new();
        for (index, line) in lines.iter().enumerate() {
            text.push_str(&with_articles(&line.text));
            if cut == Some(index) {
                text.push_str(" —");
            }
            if index < 2 {
                text.push('\n');
            }
        }
        text
    }
}

/// Adverbs that may follow a noun: "the moon again", "the moon at dawn", not "the moon slowly".
fn is_plain_adverb(text: &str) -> bool {
    let first = text.split(' ').next().unwrap_or_default();
    ["again", "alone", "at", "once", "unseen", "all", "before", "past", "since", "in", "until"].contains(&first)
        && text != "in no hurry"
}

/// A word without the plural's s: enough to recognise "cranes" by "crane".
fn stem(word: &str) -> &str {
    if word.len() > 3 { word.trim_end_matches('s') } else { word }
}

/// Whether two lines share a word of weight, or two words of one stem.
fn repeats(a: &str, b: &str) -> bool {
    let heavy = |text| -> Vec<&str> { syllables::words(text).filter(|w| w.len() >= 4 && !SMALL.contains(w)).collect() };
    let (a, b) = (heavy(a), heavy(b));
    a.iter().any(|x| b.iter().any(|y| x.starts_with(y) || y.starts_with(x)))
}

/// Whether a line says a word of weight twice; only lines made from templates are asked.
fn repeats_itself(line: &str) -> bool {
    let words: Vec<&str> = syllables::words(line).collect();
    let heavy = |word: &str| word.len() >= 3 && !["the", "and"].contains(&word);
    words
        .iter()
        .enumerate()
        .any(|(i, x)| heavy(x) && words[i + 1..].iter().any(|y| heavy(y) && (x.starts_with(y) || y.starts_with(x))))
}

/// Turns "a" into "an" before a vowel.
fn with_articles(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let mut out = String::with_capacity(line.len() + 2);
    for (index, word) in words.iter().enumerate() {
        if index > 0 {
            out.push(' ');
        }
        out.push_str(word);
        let next = words.get(index + 1).copied().unwrap_or_default();
        if *word == "a" && next.starts_with(['a', 'e', 'i', 'o', 'u']) && !next.starts_with("one") {
            out.push('n');
        }
    }
    out
}

/// A poem on the theme, the same for the same seed on every machine: three lines of 5, 7 and 5 syllables.
///
/// # Panics
/// If `theme.topic` is not an index into [`super::topics`].
pub fn poem(theme: Theme, seed: u64) -> String {
    write(theme, &mut Rng::new(seed))
}

pub(super) fn write(theme: Theme, rng: &mut Rng) -> String {
    let words = lexicon();
    let topic = &words.topics[theme.topic];
    let mut open = theme;
    for attempt in 0.. {
        // A theme that no form can show whole (a noon moon) gives up its time of day first, then its season.
        match attempt {
            400 => open.word = None,
            600 => open.time = None,
            800 => open.season = None,
            _ => {}
        }
        let world = World::choose(open, topic, rng);
        if let Some(text) = (Poet { words, topic, world, rng, subject: None }).attempt(open) {
            return text;
        }
    }
    unreachable!("the loop has no end but a poem")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_poem_scans_and_speaks_of_its_topic() {
        for topic in 0..lexicon().topics.len() {
            for seed in 0..40 {
                let theme = Theme { topic, ..Theme::default() };
                let text = poem(theme, seed);
                assert!(syllables::scan(&text).is_haiku(), "{:?}\n{text}", syllables::scan(&text));
                assert!(lexicon().topics[topic].is_in(&text), "{text}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_poem() {
        let theme = Theme { topic: 3, season: Some(2), ..Theme::default() };
        assert_eq!(poem(theme, 7), poem(theme, 7));
        let distinct: std::collections::HashSet<_> = (0..100).map(|seed| poem(theme, seed)).collect();
        assert!(distinct.len() > 95, "{}", distinct.len());
    }

    #[test]
    fn every_theme_can_be_written() {
        for topic in 0..lexicon().topics.len() {
            for season in 0..4 {
                for time in 0..4 {
                    let mood = Some((topic + season + time) % lexicon().moods.len());
                    let theme = Theme { topic, season: Some(season), time: Some(time), mood, word: None };
                    assert!(syllables::scan(&poem(theme, 1)).is_haiku());
                }
            }
        }
    }

    #[test]
    fn articles_agree_with_the_next_word() {
        assert_eq!(with_articles("a owl, a one-eyed cat, a pine"), "an owl, a one-eyed cat, a pine");
    }
}
