//! Puts a screen into a grid of characters.
//!
//! ```text
//! headline, summary
//! devices     name, VRAM bar, utilisation, temperature, power
//! replicas    phase, running, waiting, tokens/s, KV bar, restarts, step     (scrolls with the selection)
//! events      newest first
//! keys
//! ```

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::widgets::{Block, Clear, Widget};

use super::screen::{Bar, DeviceRow, Mood, ReplicaRow, Screen};

/// Lines of the events at the least, their heading included.
const EVENTS_MIN: u16 = 4;

/// The keys, for `?`.
const HELP: &[&str] = &[
    "q, Esc     quit",
    "up, down   move the selection",
    "s          sort replicas: device, model, tokens/s, KV, restarts",
    "p          pause: keep what is shown",
    "?          this help",
    "",
    "TOK/S is measured over the last looks, RST counts restarts,",
    "STEP is how long the step in progress has taken so far.",
];

impl Widget for &Screen {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        Painter { buffer, color: self.color }.screen(self, area);
    }
}

struct Painter<'a> {
    buffer: &'a mut Buffer,
    color: bool,
}

/// Heights of the tables, headings included.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Heights {
    pub(super) devices: u16,
    pub(super) replicas: u16,
    pub(super) events: u16,
}

/// Shares `height` lines. The tables get what they need while the events keep their least; then devices give way first to a
/// third of what there is, then replicas.
pub(super) fn heights(height: u16, n_devices: usize, n_replicas: usize) -> Heights {
    let rows = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).saturating_add(1);
    let for_tables = height.saturating_sub(EVENTS_MIN);
    let replicas_least = rows(n_replicas).min(for_tables / 2);
    let devices = rows(n_devices).min(for_tables - replicas_least);
    let replicas = rows(n_replicas).min(for_tables - devices);
    Heights { devices, replicas, events: height - devices - replicas }
}

