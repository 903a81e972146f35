//! `strftime` for templates: a moment in UTC, written by Python's directives.
//!
//! UTC and not the machine's zone, so that the same conversation renders the same on every box.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment in the Gregorian calendar, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moment {
    year: i64,
    /// 1 to 12.
    month: u32,
    /// 1 to 31.
    day: u32,
    /// 1 to 366.
    day_of_year: u32,
    /// 0 is Sunday.
    weekday: u32,
    hour: u32,
    minute: u32,
    second: u32,
    micros: u32,
    unix_s: i64,
}

impl Moment {
    fn new(time: SystemTime) -> Moment {
        let (unix_s, micros) = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => (after.as_secs() as i64, after.subsec_micros()),
            Err(before) => (-(before.duration().as_secs_f64().ceil() as i64), 0),
        };
        let (days, of_day) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400) as u32);
        let (year, month, day) = civil(days);
        let day_of_year = (days - days_before_year(year)) as u32 + 1;
        let weekday = (days + 4).rem_euclid(7) as u32;
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        Moment { year, month, day, day_of_year, weekday, hour, minute, second, micros, unix_s }
    }

    fn hour12(&self) -> u32 {
        (self.hour + 11) % 12 + 1
    }

    /// The week of the year whose weeks begin on `first` (0 is Sunday); days before the first such day are week 0.
    fn week(&self, first: u32) -> u32 {
        (self.day_of_year + 6 - (self.weekday + 7 - first) % 7) / 7
    }

    /// The ISO 8601 year and week.
    fn iso_week(&self) -> (i64, u32) {
        let weekday = i64::from((self.weekday + 6) % 7);
        let thursday = i64::from(self.day_of_year) - 1 - weekday + 3;
        let days = days_before_year(self.year) + thursday;
        let (year, ..) = civil(days);
        (year, ((days - days_before_year(year)) / 7 + 1) as u32)
    }
}

/// Days since 1970-01-01 to (year, month, day), by counting in 400-year eras that begin on 1 March.
fn civil(days: i64) -> (i64, u32, u32) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = (of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
    let month = (if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 }) as u32;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to 1 January of `year`.
fn days_before_year(year: i64) -> i64 {
    let before = year - 1;
    before * 365 + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400) - 719_162
}

/// Writes `time` as `format` says. Directives that do not exist are written as they stand, as glibc does.
pub(super) fn strftime(format: &str, time: SystemTime) -> String {
    let moment = Moment::new(time);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let flag = directive.filter(|c| matches!(c, '-' | '_' | '0'));
        if flag.is_some() {
            directive = chars.next();
        }
        match directive.and_then(|d| field(&moment, d)) {
            Some(text) => out.push_str(&pad(text, flag)),
            None => out.extend(['%'].into_iter().chain(flag).chain(directive)),
        }
    }
    out
}

/// Applies glibc's padding flags to a field that is a padded number.
fn pad(text: String, flag: Option<char>) -> String {
    let (Some(flag), true) = (flag, text.len() > 1 && text.bytes().all(|b| b.is_ascii_digit() || b == b' ')) else {
        return text;
    };
    let digits = text.trim_start_matches(['0', ' ']);
    let digits = if digits.is_empty() { "0" } else { digits };
    match flag {
        '-' => digits.to_owned(),
        '_' => format!("{digits:>width$}", width = text.len()),
        _ => format!("{digits:0>width$}", width = text.len()),
    }
}

fn field(m: &Moment, directive: char) -> Option<String> {
    let day_name = DAYS[m.weekday as usize];
    let month_name = MONTHS[m.month as usize - 1];
    let am_pm = if m.hour < 12 { "AM" } else { "PM" };
    let (iso_year, iso_week) = m.iso_week();
    Some(match directive {
        'a' => day_name[..3].into(),
        'A' => day_name.into(),
        'w' => m.weekday.to_string(),
        'u' => ((m.weekday + 6) % 7 + 1).to_string(),
        'd' => format!("{:02}", m.day),
        'e' => format!("{:2}", m.day),
        'b' | 'h' => month_name[..3].into(),
        'B' => month_name.into(),
        'm' => format!("{:02}", m.month),
        'y' => format!("{:02}", m.year.rem_euclid(100)),
        'Y' => m.year.to_string(),
        'C' => format!("{:02}", m.year.div_euclid(100)),
        'G' => iso_year.to_string(),
        'g' => format!("{:02}", iso_year.rem_euclid(100)),
        'V' => format!("{iso_week:02}"),
        'U' => format!("{:02}", m.week(0)),
        'W' => format!("{:02}", m.week(1)),
        'j' => format!("{:03}", m.day_of_year),
        'H' => format!("{:02}", m.hour),
        'k' => format!("{:2}", m.hour),
        'I' => format!("{:02}", m.hour12()),
        'l' => format!("{:2}", m.hour12()),
        'p' => am_pm.into(),
        'P' => am_pm.to_lowercase(),
        'M' => format!("{:02}", m.minute),
        'S' => format!("{:02}", m.second),
        'f' => format!("{:06}", m.micros),
        's' => m.unix_s.to_string(),
        // Python's clock here is naive: it has no zone to write.
        'z' | 'Z' => String::new(),
        'D' | 'x' => format!("{:02}/{:02}/{:02}", m.month, m.day, m.year.rem_euclid(100)),
        'F' => format!("{}-{:02}-{:02}", m.year, m.month, m.day),
        'T' | 'X' => format!("{:02}:{:02}:{:02}", m.hour, m.minute, m.second),
        'R' => format!("{:02}:{:02}", m.hour, m.minute),
        'r' => format!("{:02}:{:02}:{:02} {am_pm}", m.hour12(), m.minute, m.second),
        'c' => format!(
            "{} {} {:2} {:02}:{:02}:{:02} {}",
            &day_name[..3],
            &month_name[..3],
            m.day,
            m.hour,
            m.minute,
            m.second,
            m.year
        ),
        'n' => "\n".into(),
        't' => "\t".into(),
        '%' => "%".into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(unix_s: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(unix_s))
    }

    #[test]
    fn the_formats_that_templates_use() {
        let moment = 1_795_264_496; // 2026-11-21 12:34:56
        assert_eq!(at(moment, "%Y-%m-%d"), "2026-11-21");
        assert_eq!(at(moment, "%d %b %Y"), "21 Nov 2026");
        assert_eq!(at(moment, "%A, %B %-d, %Y"), "Saturday, November 21, 2026");
        assert_eq!(at(moment, "%H:%M:%S %I%p %j %U %W %V %G %u%w"), "12:34:56 12PM 325 46 46 47 2026 66");
        assert_eq!(at(moment, "%c|%x|%X|%%|%Q|%-Q|%"), "Sat Nov 21 12:34:56 2026|11/21/26|12:34:56|%|%Q|%-Q|%");
    }

    #[test]
    fn edges_of_the_calendar() {
        assert_eq!(at(0, "%F %T %a"), "1970-01-01 00:00:00 Thu");
        assert_eq!(at(951_782_400, "%F %j"), "2000-02-29 060");
        assert_eq!(at(1_230_768_000, "%F %G-W%V %U %W"), "2009-01-01 2009-W01 00 00");
        assert_eq!(at(1_262_304_000, "%F %G-W%V"), "2010-01-01 2009-W53");
        assert_eq!(at(1_704_067_200, "%F %-j %_d %-I"), "2024-01-01 1  1 12");
        assert_eq!(strftime("%F %T", UNIX_EPOCH - Duration::from_secs(1)), "1969-12-31 23:59:59");
    }
}
