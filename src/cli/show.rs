//! How things of a running house are written for people: sizes, times, phases, events.

use std::fmt::Write as _;
use std::time::Duration;

use playhouse_actors::HouseEvent;
use playhouse_actors::engine::{EngineStats, LoadPhase};
use playhouse_actors::messages::{Phase, ReplicaStatus};
use playhouse_actors::policy::ladder::{Rung, RungCounts};

/// `21.5 GiB`.
pub(crate) fn bytes(n_bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n_bytes as f64;
    let mut unit = "B";
    for larger in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{n_bytes} B") } else { format!("{value:.1} {unit}") }
}

/// `21.5G`, for columns.
pub(crate) fn gib(n_bytes: u64) -> String {
    format!("{:.1}G", n_bytes as f64 / f64::from(1 << 30))
}

/// The two largest units that are not zero: `12ms`, `4.2s`, `3m20s`, `3h01m`, `2d04h`.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..10 => format!("{:.1}s", duration.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Share in percent, rounded down; nothing of nothing is 0.
pub(crate) fn percent(part: u64, whole: u64) -> u64 {
    (u128::from(part) * 100).checked_div(u128::from(whole)).map_or(0, |share| u64::try_from(share).unwrap_or(u64::MAX))
}

/// The KV cache's blocks in use, percent.
pub(crate) fn kv_percent(stats: &EngineStats) -> u64 {
    percent(stats.kv_blocks_used.into(), stats.kv_blocks_total.into())
}

/// What was given up for want of memory: `3 times request refused, 1 time started again with less KV`.
pub(crate) fn given_up(counts: RungCounts) -> Option<String> {
    let one =
        |(rung, times): (Rung, u64)| format!("{times} {} {}", if times == 1 { "time" } else { "times" }, rung.words());
    let all: Vec<String> = counts.taken().map(one).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// The phase, and while it loads how far that has come: `weights 43%`.
pub(crate) fn phase_and_progress(replica: &ReplicaStatus) -> String {
    let Some(progress) = replica.progress.as_ref().filter(|_| replica.phase == Phase::Loading) else {
        return replica.phase.name().to_owned();
    };
    let what = match progress.phase {
        LoadPhase::Open => "opening",
        LoadPhase::Weights => return format!("weights {}%", percent(progress.bytes_done, progress.bytes_total)),
        LoadPhase::Allocate => "allocating",
        LoadPhase::WarmUp => "warming up",
        LoadPhase::Ready => "loaded",
    };
    what.to_owned()
}

/// How often the replica's worker was started again.
pub(crate) fn restarts(replica: &ReplicaStatus) -> u64 {
    replica.incarnation.saturating_sub(1)
}

/// Where the worker is in its step: `12ms` into one, `idle`, or how long it has said nothing.
pub(crate) fn step(replica: &ReplicaStatus) -> String {
    const SILENT: Duration = Duration::from_secs(5);
    match (replica.step_age, replica.last_heard) {
        (_, Some(heard)) if heard > SILENT => format!("silent {}", time(heard)),
        (Some(age), _) => time(age),
        (None, Some(_)) if replica.phase == Phase::Ready => "idle".to_owned(),
        _ => "-".to_owned(),
    }
}

/// A moment in UTC, as RFC 3339 writes it: `2026-11-21T13:05:09.250Z`.
pub(crate) fn timestamp(unix_ms: u64) -> String {
    let (days, ms_of_day) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil_from_days(days);
    let seconds = ms_of_day / 1000;
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms_of_day % 1000)
}

/// The time of day alone: `13:05:09`.
pub(crate) fn time_of_day(unix_ms: u64) -> String {
    timestamp(unix_ms)[11..19].to_owned()
}

