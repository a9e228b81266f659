//! Selectors: what is accepted renders to itself.
#![no_main]

use countersign_identity::Selector;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(selector) = text.parse::<Selector>() {
        assert_eq!(selector.to_string().parse::<Selector>().ok(), Some(selector));
    }
});
