//! Settings of the mesh that may change while its roles run: a folder with one file per setting, as Kubernetes mounts a
//! ConfigMap.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign_api::files::read_bounded;
use countersign_controller::store::Transparency;
use countersign_identity::KeyType;
use countersign_identity::policy::Mode;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{Mistake, Ttl};

/// Longest setting, in bytes.
const MAX_BYTES: u64 = 4096;
/// Most files of a folder that are read.
const MAX_FILES: usize = 64;
/// Interval between two reads of the folder.
const LOOK: Duration = Duration::from_secs(1);

/// Settings in the mesh's ConfigMap. For a missing one, each role uses its own start setting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshSettings {
    /// `mode`: mode of the mesh, used where namespace and pod set none.
    pub mode: Option<Mode>,
    /// `transparent`: how far the mesh is on its way out.
    pub transparent: Option<Transparency>,
    /// `caTTL`: lifetime of new authorities.
    pub ca_ttl: Option<Ttl>,
    /// `svidTTL`: lifetime of new SVIDs.
    pub svid_ttl: Option<Ttl>,
    /// `caKeyType`: key type of new authorities.
    pub ca_key_type: Option<KeyType>,
    /// `workloadKeyType`: key type of new SVIDs.
    pub workload_key_type: Option<KeyType>,
}

impl MeshSettings {
    /// Parses all settings; fails with the first invalid one. An empty value counts as missing; unknown keys are
    /// ignored.
    pub fn read(found: &BTreeMap<String, String>) -> Result<Self, Mistake> {
        fn one<T>(
            found: &BTreeMap<String, String>,
            key: &str,
            parse: impl Fn(&str) -> Result<T, String>,
        ) -> Result<Option<T>, Mistake> {
            let text = found.get(key).map(|t| t.trim()).filter(|t| !t.is_empty());
            text.map(|t| parse(t).map_err(|why| Mistake(format!("{key}: {why}")))).transpose()
        }
        let key_type =
            |text: &str| text.parse::<KeyType>().map_err(|e: countersign_identity::key::KeyError| e.to_string());
        Ok(Self {
            mode: one(found, "mode", super::parse_mode)?,
            transparent: one(found, "transparent", str::parse)?,
            ca_ttl: one(found, "caTTL", str::parse)?,
            svid_ttl: one(found, "svidTTL", str::parse)?,
            ca_key_type: one(found, "caKeyType", key_type)?,
            workload_key_type: one(found, "workloadKeyType", key_type)?,
        })
    }
}

/// Builds a role's part of the settings.
type Take<T> = Box<dyn Fn(&MeshSettings) -> Result<T, Mistake> + Send>;

/// Follows a folder and updates a role's part of the settings; created by [`live`].
pub struct Live<T> {
    folder: PathBuf,
    found: BTreeMap<String, String>,
    take: Take<T>,
    to: watch::Sender<T>,
}

/// A role's part of the settings: its current value, and a follower if there is a folder. Without a folder, `take`
/// builds it from no settings; the same happens if a setting is invalid, because a typing error must not keep a role
/// from restarting. A missing folder is an error. An empty one has no settings; one that becomes empty changes none, because it
/// is the mount of a ConfigMap that was deleted.
pub fn live<T>(
    folder: Option<PathBuf>,
    take: impl Fn(&MeshSettings) -> Result<T, Mistake> + Send + 'static,
) -> Result<(watch::Receiver<T>, Option<Live<T>>), Mistake> {
    let Some(folder) = folder else {
        let (_, receiver) = watch::channel(take(&MeshSettings::default())?);
        return Ok((receiver, None));
    };
    let named = |e: Mistake| Mistake::flag("--live-settings", &format!("{}: {e}", folder.display()));
    let found = read(&folder).map_err(named)?;
    let first = match MeshSettings::read(&found).and_then(|s| take(&s)) {
        Ok(first) => first,
        Err(why) => {
            tracing::error!(folder = %folder.display(), %why, "the settings are not taken; those of the start stand");
            take(&MeshSettings::default())?
        }
    };
    let (to, receiver) = watch::channel(first);
    Ok((receiver, Some(Live { folder, found, take: Box::new(take), to })))
}

