//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

use crate::plugin::{Environment, PodName, run};
use crate::{conf, wire};

/// Parses the input as the plugin's standard input, for each command that needs nothing else, as `CNI_ARGS`, as the
/// node's configuration, and as a request of the plugin.
///
/// # Panics
/// If output or warning has a control character, or if an entry's removal does not leave what was there.
pub fn plugin(data: &[u8]) {
    for command in ["ADD", "CHECK", "DEL", "VERSION", "STATUS", "GC"] {
        let environment = Environment { command: command.into(), ..Environment::default() };
        let outcome = run(&environment, &mut &data[..]);
        let said = outcome.output.map(|output| output.to_string()).into_iter().chain(outcome.warning);
        said.for_each(|text| assert!(!text.contains(|c: char| c.is_control()), "{text:?}"));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(why) = PodName::of_arguments(text) {
        assert!(!why.contains(|c: char| c.is_control()), "{why:?}");
    }
    conf::extend_and_restore(text);
    wire::parse(data);
}
