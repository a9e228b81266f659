//! The folder as network plugins and runtimes have it.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;
use crate::plugin::NAME;

const LIST: &str =
    "{\n  \"cniVersion\": \"0.4.0\",\n  \"name\": \"pods\",\n  \"plugins\": [\n    {\"type\": \"bridge\"}\n  ]\n}\n";
const SINGLE: &str = "{ \"cniVersion\": \"1.0.0\", \"name\": \"pods\", \"type\": \"ptp\" }\n";

struct Folder {
    dir: tempfile::TempDir,
    plugins: tempfile::TempDir,
    ours: ConfDir,
}

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let plugins = tempfile::tempdir().unwrap();
        let entry = json!({ "type": NAME, "socket": "/run/cni.sock" });
        let ours = ConfDir::new(dir.path().into(), plugins.path().into(), entry);
        let folder = Self { ours, dir, plugins };
        ["bridge", "ptp", NAME].into_iter().for_each(|plugin| folder.install(plugin));
        files.iter().for_each(|(name, text)| folder.put(name, text));
        folder
    }

    fn put(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn install(&self, plugin: &str) {
        std::fs::write(self.plugins.path().join(plugin), plugin).unwrap();
    }

    fn uninstall(&self, plugin: &str) {
        std::fs::remove_file(self.plugins.path().join(plugin)).unwrap();
    }

    /// Every file's text.
    fn all(&self) -> BTreeMap<String, String> {
        let files = std::fs::read_dir(self.dir.path()).unwrap().map(Result::unwrap);
        let text = |e: &std::fs::DirEntry| std::fs::read_to_string(e.path()).unwrap();
        files.map(|e| (e.file_name().into_string().unwrap(), text(&e))).collect()
    }

    /// Types of the plugins of the configuration that a runtime loads, and its file's name.
    fn loaded(&self) -> (String, Vec<String>) {
        let name = self.ours.names().unwrap().remove(0);
        let read: Value = serde_json::from_str(&self.all()[&name]).unwrap();
        let types = read["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap().to_owned());
        (name, types.collect())
    }
}

#[test]
fn the_first_list_gets_the_entry_and_everything_is_as_before_once_it_is_removed() {
    let files = [("10-a.conflist", LIST), ("20-b.conflist", LIST), ("05-notes.txt", "x"), ("zz.conf", SINGLE)];
    let folder = Folder::new(&files);
    let mode = |mode: u32| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(folder.dir.path().join("10-a.conflist"), mode(0o640)).unwrap();
    let before = folder.all();
    assert_eq!(folder.ours.ensure().unwrap().as_deref(), Some("10-a.conflist"));
    assert_eq!(folder.ours.ensure().unwrap(), None, "once is enough");
    assert_eq!(folder.loaded(), ("10-a.conflist".into(), vec!["bridge".into(), NAME.into()]));
    let about = std::fs::metadata(folder.dir.path().join("10-a.conflist")).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o640);
    // What a crash while writing leaves is no configuration, and goes too.
    folder.put("10-a.conflist.countersign-cni-new", "{");
    folder.ours.remove().unwrap();
    assert_eq!(folder.all(), before);
    folder.ours.remove().unwrap();
    assert_eq!(folder.all(), before);
}

#[test]
fn what_other_tools_write_or_add_is_extended_anew_and_left_as_they_wrote_it() {
    let folder = Folder::new(&[("10-a.conflist", LIST)]);
    folder.ours.ensure().unwrap();
    let newer = LIST.replace("bridge", "ptp");
    folder.put("10-a.conflist", &newer);
    assert!(folder.ours.ensure().unwrap().is_some());
    assert_eq!(folder.loaded().1, ["ptp", NAME]);
    folder.put("05-first.conflist", LIST);
    assert_eq!(folder.ours.ensure().unwrap().as_deref(), Some("05-first.conflist"));
    folder.ours.remove().unwrap();
    let expected = [("05-first.conflist", LIST), ("10-a.conflist", &newer)];
    assert_eq!(folder.all(), expected.map(|(n, t)| (n.to_owned(), t.to_owned())).into());
}

#[test]
fn an_entry_with_other_settings_is_replaced() {
    let folder = Folder::new(&[("10-a.conflist", LIST)]);
    let other = json!({ "type": NAME });
    ConfDir::new(folder.dir.path().into(), folder.plugins.path().into(), other).ensure().unwrap();
    assert!(folder.ours.ensure().unwrap().is_some());
    assert_eq!(folder.loaded().1, ["bridge", NAME]);
    folder.ours.remove().unwrap();
    assert_eq!(folder.all()["10-a.conflist"], LIST);
}

#[test]
fn the_entry_is_there_only_while_the_runtime_finds_every_plugin_of_the_list() {
    let list = LIST.replace("{\"type\": \"bridge\"}", "{\"type\": \"bridge\"}, {\"type\": \"port\\u001bmap\"}");
    for (name, text) in [("10-a.conflist", list.as_str()), ("10-a.conf", SINGLE)] {
        let folder = Folder::new(&[(name, text)]);
        let (before, gone) = (folder.all(), if name.ends_with('f') { "ptp" } else { "port\u{1b}map" });
        folder.install(gone);
        folder.uninstall(gone);
        let why = folder.ours.ensure().unwrap_err().to_string();
        assert!(why.contains("cni.binDir") && why.contains(&folder.plugins.path().display().to_string()), "{why}");
        assert!(why.contains("map") || why.contains("ptp"), "{why}");
        assert!(!why.contains("bridge") && !why.contains('\u{1b}'), "{why}");
        assert_eq!(folder.all(), before);
        folder.install(gone);
        assert_eq!(folder.ours.ensure().unwrap().as_deref(), Some(name));
        // Another tool empties the folder.
        for plugin in [gone, NAME] {
            folder.uninstall(plugin);
            assert!(matches!(folder.ours.ensure(), Err(ConfError::Plugins { missing, .. }) if missing.len() == 1));
            assert_eq!(folder.all(), before, "without {plugin}");
            folder.install(plugin);
            assert!(folder.ours.ensure().unwrap().is_some());
        }
        folder.uninstall(gone);
        std::os::unix::fs::symlink("/nowhere/here", folder.plugins.path().join(gone)).unwrap();
        assert_eq!(folder.ours.ensure().unwrap(), None, "a link into a folder that the node alone has");
    }
}