impl<T: PartialEq + std::fmt::Debug + Send + Sync + 'static> Live<T> {
    /// Follows the folder until the returned handle is dropped.
    pub fn start(self) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(self.follow()))
    }

    /// Follows the folder, without end. Invalid and half-written settings are not applied: the previous ones remain.
    async fn follow(self) {
        let mut judged = Ok(self.found);
        let mut before = judged.clone();
        loop {
            tokio::time::sleep(LOOK).await;
            let now = read(&self.folder).map_err(|e| e.0);
            // Read twice with the same result: not in the middle of a change.
            let settled = now == before;
            before.clone_from(&now);
            if !settled || now == judged {
                continue;
            }
            judged.clone_from(&now);
            let found = now.map_err(Mistake).and_then(|found| {
                if found.is_empty() {
                    return Err(Mistake("it is empty; is ConfigMap countersign-mesh gone?".into()));
                }
                MeshSettings::read(&found)
            });
            match found.and_then(|settings| (self.take)(&settings)) {
                Ok(new) if *self.to.borrow() != new => {
                    tracing::info!(settings = ?new, "settings have changed");
                    self.to.send_replace(new);
                }
                Ok(_) => {}
                Err(why) => tracing::error!(folder = %self.folder.display(), %why, "the settings stay as they are"),
            }
        }
    }
}

/// Reads the file of each setting. Hidden files belong to Kubernetes.
fn read(folder: &Path) -> Result<BTreeMap<String, String>, Mistake> {
    let io = |e: std::io::Error| Mistake(format!("cannot be read: {e}"));
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(folder).map_err(io)? {
        let Ok(name) = file.map_err(io)?.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        if found.len() == MAX_FILES {
            return Err(Mistake(format!("holds more than {MAX_FILES} files")));
        }
        let wrong = |why: String| Mistake(format!("{name}: {why}"));
        let text = read_bounded(&folder.join(&name), MAX_BYTES).map_err(|e| wrong(e.to_string()))?;
        let text = String::from_utf8(text).map_err(|_| wrong("is no text".into()))?;
        found.insert(name, text);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<MeshSettings, String> {
        let found = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        MeshSettings::read(&found).map_err(|e| e.0)
    }

    #[test]
    fn what_is_left_out_stands_and_what_is_wrong_is_named() {
        assert_eq!(settings(&[("caTTL", ""), ("unknown", "x")]), Ok(MeshSettings::default()));
        let all = settings(&[
            ("mode", "strict\n"),
            ("svidTTL", "10m"),
            ("workloadKeyType", "rsa-2048"),
            ("transparent", "true"),
        ]);
        let all = all.unwrap();
        assert_eq!((all.mode, all.transparent), (Some(Mode::Strict), Some(Transparency::Full)));
        assert_eq!(all.svid_ttl, Some(Ttl(Duration::from_secs(600))));
        assert_eq!(all.workload_key_type, Some(KeyType::Rsa2048));
        assert!(settings(&[("svidTTL", "soon")]).unwrap_err().starts_with("svidTTL: `soon` is not a length of time"));
        assert!(settings(&[("caKeyType", "dsa")]).unwrap_err().starts_with("caKeyType: "));
        assert!(settings(&[("transparent", "1")]).unwrap_err().contains("none of false, inbound and true"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_taken_up_and_a_wrong_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let put = |text: &str| std::fs::write(folder.path().join("svidTTL"), text).unwrap();
        put("1h");
        std::fs::create_dir(folder.path().join("..data")).unwrap();
        let take = |s: &MeshSettings| Ok(s.svid_ttl.map(|t| t.0.as_secs()));
        let (mut receiver, follower) = live(Some(folder.path().to_owned()), take).unwrap();
        assert_eq!(*receiver.borrow_and_update(), Some(3600));
        let following = tokio::spawn(follower.unwrap().follow());
        put("5m");
        receiver.changed().await.unwrap();
        assert_eq!(*receiver.borrow_and_update(), Some(300));
        put("soon");
        tokio::time::sleep(LOOK * 5).await;
        assert!(!receiver.has_changed().unwrap());
        put("7m");
        receiver.changed().await.unwrap();
        assert_eq!(*receiver.borrow_and_update(), Some(420));
        std::fs::remove_file(folder.path().join("svidTTL")).unwrap();
        tokio::time::sleep(LOOK * 5).await;
        assert!(!receiver.has_changed().unwrap(), "a ConfigMap that was deleted changes nothing");
        put("8m");
        receiver.changed().await.unwrap();
        assert_eq!(*receiver.borrow_and_update(), Some(480));
        following.abort();
        assert!(live(Some(folder.path().join("none")), take).is_err(), "a folder that is not there");
        put("soon");
        let (receiver, follower) = live(Some(folder.path().to_owned()), take).unwrap();
        assert_eq!(*receiver.borrow(), None, "a start with a mistake stands on its flags");
        assert!(follower.is_some(), "and takes up what is mended");
    }
}
