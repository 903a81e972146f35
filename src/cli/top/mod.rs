//! `playhouse top`: a running host, live, in the manner of htop.
//!
//! ```text
//! sampler thread ─ Sample ─┐
//!                          ├─► App (samples, keys) ─► Screen (what is to be seen) ─► draw ─► terminal
//! input thread ── keys ────┘
//! ```
//!
//! What is drawn is a function of a [`screen::Screen`], and that is a function of two samples and the keys pressed so far: both
//! are tested without a terminal.

mod sample;
mod screen;
mod draw;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

use crossbeam_channel::Sender;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;
use ratatui::widgets::Widget;

use self::sample::Sample;
use self::screen::{Controls, Screen};
use super::socket::SocketArgs;
use super::{CliError, Exit, RunCommand};

/// Samples that are kept: speeds are measured over them, because workers tell their counters once a heartbeat only.
const SAMPLES_MAX: usize = 4;

/// The frame of `--once` where the terminal's size is not known.
const ONCE_SIZE: (u16, u16) = (80, 24);

/// The arguments of `top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Time between two looks
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,
    /// Print one frame as text and end; needs no terminal
    #[arg(long)]
    once: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = playhouse_config::units::parse_duration(text).map_err(|error| error.to_string())?;
    let allowed = Duration::from_millis(100)..=Duration::from_secs(3600);
    if allowed.contains(&interval) { Ok(interval) } else { Err("expected 100ms to 1h".to_owned()) }
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        if self.once {
            return self.print_once();
        }
        if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
            return Err(CliError::usage("top needs a terminal; `playhouse top --once` prints one frame as text"));
        }
        // A host that is not there is said before the screen is taken over.
        let first = Sample::take(&self.socket)?;
        self.live(first)
    }
}

/// What the threads tell the screen.
enum News {
    Sample(Box<Result<Sample, String>>),
    Key(KeyEvent),
    Resized,
    /// The terminal is gone.
    Closed,
}

impl Args {
    fn print_once(&self) -> Result<(), CliError> {
        let mut app = App::new(Sample::take(&self.socket)?, false);
        // Speeds need two looks.
        let _ = crossbeam_channel::after(self.interval).recv();
        app.add(Sample::take(&self.socket)?);
        let (width, height) = ratatui::crossterm::terminal::size().unwrap_or(ONCE_SIZE);
        super::print(&text(&app.screen(), Rect::new(0, 0, width.max(ONCE_SIZE.0), height.max(ONCE_SIZE.1))))
    }

    fn live(&self, first: Sample) -> Result<(), CliError> {
        let (news, received) = crossbeam_channel::bounded(16);
        self.spawn_sampler(news.clone());
        spawn_input(news);
        let terminal_error = |error: std::io::Error| CliError::new(Exit::Software, error);
        let mut terminal = ratatui::try_init().map_err(terminal_error)?;
        let mut app = App::new(first, std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()));
        let result = loop {
            let screen = app.screen();
            if let Err(error) = terminal.draw(|frame| frame.render_widget(&screen, frame.area())) {
                break Err(terminal_error(error));
            }
            match received.recv() {
                Ok(News::Sample(sample)) => app.sampled(*sample),
                Ok(News::Key(key)) if app.press(key) => {}
                Ok(News::Resized) => {}
                Ok(News::Key(_) | News::Closed) | Err(_) => break Ok(()),
            }
        };
        ratatui::restore();
        result
    }

    fn spawn_sampler(&self, news: Sender<News>) {
        let (socket, ticks) = (self.socket.clone(), crossbeam_channel::tick(self.interval));
        std::thread::spawn(move || {
            while ticks.recv().is_ok() {
                let sample = Sample::take(&socket).map_err(|error| error.chain());
                if news.send(News::Sample(Box::new(sample))).is_err() {
                    return;
                }
            }
        });
    }
}

fn spawn_input(news: Sender<News>) {
    std::thread::spawn(move || {
        loop {
            let told = match event::read() {
                Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => news.send(News::Key(key)),
                Ok(Event::Resize(..)) => news.send(News::Resized),
                Ok(_) => Ok(()),
                Err(_) => {
                    // The screen may have ended already.
                    let _ = news.send(News::Closed);
                    return;
                }
            };
            if told.is_err() {
                return;
            }
        }
    });
}

/// What was seen and what was pressed.
struct App {
    samples: VecDeque<Sample>,
    controls: Controls,
    /// Why the last look failed, if it did.
    error: Option<String>,
}

impl App {
    fn new(first: Sample, color: bool) -> Self {
        Self { samples: VecDeque::from([first]), controls: Controls::new(color), error: None }
    }

    fn sampled(&mut self, sample: Result<Sample, String>) {
        if self.controls.paused {
            return;
        }
        match sample {
            Ok(sample) => {
                self.error = None;
                self.add(sample);
            }
            Err(error) => self.error = Some(error),
        }
    }

    fn add(&mut self, sample: Sample) {
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// Handles a key; false ends the program.
    fn press(&mut self, key: KeyEvent) -> bool {
        let n_rows = self.samples.back().map_or(0, |sample| sample.house.replicas().count());
        let last = n_rows.saturating_sub(1);
        let controls = &mut self.controls;
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('q') => return false,
            KeyCode::Esc if !controls.help => return false,
            KeyCode::Esc => controls.help = false,
            KeyCode::Char('?' | 'h') => controls.help = !controls.help,
            KeyCode::Char('p') => controls.paused = !controls.paused,
            KeyCode::Char('s') => controls.sort = controls.sort.next(),
            KeyCode::Up => controls.selected = controls.selected.saturating_sub(1),
            KeyCode::Down => controls.selected = controls.selected.saturating_add(1),
            KeyCode::PageUp => controls.selected = controls.selected.saturating_sub(10),
            KeyCode::PageDown => controls.selected = controls.selected.saturating_add(10),
            KeyCode::Home => controls.selected = 0,
            KeyCode::End => controls.selected = last,
            _ => {}
        }
        controls.selected = controls.selected.min(last);
        true
    }

    fn screen(&self) -> Screen {
        // There is always the first.
        let newest = &self.samples[self.samples.len() - 1];
        let oldest = &self.samples[0];
        Screen::new(oldest, newest, &self.controls, self.error.as_deref())
    }
}

/// A screen as lines of text.
fn text(screen: &Screen, area: Rect) -> String {
    let mut buffer = Buffer::empty(area);
    screen.render(area, &mut buffer);
    let mut text = String::new();
    for y in area.top()..area.bottom() {
        let line: String = (area.left()..area.right()).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
