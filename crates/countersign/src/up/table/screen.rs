//! The terminal: raw mode and alternate screen, restored in every case.

use std::io::{self, Stdout, Write, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::terminal::{
    self, Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use crossterm::{execute, queue};
use tokio::sync::mpsc;

use super::render::{Style, frame};
use super::view::View;

/// Longest time until the thread that reads keys notices that the screen is closed.
const LOOK: Duration = Duration::from_millis(200);
/// Most keys that wait to be handled; further ones are dropped.
const KEYS: usize = 64;

/// An input of the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Show other rows.
    Scroll(Way),
    /// Redraw, because the window has changed.
    Redraw,
    /// Stop the mesh.
    Stop,
}

/// A direction of scrolling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One row up.
    Up,
    /// One row down.
    Down,
    /// One page up.
    PageUp,
    /// One page down.
    PageDown,
    /// To the first row.
    First,
    /// To the last row.
    Last,
}

impl Way {
    /// The new first row, from the current one. May be beyond the last row: the frame limits it.
    pub fn from(self, scroll: usize, page: usize) -> usize {
        match self {
            Self::Up => scroll.saturating_sub(1),
            Self::Down => scroll.saturating_add(1),
            Self::PageUp => scroll.saturating_sub(page),
            Self::PageDown => scroll.saturating_add(page),
            Self::First => 0,
            Self::Last => usize::MAX,
        }
    }
}

/// The terminal while the table is shown.
pub struct Screen {
    out: Stdout,
    keys: mpsc::Receiver<Input>,
    gone: Arc<AtomicBool>,
}

impl Screen {
    /// Takes over the terminal.
    pub fn open() -> io::Result<Self> {
        enable_raw_mode()?;
        let mut out = stdout();
        // The alternate screen, so that the previous content reappears afterwards.
        if let Err(error) = execute!(out, EnterAlternateScreen, Hide) {
            let _ = disable_raw_mode();
            return Err(error);
        }
        let gone = Arc::<AtomicBool>::default();
        let (tx, keys) = mpsc::channel(KEYS);
        // On its own thread, because reading a terminal blocks. It ends within LOOK after the screen is closed.
        std::thread::spawn({
            let gone = gone.clone();
            move || read_keys(&tx, &gone)
        });
        Ok(Self { out, keys, gone })
    }

    /// The next input; `None` if the terminal is gone.
    pub async fn input(&mut self) -> Option<Input> {
        self.keys.recv().await
    }

    /// Draws a view, limits `scroll` to the last row, and returns the number of rows of a page.
    pub fn draw(&mut self, view: &View, scroll: &mut usize) -> io::Result<usize> {
        let (width, height) = terminal::size()?;
        let frame = frame(view, width.into(), height.into(), *scroll);
        *scroll = frame.scroll;
        for (row, line) in (0u16..).zip(&frame.lines) {
            queue!(self.out, MoveTo(0, row))?;
            match line.style {
                Style::Plain => {}
                Style::Head => queue!(self.out, SetAttribute(Attribute::Bold))?,
                Style::Bad => queue!(self.out, SetForegroundColor(Color::Red))?,
                Style::Dim => queue!(self.out, SetAttribute(Attribute::Dim))?,
            }
            queue!(self.out, Print(&line.text), SetForegroundColor(Color::Reset), SetAttribute(Attribute::Reset))?;
            // After a full line the cursor is behind its last cell, where clearing would erase that cell.
            if line.text.chars().count() < usize::from(width) {
                queue!(self.out, Clear(ClearType::UntilNewLine))?;
            }
        }
        if frame.lines.len() < usize::from(height) {
            let below = u16::try_from(frame.lines.len()).unwrap_or(height);
            queue!(self.out, MoveTo(0, below), Clear(ClearType::FromCursorDown))?;
        }
        self.out.flush()?;
        Ok(frame.page)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        let _ = execute!(self.out, LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

fn read_keys(to: &mpsc::Sender<Input>, gone: &AtomicBool) {
    while !gone.load(Ordering::Relaxed) {
        let input = match event::poll(LOOK) {
            Ok(false) => continue,
            Ok(true) => event::read().map(|e| meaning(&e)),
            Err(error) => Err(error),
        };
        match input {
            Ok(Some(Input::Stop)) => {
                let _ = to.blocking_send(Input::Stop);
            }
            Ok(Some(input)) => {
                let _ = to.try_send(input);
            }
            Ok(None) => {}
            // The terminal is gone; dropping the sender reports it.
            Err(_) => return,
        }
    }
}

fn meaning(event: &Event) -> Option<Input> {
    let key = match event {
        Event::Resize(..) => return Some(Input::Redraw),
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        _ => return None,
    };
    let way = match key {
        KeyEvent { code: KeyCode::Char('c' | 'd'), modifiers, .. } if modifiers.contains(KeyModifiers::CONTROL) => {
            return Some(Input::Stop);
        }
        KeyEvent { code, .. } => match code {
            KeyCode::Char('q') => return Some(Input::Stop),
            KeyCode::Up | KeyCode::Char('k') => Way::Up,
            KeyCode::Down | KeyCode::Char('j') => Way::Down,
            KeyCode::PageUp | KeyCode::Char('b') => Way::PageUp,
            KeyCode::PageDown | KeyCode::Char(' ' | 'f') => Way::PageDown,
            KeyCode::Home | KeyCode::Char('g') => Way::First,
            KeyCode::End | KeyCode::Char('G') => Way::Last,
            _ => return None,
        },
    };
    Some(Input::Scroll(way))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_mean_what_they_do_elsewhere() {
        let key = |code, modifiers| meaning(&Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Some(Input::Stop));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Input::Stop));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
        assert_eq!(key(KeyCode::Char('j'), KeyModifiers::NONE), Some(Input::Scroll(Way::Down)));
        assert_eq!(key(KeyCode::PageUp, KeyModifiers::NONE), Some(Input::Scroll(Way::PageUp)));
        assert_eq!(meaning(&Event::Resize(60, 12)), Some(Input::Redraw));
        assert_eq!((Way::Up.from(0, 9), Way::PageDown.from(3, 9), Way::Last.from(0, 9)), (0, 12, usize::MAX));
    }
}
