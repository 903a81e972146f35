//! What a terminal shows after some bytes: the part of ECMA-48 and xterm's additions that our programs use. Colours are
//! read and forgotten; what is not known is skipped as a whole.

/// A screen of single-width characters.
pub(crate) struct Screen {
    cells: Vec<Vec<char>>,
    column: usize,
    row: usize,
    pub(crate) is_alternate: bool,
    pub(crate) has_cursor: bool,
    /// Bytes of a sequence or character that is not complete yet.
    pending: Vec<u8>,
}

impl Screen {
    pub(crate) fn new(columns: usize, rows: usize) -> Self {
        let cells = vec![vec![' '; columns]; rows];
        Self { cells, column: 0, row: 0, is_alternate: false, has_cursor: true, pending: Vec::new() }
    }

    /// The lines, without the spaces at their ends.
    pub(crate) fn text(&self) -> String {
        self.cells.iter().map(|row| format!("{}\n", row.iter().collect::<String>().trim_end())).collect()
    }

    pub(crate) fn shows(&self, words: &str) -> bool {
        self.text().contains(words)
    }

    /// Shows these bytes; gives back what the terminal answers to questions among them.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> String {
        let mut answers = String::new();
        self.pending.extend_from_slice(bytes);
        let all = std::mem::take(&mut self.pending);
        let mut rest = all.as_slice();
        while let Some(n) = self.one(rest, &mut answers) {
            rest = &rest[n..];
        }
        self.pending = rest.to_vec();
        answers
    }

    /// Handles one character or sequence; how many bytes it had, or nothing if it is not complete.
    fn one(&mut self, bytes: &[u8], answers: &mut String) -> Option<usize> {
        match bytes {
            [] | [0x1b] => None,
            [0x1b, b'[', ..] => {
                let end = bytes.iter().skip(2).position(|byte| (0x40..=0x7e).contains(byte))? + 2;
                let parameters = String::from_utf8_lossy(&bytes[2..end]).into_owned();
                self.control(&parameters, bytes[end], answers);
                Some(end + 1)
            }
            // A title and the like, up to BEL or ST.
            [0x1b, b']', ..] => {
                let bell = bytes.iter().position(|byte| *byte == 7).map(|at| at + 1);
                bell.or_else(|| bytes.windows(2).position(|pair| pair == b"\x1b\\").map(|at| at + 2))
            }
            [0x1b, b'(' | b')', ..] => (bytes.len() > 2).then_some(3),
            [0x1b, ..] => Some(2),
            [b'\r', ..] => Some(self.moved(0, self.row)),
            [b'\n', ..] => Some(self.line_feed()),
            [8, ..] => Some(self.moved(self.column.saturating_sub(1), self.row)),
            [byte, ..] if *byte < 0x20 => Some(1),
            _ => self.character(bytes),
        }
    }

    fn moved(&mut self, column: usize, row: usize) -> usize {
        (self.column, self.row) = (column.min(self.cells[0].len() - 1), row.min(self.cells.len() - 1));
        1
    }

    fn line_feed(&mut self) -> usize {
        if self.row + 1 == self.cells.len() {
            let width = self.cells[0].len();
            self.cells.remove(0);
            self.cells.push(vec![' '; width]);
        } else {
            self.row += 1;
        }
        1
    }

    fn character(&mut self, bytes: &[u8]) -> Option<usize> {
        let len = match bytes[0] {
            0x00..=0x7f => 1,
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            _ => 4,
        };
        let text = String::from_utf8_lossy(bytes.get(..len)?).into_owned();
        if self.column == self.cells[0].len() {
            self.column = 0;
            self.line_feed();
        }
        self.cells[self.row][self.column] = text.chars().next().unwrap_or(' ');
        self.column += 1;
        Some(len)
    }

    fn control(&mut self, parameters: &str, last: u8, answers: &mut String) {
        let number = |index: usize, default: usize| {
            parameters.split(';').nth(index).and_then(|text| text.parse().ok()).filter(|n| *n > 0).unwrap_or(default)
        };
        let (first, column, row) = (number(0, 1), self.column, self.row);
        match (parameters, last) {
            ("?1049", b'h' | b'l') => {
                self.is_alternate = last == b'h';
                self.erase(0..self.cells.len());
            }
            ("?25", b'h' | b'l') => self.has_cursor = last == b'h',
            ("6", b'n') => answers.push_str(&format!("\x1b[{};{}R", row + 1, column + 1)),
            (_, b'H' | b'f') => drop(self.moved(number(1, 1) - 1, first - 1)),
            (_, b'G') => drop(self.moved(first - 1, row)),
            (_, b'd') => drop(self.moved(column, first - 1)),
            (_, b'A') => drop(self.moved(column, row.saturating_sub(first))),
            (_, b'B') => drop(self.moved(column, row + first)),
            (_, b'C') => drop(self.moved(column + first, row)),
            (_, b'D') => drop(self.moved(column.saturating_sub(first), row)),
            ("2" | "3", b'J') => self.erase(0..self.cells.len()),
            ("" | "0", b'J') => {
                self.cells[row][column..].fill(' ');
                self.erase(row + 1..self.cells.len());
            }
            ("" | "0", b'K') => self.cells[row][column..].fill(' '),
            ("2", b'K') => self.erase(row..row + 1),
            _ => {}
        }
    }

    fn erase(&mut self, rows: std::ops::Range<usize>) {
        self.cells[rows].iter_mut().for_each(|row| row.fill(' '));
    }
}

#[test]
fn a_screen_shows_what_a_terminal_would() {
    let mut screen = Screen::new(10, 3);
    assert_eq!(screen.feed(b"one\r\ntwo\x1b[1;5Hfour\x1b[31mX"), "");
    assert_eq!(screen.text(), "one fourX\ntwo\n\n");
    assert_eq!(screen.feed(b"\x1b[2;2H\x1b[K\x1b[6n"), "\x1b[2;2R");
    assert_eq!(screen.text(), "one fourX\nt\n\n");
    // In two pieces, within a sequence and within a character.
    screen.feed(b"\x1b[3;");
    screen.feed(b"1H\xe2\x94");
    screen.feed(b"\x80\n\n");
    assert_eq!(screen.text(), "\u{2500}\n\n\n", "it scrolls");
    screen.feed(b"\x1b[?1049h\x1b[?25l");
    assert!(screen.is_alternate && !screen.has_cursor && !screen.shows("\u{2500}"));
}
