//! What is wrong with a configuration, and where: source, line, column, the text underlined, and what to write instead.

use crate::source::{Place, Sources};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file was read and is not right. Every problem found is listed.
    #[error("{}", render_all(diagnostics))]
    Invalid {
        /// What is wrong, in the order of the text.
        diagnostics: Vec<Diagnostic>,
    },
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong: lower case, no final stop.
    pub message: String,
    /// Where.
    pub place: Place,
    /// Another place that matters, and what it has to do with it.
    pub related: Option<(String, Place)>,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// Shows stars for the letters and digits of the values in its lines: they are secrets.
    pub(crate) fn hide_values(&mut self) {
        let related = self.related.as_mut().map(|(_, place)| place);
        for place in related.into_iter().chain([&mut self.place]) {
            let key_len = place.line_text.find('=').unwrap_or(0);
            let (key, value) = place.line_text.split_at(key_len);
            let stars = value.replace(|c: char| c.is_alphanumeric(), "*");
            place.line_text = format!("{key}{stars}");
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.message)?;
        write_place(f, "-->", &self.place, None)?;
        if let Some((why, place)) = &self.related {
            write_place(f, ":::", place, Some(why))?;
        }
        if let Some(help) = &self.help {
            let gutter = self.place.line.to_string().len();
            writeln!(f, "{:gutter$} = help: {help}", "")?;
        }
        Ok(())
    }
}

fn write_place(f: &mut fmt::Formatter<'_>, arrow: &str, place: &Place, why: Option<&str>) -> fmt::Result {
    let gutter = place.line.to_string().len();
    let text = place.line_text.replace('\t', " ");
    let marks = "^".repeat(place.width);
    let why = why.map_or(String::new(), |why| format!(" {why}"));
    writeln!(f, "{:gutter$}{arrow} {}:{}:{}", "", place.source, place.line, place.column)?;
    writeln!(f, "{:gutter$} |", "")?;
    writeln!(f, "{} | {text}", place.line)?;
    writeln!(f, "{:gutter$} | {:indent$}{marks}{why}", "", "", indent = place.column - 1)
}

fn render_all(diagnostics: &[Diagnostic]) -> String {
    let texts: Vec<String> = diagnostics.iter().map(Diagnostic::to_string).collect();
    texts.join("\n").trim_end().to_owned()
}

/// Collects problems while the rest is read on.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) sources: Sources,
    found: Vec<(usize, Diagnostic)>,
}

impl Report {
    pub(crate) fn new(sources: Sources) -> Self {
        Self { sources, found: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Adds a problem at `span`.
    pub(crate) fn add(&mut self, span: Range<usize>, message: impl Into<String>) -> &mut Diagnostic {
        let place = self.sources.place(span.clone());
        self.found.push((span.start, Diagnostic { message: message.into(), place, related: None, help: None }));
        let last = self.found.len() - 1;
        &mut self.found[last].1
    }

    /// Adds a problem that has to do with another place.
    pub(crate) fn add_related(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        related: Range<usize>,
        why: &str,
    ) -> &mut Diagnostic {
        let place = self.sources.place(related);
        let diagnostic = self.add(span, message);
        diagnostic.related = Some((why.to_owned(), place));
        diagnostic
    }

    /// `value` if nothing was wrong.
    pub(crate) fn finish<T>(mut self, value: Option<T>) -> Result<T, ConfigError> {
        match value {
            Some(value) if self.found.is_empty() => Ok(value),
            _ => {
                self.found.sort_by_key(|(start, _)| *start);
                // A default that is wrong is wrong for every model that has it; it is said once.
                self.found.dedup();
                Err(ConfigError::Invalid { diagnostics: self.found.into_iter().map(|(_, found)| found).collect() })
            }
        }
    }
}

/// The candidate that `found` was probably meant to be: the nearest one, if it is near.
pub(crate) fn did_you_mean<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let lower = found.to_ascii_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&lower, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| format!("did you mean `{candidate}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_near_or_none() {
        let keys = ["address", "api_keys", "drain"];
        assert_eq!(did_you_mean("adress", keys).as_deref(), Some("did you mean `address`?"));
        assert_eq!(did_you_mean("apikeys", keys).as_deref(), Some("did you mean `api_keys`?"));
        assert_eq!(did_you_mean("colour", keys), None);
    }
}
