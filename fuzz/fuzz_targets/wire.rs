//! Messages of the SPIRE API and of the directory, as bytes: what is parsed goes over the wire again and is the same.
#![no_main]

use countersign_api::convert::{
    answer_from_wire, bundle_from_wire, entry_from_wire, entry_to_wire, service_from_wire, workload_from_wire,
    workload_to_wire,
};
use countersign_api::push;
use countersign_api::spire::types;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => {
            let Ok(wire) = types::Entry::decode(data) else { return };
            let Ok(entry) = entry_from_wire(wire, || "fresh".parse().unwrap()) else { return };
            let again = entry_from_wire(entry_to_wire(&entry), || unreachable!("it has an ID"));
            assert_eq!(again.unwrap(), entry);
        }
        1 => drop(types::Bundle::decode(data).map(bundle_from_wire)),
        2 => {
            let Ok(wire) = push::Workload::decode(data) else { return };
            let Ok(workload) = workload_from_wire(wire) else { return };
            assert_eq!(workload_from_wire(workload_to_wire(&workload)).unwrap(), workload);
        }
        3 => drop(push::Answer::decode(data).map(answer_from_wire)),
        _ => drop(push::Service::decode(data).map(service_from_wire)),
    }
});
