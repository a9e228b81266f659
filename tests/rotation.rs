//! Constant load between two workloads while SVIDs live for 20 seconds and the authority for two minutes: no request fails,
//! and no certificate is used outside its time.
//!
//! Five minutes by default; `COUNTERSIGN_ROTATION_SECONDS=3600` is the long version.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::{COUNTERSIGN, Mesh, able};

#[test]
fn nothing_fails_while_svids_and_authorities_rotate_under_load() {
    if !able(&[]) {
        return;
    }
    let seconds: u64 = std::env::var("COUNTERSIGN_ROTATION_SECONDS").map_or(300, |s| s.parse().unwrap());
    let workload = format!("  - name: server\n    ports: [9080]\n    command: [{COUNTERSIGN}, shop, ratings]\n");
    let mesh = Mesh::up_with("rotation", "mode: strict\nsvid_ttl: 20s\nca_ttl: 2m", &workload);
    mesh.wait_for_port("server", 9080);
    let load = mesh.join(
        "client",
        &[],
        &[
            COUNTERSIGN,
            "probe",
            "http://server:9080/",
            "--seconds",
            &seconds.to_string(),
            "--kept",
            "4",
            "--fresh",
            "4",
            "--pause-ms",
            "10",
        ],
    );
    let mut load = load;
    let load = load.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let (mut serials, mut authorities, mut client_log) = (BTreeSet::new(), BTreeSet::new(), vec![]);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        std::thread::sleep(Duration::from_secs(1));
        serials.insert(mesh.status("server")["identities"][0]["serial"].as_str().unwrap_or_default().to_owned());
        let shown = crate::support::run(&mut mesh.operator(&["authority", "show", "--output", "json"]));
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        authorities.insert(shown["active"]["id"].as_str().unwrap().to_owned());
        // The client's log goes with it when it leaves.
        client_log = mesh.access_log("client");
    }
    let output = load.wait_with_output().unwrap();
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert_eq!(report["failed"], 0, "{report}");
    assert!(report["ok"].as_u64().unwrap() > seconds * 50, "{report}");
    // A new SVID every five to ten seconds, a new authority every two minutes less a sixth.
    assert!(serials.len() as u64 > seconds / 15, "only {} SVIDs in {seconds} s", serials.len());
    assert!(authorities.len() as u64 >= seconds / 130, "only {} authorities in {seconds} s", authorities.len());
    let time = |line: &serde_json::Value, key: &str| {
        OffsetDateTime::parse(line[key].as_str().unwrap_or_else(|| panic!("no {key} in {line}")), &Rfc3339).unwrap()
    };
    let server_log = mesh.access_log("server");
    for line in server_log.iter().chain(&client_log).filter(|l| l["mode"] != "plain") {
        assert_eq!(line["mode"], "mtls", "{line}");
        assert!(
            time(line, "peer_expires_at") > time(line, "time") && time(line, "own_expires_at") > time(line, "time"),
            "{line}"
        );
    }
    assert!(server_log.len() > 100 && client_log.len() > 100, "{} and {} lines", server_log.len(), client_log.len());
    let audit = std::fs::read_to_string(mesh.dir().join("server/audit.log")).unwrap();
    assert!(!audit.contains("\"refused\""), "nothing was refused");
    eprintln!("{seconds} s: {report}, {} SVIDs of the server, {} authorities", serials.len(), authorities.len());
    mesh.down();
}
