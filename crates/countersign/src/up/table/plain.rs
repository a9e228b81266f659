//! Lines of news for pipes, logs and basic terminals: rotations, refusals, programs that end.

use std::collections::BTreeMap;
use std::rc::Rc;

use countersign_api::push::GetStatusResponse;
use tokio_util::sync::CancellationToken;

use super::super::children::State;
use super::super::mesh::Mesh;
use super::super::running::Running;
use super::EVERY;
use super::answers::Answers;
use crate::operator::output::told;
use crate::stdout::{self, StdoutError};

/// The last printed state of a workload.
#[derive(PartialEq)]
struct Said {
    serial: String,
    refused: u64,
    program: Option<State>,
}

/// Prints changes until stopped. The mesh continues if the output is no longer read.
pub async fn plain(mesh: &Rc<Mesh>, stop: &CancellationToken) {
    let mut readers =
        line(&format!("mesh {} is up; logs in {}; Ctrl-C takes it down", mesh.spec.name, mesh.logs().display()));
    let answers = Answers::default();
    let mut seen = BTreeMap::new();
    loop {
        answers.ask_all(mesh).await;
        for (name, running) in mesh.workloads() {
            if let (Some(status), _) = answers.of(&name)
                && readers.is_ok()
            {
                readers = tell(&mut seen, &name, &running, &status);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn tell(
    seen: &mut BTreeMap<String, Said>,
    name: &str,
    running: &Running,
    status: &GetStatusResponse,
) -> Result<(), StdoutError> {
    let serial = status.identities.first().map(|i| i.serial.clone()).unwrap_or_default();
    let now = Said { serial, refused: status.refused.values().sum(), program: running.program() };
    match seen.get(name) {
        Some(before) if *before == now => return Ok(()),
        Some(before) => {
            if before.serial != now.serial {
                line(&format!("{name}: new SVID, serial {}", now.serial))?;
            }
            if before.refused != now.refused {
                let mut reasons: Vec<String> = status.refused.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                reasons.sort();
                line(&format!("{name}: refused so far: {}", reasons.join(", ")))?;
            }
            if let (true, Some(State::Ended(end))) = (before.program != now.program, &now.program) {
                line(&format!("{name}: {end}"))?;
            }
        }
        None => line(&format!("{name}: {} serial {}", running.spiffe_id, now.serial))?,
    }
    seen.insert(name.to_owned(), now);
    Ok(())
}

/// Prints a line. Serials and reasons are what a sidecar says of itself.
fn line(text: &str) -> Result<(), StdoutError> {
    stdout::line(&told(text))
}