impl Painter<'_> {
    fn screen(&mut self, screen: &Screen, area: Rect) {
        if area.height < 3 || area.width == 0 {
            return;
        }
        let line = |y: u16| Rect { y, height: 1, ..area };
        self.put(line(area.y), &screen.headline, self.mood(screen.headline_mood).add_modifier(Modifier::BOLD));
        self.put(line(area.y + 1), &screen.summary, Style::new());
        let heights = heights(area.height - 3, screen.devices.len(), screen.replicas.len());
        let devices = Rect { y: area.y + 2, height: heights.devices, ..area };
        let replicas = Rect { y: devices.bottom(), height: heights.replicas, ..area };
        let events = Rect { y: replicas.bottom(), height: heights.events, ..area };
        self.devices(&screen.devices, devices);
        self.replicas(screen, replicas);
        self.events(&screen.events, events);
        self.put(line(area.bottom() - 1), &screen.footer, Style::new().add_modifier(Modifier::DIM));
        if screen.help {
            self.help(area);
        }
    }

    fn mood(&self, mood: Mood) -> Style {
        match mood {
            _ if !self.color => Style::new(),
            Mood::Plain => Style::new(),
            Mood::Good => Style::new().fg(Color::Green),
            Mood::Busy => Style::new().fg(Color::Yellow),
            Mood::Bad => Style::new().fg(Color::Red),
        }
    }

    /// Writes from the left and cuts off what has no room; returns where it ended.
    fn put(&mut self, area: Rect, text: &str, style: Style) -> u16 {
        if area.width == 0 || area.height == 0 {
            return area.x;
        }
        let (end, _) = self.buffer.set_stringn(area.x, area.y, text, usize::from(area.width), style);
        end
    }

    fn put_right(&mut self, area: Rect, text: &str, style: Style) {
        let width = u16::try_from(text.chars().count()).unwrap_or(u16::MAX).min(area.width);
        self.put(Rect { x: area.right() - width, width, ..area }, text, style);
    }

    /// A heading across the whole line.
    fn heading(&mut self, area: Rect) {
        let style = Style::new().add_modifier(Modifier::REVERSED);
        self.buffer.set_style(Rect { height: 1, ..area }, style);
    }

    /// `[|||||     21.0G/140.0G]`, the label over the right end.
    fn bar(&mut self, area: Rect, bar: Option<&Bar>) {
        let Some(bar) = bar else {
            self.put_right(area, "-", Style::new());
            return;
        };
        if area.width < 3 {
            return;
        }
        let inner = Rect { x: area.x + 1, width: area.width - 2, ..area };
        self.put(area, "[", Style::new());
        self.put(Rect { x: area.right() - 1, width: 1, ..area }, "]", Style::new());
        let mood = match bar.percent {
            0..70 => Mood::Good,
            70..90 => Mood::Busy,
            _ => Mood::Bad,
        };
        let filled = u64::from(inner.width) * bar.percent.min(100) / 100;
        let filled = Rect { width: u16::try_from(filled).unwrap_or(inner.width), ..inner };
        let style = self.mood(mood);
        self.put(filled, &"|".repeat(usize::from(filled.width)), style);
        self.put_right(inner, &bar.label, Style::new());
    }

    fn devices(&mut self, rows: &[DeviceRow], area: Rect) {
        // What is left of the line is for the bar.
        let columns = Columns::new(area, &[12, 18, 0, 5, 5, 6]);
        let mut lines = area.rows();
        let Some(top) = lines.next() else { return };
        for (column, heading) in ["DEVICE", "NAME", "VRAM"].into_iter().enumerate() {
            self.put(columns.cell(column, top), heading, Style::new());
        }
        for (column, heading) in [(3, "UTIL"), (4, "TEMP"), (5, "POWER")] {
            self.put_right(columns.cell(column, top), heading, Style::new());
        }
        self.heading(top);
        for (row, line) in rows.iter().zip(lines) {
            self.put(columns.cell(0, line), &row.id, Style::new());
            let (name, vram) = (columns.cell(1, line), columns.cell(2, line));
            match &row.quarantined {
                Some(reason) => {
                    let both = Rect { width: vram.right() - name.x, ..name };
                    let style = self.mood(Mood::Bad);
                    self.put(both, reason, style);
                }
                None => {
                    self.put(name, &row.name, Style::new());
                    self.bar(vram, row.vram.as_ref());
                }
            }
            for (column, text) in [(3, &row.utilization), (4, &row.temperature), (5, &row.power)] {
                self.put_right(columns.cell(column, line), text, Style::new());
            }
        }
    }

    fn replicas(&mut self, screen: &Screen, area: Rect) {
        let columns = Columns::new(area, &[0, 12, 12, 4, 4, 7, 12, 4, 7]);
        let mut lines = area.rows();
        let Some(top) = lines.next() else { return };
        for (column, heading) in [(0, "REPLICA"), (1, "DEVICE"), (2, "PHASE"), (6, "KV")] {
            self.put(columns.cell(column, top), heading, Style::new());
        }
        for (column, heading) in [(3, "RUN"), (4, "WAIT"), (5, "TOK/S"), (7, "RST"), (8, "STEP")] {
            self.put_right(columns.cell(column, top), heading, Style::new());
        }
        self.heading(top);
        // The selection is always to be seen.
        let n_lines = usize::from(area.height).saturating_sub(1);
        let first = (screen.selected + 1).saturating_sub(n_lines);
        for ((index, row), line) in screen.replicas.iter().enumerate().skip(first).zip(lines) {
            self.replica(row, &columns, line);
            if index == screen.selected {
                self.buffer.set_style(line, Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED));
            }
        }
    }

    fn replica(&mut self, row: &ReplicaRow, columns: &Columns, line: Rect) {
        self.put(columns.cell(0, line), &row.replica, Style::new());
        self.put(columns.cell(1, line), &row.device, Style::new());
        let style = self.mood(row.mood);
        self.put(columns.cell(2, line), &row.phase, style);
        let speed = row.speed.map_or("-".to_owned(), |speed| format!("{speed:.0}"));
        for (column, text) in [(3, &row.running), (4, &row.waiting), (5, &speed)] {
            self.put_right(columns.cell(column, line), text, Style::new());
        }
        self.bar(columns.cell(6, line), row.kv.as_ref());
        self.put_right(columns.cell(7, line), &row.restarts.to_string(), Style::new());
        self.put_right(columns.cell(8, line), &row.step, Style::new());
    }

    fn events(&mut self, events: &[String], area: Rect) {
        let mut lines = area.rows();
        let Some(top) = lines.next() else { return };
        self.put(top, "EVENTS (UTC)", Style::new());
        self.heading(top);
        for (event, line) in events.iter().zip(lines) {
            self.put(line, event, Style::new());
        }
    }

    fn help(&mut self, area: Rect) {
        let widest = HELP.iter().map(|line| line.chars().count()).max().unwrap_or(0);
        let width = u16::try_from(widest + 4).unwrap_or(area.width).min(area.width);
        let height = u16::try_from(HELP.len() + 2).unwrap_or(area.height).min(area.height);
        let (x, y) = (area.x + (area.width - width) / 2, area.y + (area.height - height) / 2);
        let frame = Rect { x, y, width, height };
        Clear.render(frame, self.buffer);
        let block = Block::bordered().title(" keys ");
        let inner = block.inner(frame);
        block.render(frame, self.buffer);
        for (text, line) in HELP.iter().zip(inner.rows()) {
            self.put(Rect { x: line.x + 1, width: line.width.saturating_sub(1), ..line }, text, Style::new());
        }
    }
}

/// Where columns begin and how wide they are, a space apart. One of width 0 takes what the others leave.
struct Columns(Vec<(u16, u16)>);

impl Columns {
    fn new(area: Rect, widths: &[u16]) -> Self {
        let gaps = u16::try_from(widths.len().saturating_sub(1)).unwrap_or(0);
        let left = area.width.saturating_sub(widths.iter().sum::<u16>() + gaps);
        let mut x = area.x;
        let mut cells = Vec::new();
        for width in widths {
            let width = if *width == 0 { left } else { *width };
            // On a line that is too short, the last columns have no room at all.
            cells.push((x, width.min(area.right().saturating_sub(x))));
            x = x.saturating_add(width + 1).min(area.right());
        }
        Self(cells)
    }

    fn cell(&self, column: usize, line: Rect) -> Rect {
        let (x, width) = self.0[column];
        Rect { x, width, ..line }
    }
}
