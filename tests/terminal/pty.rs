//! A terminal for tests: a pseudo-terminal, the program on it, and the screen that a person would see.

use super::screen::Screen;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Nothing in these tests takes longer on a machine that is not stuck.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A program on a terminal of its own. Dropped, it is killed.
pub(crate) struct Terminal {
    keyboard: OwnedFd,
    /// Held, so that what the program wrote last can be read when it has ended, and the settings that it left be seen.
    _line: OwnedFd,
    child: Child,
    pub(crate) screen: Screen,
    /// What it was set to before the program ran.
    before: Termios,
}

impl Terminal {
    /// Runs a program on a new terminal of so many columns and rows.
    pub(crate) fn run(mut command: Command, columns: u16, rows: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keyboard = openpt(flags).expect("the system has pseudo-terminals");
        grantpt(&keyboard).and_then(|()| unlockpt(&keyboard)).expect("it is ours");
        let line = ioctl_tiocgptpeer(&keyboard, flags).expect("its other end");
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&line, size).expect("settable");
        let before = tcgetattr(&line).expect("a terminal has settings");
        let stdio = || Stdio::from(line.try_clone().expect("a descriptor"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio()).env("TERM", "xterm-256color");
        // SAFETY: between fork and exec: two system calls, no allocation, no lock.
        unsafe {
            command.pre_exec(|| {
                // Of a session of its own, whose terminal this is: else Ctrl-C would be a character like others.
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().expect("the program starts");
        let screen = Screen::new(usize::from(columns), usize::from(rows));
        Self { keyboard, _line: line, child, screen, before }
    }

    /// Presses keys.
    pub(crate) fn press(&self, keys: &str) {
        let mut bytes = keys.as_bytes();
        while !bytes.is_empty() {
            let n = rustix::io::write(&self.keyboard, bytes).expect("the terminal takes keys");
            bytes = &bytes[n..];
        }
    }

    /// Reads what the program writes for at most so long. Whether there was anything.
    fn look(&mut self, wait: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.keyboard.as_fd(), PollFlags::IN)];
        let wait = wait.try_into().expect("representable");
        if !matches!(poll(&mut fds, Some(&wait)), Ok(1)) {
            return false;
        }
        let mut bytes = [0; 4096];
        let n = rustix::io::read(&self.keyboard, &mut bytes).unwrap_or(0);
        let answers = self.screen.feed(&bytes[..n]);
        self.press(&answers);
        n > 0
    }

    /// Waits until the screen is as it should be.
    pub(crate) fn until(&mut self, what: &str, wanted: impl Fn(&Screen) -> bool) {
        let begun = Instant::now();
        while !wanted(&self.screen) {
            let left = DEADLINE.checked_sub(begun.elapsed());
            let is_seen = left.is_some_and(|left| self.look(left));
            assert!(is_seen || wanted(&self.screen), "never {what}:\n{}", self.screen.text());
        }
    }

    /// Waits for the end of the program; reads meanwhile, for it may wait to be read.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                break status;
            }
            assert!(begun.elapsed() < DEADLINE, "it does not end:\n{}", self.screen.text());
            self.look(Duration::from_millis(20));
        };
        while self.look(Duration::ZERO) {}
        status
    }

    /// Checks that the terminal is as it was: its settings, the ordinary screen, a cursor that can be seen.
    pub(crate) fn is_restored(&self) {
        let after = tcgetattr(&self.keyboard).expect("a terminal has settings");
        let modes = |t: &Termios| (t.input_modes, t.output_modes, t.local_modes, t.control_modes);
        assert_eq!(modes(&after), modes(&self.before), "its settings");
        assert!(!self.screen.is_alternate, "the ordinary screen is back");
        assert!(self.screen.has_cursor, "the cursor can be seen");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}