/// Year, month and day of a day counted from 1970-01-01 (proleptic Gregorian; the 400-year cycle has 146,097 days).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is their last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// What happened, on one line.
pub(crate) fn event(event: &HouseEvent) -> String {
    match event {
        HouseEvent::WorkerStarted { replica, device, incarnation } => {
            format!("{replica} starts on {device} (start {incarnation})")
        }
        HouseEvent::WorkerReady { replica, after } => format!("{replica} is ready after {}", time(*after)),
        HouseEvent::WorkerEnded { replica, end, in_flight } => {
            format!("{replica}: {end}; {in_flight} requests in flight")
        }
        HouseEvent::RestartScheduled { replica, after, kv_bytes, .. } => {
            let when = if after.is_zero() { "at once".to_owned() } else { format!("in {}", time(*after)) };
            format!("{replica} is started again {when}, with {} for KV", bytes(*kv_bytes))
        }
        HouseEvent::OutOfMemory { replica, device, rung, times } => {
            let times = if *times == 1 { String::new() } else { format!(" ({times} times)") };
            format!("{replica} ran out of memory on {device}: {}{times}", rung.words())
        }
        HouseEvent::Quarantined { device, reason } => format!("{device} is quarantined: {reason}"),
        HouseEvent::Released { device } => format!("{device} is taken back"),
        HouseEvent::ModelFailed { replica, reason } => format!("{replica} cannot be loaded: {reason}"),
        HouseEvent::Health { device, kind } => {
            format!("{} reports {kind:?}", device.as_deref().unwrap_or("the driver"))
        }
        HouseEvent::Resumed { id, emitted, replica } => {
            format!("request {} goes on at token {emitted} on {replica}", id.0)
        }
        HouseEvent::Poisoned { id } => format!("request {} is refused as poison", id.0),
        HouseEvent::ActorRestarted { actor, reason } => format!("actor {actor} failed and is restarted: {reason}"),
        HouseEvent::GaveUp { reason } => format!("gave up: {reason}"),
    }
}

/// A table with aligned columns; numbers to the right, where the heading starts with a space.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].trim_start().len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (column, cell) in cells.into_iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let width = widths[column];
            // Writing to a String does not fail.
            let _ = match headings[column].starts_with(' ') {
                true => write!(text, "{gap}{cell:>width$}"),
                false => write!(text, "{gap}{cell:<width$}"),
            };
        }
        format!("{}\n", text.trim_end())
    };
    let mut text = line(headings.iter().map(|heading| heading.trim_start()).collect());
    rows.iter().for_each(|row| text.push_str(&line(row.iter().map(String::as_str).collect())));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(21 << 30), "21.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(time(Duration::from_millis(12)), "12ms");
        assert_eq!(time(Duration::from_millis(4250)), "4.2s");
        assert_eq!(time(Duration::from_secs(59)), "59s");
        assert_eq!(time(Duration::from_secs(200)), "3m20s");
        assert_eq!(time(Duration::from_secs(3 * 3600 + 62)), "3h01m");
        assert_eq!(time(Duration::from_secs(2 * 86_400 + 4 * 3600)), "2d04h");
        assert_eq!((percent(1, 3), percent(5, 0), percent(u64::MAX, u64::MAX)), (33, 0, 100));
    }

    /// Checked against `date -u -d @SECONDS`.
    #[test]
    fn timestamps_follow_the_calendar() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_399_999), "2000-02-28T23:59:59.999Z");
        assert_eq!(timestamp(951_868_800_000), "2000-03-01T00:00:00.000Z");
        assert_eq!(timestamp(1_709_164_800_000), "2024-02-29T00:00:00.000Z");
        assert_eq!(timestamp(4_102_444_799_000), "2099-12-31T23:59:59.000Z");
        assert_eq!(time_of_day(1_709_164_800_000 + 3_723_000), "01:02:03");
    }

    #[test]
    fn tables_align() {
        let rows = [vec!["a".to_owned(), "10".to_owned()], vec!["long".to_owned(), "9".to_owned()]];
        assert_eq!(table(&["NAME", " N"], &rows), "NAME   N\na     10\nlong   9\n");
    }
}
