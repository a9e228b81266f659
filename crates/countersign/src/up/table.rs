//! What a person watches: a table that fits its window in a terminal, lines of news elsewhere.
//!
//! `answers` asks the sidecars, `view` is what there is to show, `render` makes lines of it for any window, `screen` is the
//! terminal.

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

/// How often the table is drawn again when nobody presses a key.
const EVERY: Duration = Duration::from_secs(1);
/// Events that are printed when the table goes away.
const LAST_EVENTS: usize = 20;

/// Whether a live table can be drawn: a terminal at both ends that knows more than to print.
pub fn possible() -> bool {
    use std::io::IsTerminal;
    let dumb = std::env::var("TERM").map_or(true, |term| term.is_empty() || term == "dumb");
    !dumb && std::io::stdout().is_terminal() && std::io::stdin().is_terminal()
}

/// What every sidecar says of itself now, for a command that asks once.
pub async fn ask_once(mesh: &Rc<Mesh>) -> Vec<Row> {
    let answers = Answers::default();
    answers.ask_all(mesh).await;
    rows(mesh, &answers)
}

/// Draws the table until told to stop; falls back to lines when the terminal does not take it.
pub async fn live(mesh: &Rc<Mesh>, stop: &CancellationToken) {
    let Ok(mut screen) = Screen::open() else { return plain(mesh, stop).await };
    mesh.events().shown(true);
    let answers = Rc::new(Answers::default());
    // Sidecars are asked beside the drawing: one that hangs must not hold up keys or the other rows.
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
                    // The terminal is raw, so Ctrl-C is a key; as a signal it takes the same way as everywhere else.
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
    // The terminal may have gone away; the mesh stays until it is told to stop.
    stop.cancelled().await;
}
