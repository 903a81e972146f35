//! English inflection of the verbs in the lexicon: "carry the moon off" becomes "carries" and "carrying the moon off".

/// Verbs of two syllables, stressed on the second, that double their last consonant.
const DOUBLING: &[&str] = &["begin", "forget"];

fn is_vowel(c: char) -> bool {
    "aeiou".contains(c)
}

/// Splits a verb phrase into its first word and the rest, the space included.
fn first_word(phrase: &str) -> (&str, &str) {
    phrase.split_at(phrase.find([' ', ',']).unwrap_or(phrase.len()))
}

/// The third person singular of a verb phrase: "try all the doors" -> "tries all the doors".
///
/// A second verb after ", but" or "and" stays with the first: "lift and look" is written as two entries instead.
pub(super) fn third_person(phrase: &str) -> String {
    let (verb, rest) = first_word(phrase);
    if verb == "have" {
        return format!("has{rest}");
    }
    let stem = verb.strip_suffix('y').filter(|stem| !stem.ends_with(is_vowel));
    match stem {
        Some(stem) => format!("{stem}ies{rest}"),
        None if ["s", "x", "z", "ch", "sh", "o"].iter().any(|end| verb.ends_with(end)) => format!("{verb}es{rest}"),
        None => format!("{verb}s{rest}"),
    }
}

/// The present participle of a verb phrase: "sit without talking" -> "sitting without talking".
pub(super) fn participle(phrase: &str) -> String {
    let (verb, rest) = first_word(phrase);
    if let Some(stem) = verb.strip_suffix("ie") {
        return format!("{stem}ying{rest}");
    }
    if let Some(stem) = verb.strip_suffix('e').filter(|stem| !stem.ends_with(['e', 'o', 'y'])) {
        return format!("{stem}ing{rest}");
    }
    let double = if doubles(verb) { verb.chars().last() } else { None };
    format!("{verb}{}ing{rest}", double.map(String::from).unwrap_or_default())
}

/// Whether the last consonant is doubled: one vowel before it, one syllable ("drip", not "drift", "rain" or "open").
fn doubles(verb: &str) -> bool {
    if DOUBLING.contains(&verb) {
        return true;
    }
    let letters: Vec<char> = verb.replace("qu", "q").chars().collect();
    let n_vowels = letters.iter().filter(|&&c| is_vowel(c)).count();
    match letters[..] {
        [.., before, vowel, last] => {
            n_vowels == 1 && !is_vowel(before) && is_vowel(vowel) && !is_vowel(last) && !['w', 'x', 'y'].contains(&last)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bare: &str, third: &str, ing: &str) {
        assert_eq!(third_person(bare), third);
        assert_eq!(participle(bare), ing);
    }

    #[test]
    fn inflects_the_first_word() {
        check("rise", "rises", "rising");
        check("drip", "drips", "dripping");
        check("quit", "quits", "quitting");
        check("rain", "rains", "raining");
        check("open", "opens", "opening");
        check("begin", "begins", "beginning");
        check("lie still", "lies still", "lying still");
        check("carry the moon off", "carries the moon off", "carrying the moon off");
        check("say it again", "says it again", "saying it again");
        check("have no words for it", "has no words for it", "having no words for it");
        check("go on", "goes on", "going on");
        check("splash", "splashes", "splashing");
        check("climb, but slowly", "climbs, but slowly", "climbing, but slowly");
        check("tug at the whole sky", "tugs at the whole sky", "tugging at the whole sky");
    }
}