#[test]
fn the_entry_goes_where_the_configuration_gets_a_version_that_the_plugin_does_not_know() {
    let folder = Folder::new(&[("10-a.conflist", LIST)]);
    folder.ours.ensure().unwrap();
    let newer = folder.all()["10-a.conflist"].replace("0.4.0", "3.0.0");
    folder.put("10-a.conflist", &newer);
    assert!(folder.ours.ensure().unwrap_err().to_string().contains("CNI version 3.0.0"));
    assert!(!folder.all()["10-a.conflist"].contains(NAME));
}

#[test]
fn an_entry_that_another_tool_moved_or_doubled_comes_last_again() {
    let folder = Folder::new(&[("10-a.conflist", LIST)]);
    folder.ours.ensure().unwrap();
    let mut list: Value = serde_json::from_str(&folder.all()["10-a.conflist"]).unwrap();
    let plugins = list["plugins"].as_array().unwrap().clone();
    for order in [[1, 0].as_slice(), &[1, 0, 1], &[0, 1, 1]] {
        list["plugins"] = order.iter().map(|n| plugins[*n].clone()).collect();
        folder.put("10-a.conflist", &list.to_string());
        assert!(folder.ours.ensure().unwrap().is_some(), "{order:?}");
        assert_eq!(folder.loaded().1, ["bridge", NAME], "{order:?}");
    }
}

#[test]
fn a_single_configuration_becomes_a_list_and_comes_back() {
    for name in ["10-a.conf", "10-a.json"] {
        let folder = Folder::new(&[(name, SINGLE), ("20-b.conflist", LIST)]);
        let before = folder.all();
        assert_eq!(folder.ours.ensure().unwrap().as_deref(), Some(name));
        assert_eq!(folder.loaded(), (format!("{name}.conflist"), vec!["ptp".into(), NAME.into()]));
        assert_eq!(folder.ours.ensure().unwrap(), None);
        // Its owner writes it once more, and then it has changed.
        let newer = SINGLE.replace("ptp", "bridge");
        folder.put(name, &newer);
        assert!(folder.ours.ensure().unwrap().is_some());
        assert_eq!(folder.loaded().1, ["bridge", NAME]);
        folder.put(name, SINGLE);
        folder.ours.remove().unwrap();
        assert_eq!(folder.all(), before, "the owner's last word");
        folder.ours.ensure().unwrap();
        folder.ours.remove().unwrap();
        assert_eq!(folder.all(), before);
    }
}

#[test]
fn a_list_that_others_have_extended_since_stays() {
    let folder = Folder::new(&[("10-a.conf", SINGLE)]);
    folder.ours.ensure().unwrap();
    let list = folder.all()["10-a.conf.conflist"].replace("\"ptp\" }", "\"ptp\" }, {\"type\":\"bandwidth\"}");
    folder.put("10-a.conf.conflist", &list);
    folder.ours.remove().unwrap();
    assert_eq!(folder.loaded(), ("10-a.conf.conflist".into(), vec!["ptp".into(), "bandwidth".into()]));
    assert_eq!(folder.all().len(), 1);
}

#[test]
fn what_cannot_be_extended_is_named_and_left_alone() {
    let why = |files: &[(&str, &str)]| {
        let folder = Folder::new(files);
        let before = folder.all();
        let why = folder.ours.ensure().unwrap_err().to_string();
        assert_eq!(folder.all(), before);
        why
    };
    assert!(why(&[]).ends_with("has no network configuration yet"));
    assert!(why(&[("a.conflist", "{")]).contains("a.conflist is no network configuration"));
    let newer = LIST.replace("0.4.0", "3.0.0");
    assert!(why(&[("a.conflist", &newer), ("b.conflist", LIST)]).contains("CNI version 3.0.0"));
    let folder = Folder::new(&[("a.conflist", "{"), ("b.conflist", LIST)]);
    assert_eq!(folder.ours.ensure().unwrap().as_deref(), Some("b.conflist"), "the runtime skips what it cannot load");
    let linked = Folder::new(&[("target", LIST)]);
    std::os::unix::fs::symlink("target", linked.dir.path().join("10-a.conflist")).unwrap();
    assert!(linked.ours.ensure().unwrap_err().to_string().contains("symbolic link"));
    let missing = ConfDir::new("/nowhere/at/all".into(), "/nowhere".into(), json!({}));
    assert!(missing.ensure().unwrap_err().to_string().starts_with("/nowhere/at/all: "));
}

#[test]
fn what_its_owner_writes_meanwhile_is_not_overwritten() {
    let folder = Folder::new(&[("10-a.conflist", LIST), ("20-b.conf", SINGLE)]);
    for name in ["10-a.conflist", "20-b.conf"] {
        let path = folder.dir.path().join(name);
        let late = Replacement { of: &path, before: "what was read", text: "{}" };
        let why = if is_list(name) { write(&path, late) } else { convert(late) };
        assert!(why.unwrap_err().to_string().contains("just been changed"));
    }
    let expected = [("10-a.conflist", LIST), ("20-b.conf", SINGLE)];
    assert_eq!(folder.all(), expected.map(|(n, t)| (n.to_owned(), t.to_owned())).into());
}
