//! The display of `up`: a table that fits its window in a terminal, lines of news otherwise.
//!
//! `answers` queries the sidecars, `view` collects what to show, `render` makes lines of it for any window, `screen`
//! controls the terminal.

mod answers;
mod plain;
mod render;
mod screen;
mod view;

use std::rc::Rc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::mesh::Mesh;
use answers::Answers;
use screen::{Input, Screen};

pub use plain::plain;
pub use view::{Row, rows};

/// Interval at which the table is redrawn without input.
const EVERY: Duration = Duration::from_secs(1);
/// Most events that are printed when the table closes.
const LAST_EVENTS: usize = 20;

/// Whether a live table can be drawn: both ends are terminals with more than basic capabilities.
pub fn possible() -> bool {
    use std::io::IsTerminal;
    let dumb = std::env::var("TERM").map_or(true, |term| term.is_empty() || term == "dumb");
    !dumb && std::io::stdout().is_terminal() && std::io::stdin().is_terminal()
}

/// Queries every sidecar once, for a command.
pub async fn ask_once(mesh: &Rc<Mesh>) -> Vec<Row> {
    let answers = Answers::default();
    answers.ask_all(mesh).await;
    rows(mesh, &answers)
}

/// Draws the table until stopped; falls back to lines if the terminal does not support it.
pub async fn live(mesh: &Rc<Mesh>, stop: &CancellationToken) {
    let Ok(mut screen) = Screen::open() else { return plain(mesh, stop).await };
    mesh.events().shown(true);
    let answers = Rc::new(Answers::default());
    // Sidecars are queried next to the drawing: one that hangs must not block keys or other rows.
    let asking = tokio::task::spawn_local({
        let (answers, mesh) = (answers.clone(), mesh.clone());
        async move { answers.keep(&mesh).await }
    });
    let mut scroll = 0usize;
    loop {
        let view = view::view(mesh, &answers);
        let Ok(page) = screen.draw(&view, &mut scroll) else { break };
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => break,
            input = screen.input() => match input {
                Some(Input::Stop) => {
                    // The terminal is in raw mode, so Ctrl-C arrives as a key; it is raised as the signal that it would
                    // be.
                    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT);
                    stop.cancelled().await;
                    break;
                }
                Some(Input::Scroll(way)) => scroll = way.from(scroll, page),
                Some(Input::Redraw) => {}
                None => break,
            },
        }
    }
    asking.abort();
    drop(screen);
    mesh.events().shown(false);
    for event in mesh.events().newest(LAST_EVENTS) {
        let _ = crate::stdout::line(&format!("{} {}", event.time(), event.text));
    }
    // The terminal may be gone; the mesh continues until it is stopped.
    stop.cancelled().await;
}
