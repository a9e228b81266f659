//! What an installation remembers of itself: the version and the settings that were named, in ConfigMap
//! `countersign-install` of its namespace. What has begun to be applied is noted beside it, and remembered once it is.
//!
//! It is no part of the chart, because Helm keeps its own. A ConfigMap and no Secret, because settings hold no secrets:
//! of Secrets they have the names alone. Nothing in the cluster reads it, so no role needs a permission for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cluster::listed;
use super::former::{Revision, defaults_of};
use super::given::Given;
use super::live_settings;
use super::values::defaults;
use crate::settings::Mistake;

/// Name of the ConfigMap.
const NAME: &str = "countersign-install";
/// Key of the version that was installed.
const VERSION: &str = "version";
/// Key of the settings that were named, in the form of the chart's values.yaml.
const VALUES: &str = "values.yaml";
/// Key of the revision of the chart's defaults that all other settings had.
const DEFAULTS: &str = "defaults";
/// Key of settings that have begun to be applied; empty or missing if none have.
const PENDING: &str = "pending";
/// Annotation of objects that belong to a Helm release: its name.
const HELM: &str = "meta.helm.sh/release-name";
/// Longest call to the API server.
const CALL: Duration = Duration::from_secs(10);

/// The version of this binary.
pub const OURS: &str = env!("CARGO_PKG_VERSION");

/// What an installation remembers.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    /// The version that was installed.
    pub version: String,
    /// The settings that were named, without the defaults of the others.
    pub given: Given,
    /// Which defaults the others had.
    pub defaults: Revision,
}

impl Memory {
    /// Of an installation by this binary with these settings.
    pub fn new(given: Given) -> Self {
        Self { version: OURS.to_owned(), given, defaults: Revision::NOW }
    }

    /// All settings of that installation: what was named, over the defaults that it had.
    pub fn values(&self) -> Result<Value, Mistake> {
        Ok(self.given.unjudged(defaults_of(self.defaults, defaults()?)))
    }

    /// As an object of a namespace.
    pub fn object(&self, namespace: &str) -> Result<ConfigMap> {
        let labels = [("app.kubernetes.io/name", "countersign"), ("app.kubernetes.io/component", "install")];
        let data = [
            (VERSION, self.version.clone()),
            (VALUES, self.values_text()?),
            (DEFAULTS, self.defaults.to_string()),
            // `kubectl apply` takes no key away that it does not know, and this one is over.
            (PENDING, String::new()),
        ];
        Ok(ConfigMap {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(namespace.to_owned()),
                labels: Some(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into()),
                ..ObjectMeta::default()
            },
            data: Some(data.map(|(k, v)| (k.to_owned(), v)).into()),
            ..ConfigMap::default()
        })
    }

    /// The settings that were named, as they are written.
    fn values_text(&self) -> Result<String> {
        super::install::yaml(&self.given.tree())
    }

    /// The object of an installation, or of none, once these settings have begun to be applied.
    fn begun(&self, namespace: &str, before: Option<&ConfigMap>) -> Result<ConfigMap> {
        let mut wanted = self.object(namespace)?;
        let mut data = wanted.data.take().unwrap_or_default();
        data.remove(VALUES);
        if let Some(before) = before {
            wanted.metadata.resource_version.clone_from(&before.metadata.resource_version);
            wanted.metadata.annotations.clone_from(&before.metadata.annotations);
            // What cannot be read is allowed to go by now, and a first installation that was not finished is replaced as a whole.
            let remembers = before.data.as_ref().is_some_and(|data| data.contains_key(VALUES));
            if remembers && Self::read(before).is_ok() {
                data.extend(before.data.clone().unwrap_or_default());
            }
        }
        data.insert(PENDING.to_owned(), self.values_text()?);
        wanted.data = Some(data);
        Ok(wanted)
    }

    /// Reads an object. Error: what is wrong with it.
    fn read(object: &ConfigMap) -> Result<Self, String> {
        let empty = BTreeMap::new();
        let data = object.data.as_ref().unwrap_or(&empty);
        let key = |key: &str| data.get(key).ok_or_else(|| format!("it has no key `{key}`"));
        // Of a first installation that was not finished there is nothing else.
        let values = if data.contains_key(VALUES) || pending(object).is_none() { VALUES } else { PENDING };
        let given = read_given(values, key(values)?)?;
        let defaults = data.get(DEFAULTS).map_or(Ok(Revision::FIRST), |text| text.parse());
        let defaults = defaults.map_err(|why| format!("key `{DEFAULTS}`: {why}"))?;
        Ok(Self { version: key(VERSION)?.clone(), given, defaults })
    }
}

fn read_given(key: &str, text: &str) -> Result<Given, String> {
    let tree = serde_saphyr::from_str(text).map_err(|e| format!("key `{key}`: {e}"))?;
    Given::of(tree).map_err(|e| format!("key `{key}`: {e}"))
}

/// The settings that have begun to be applied, as they are written.
fn pending(object: &ConfigMap) -> Option<&str> {
    object.data.as_ref()?.get(PENDING).map(String::as_str).filter(|text| !text.trim().is_empty())
}

/// An earlier installation as it was seen: what it remembers, and the version of the object that says so.
#[derive(Debug, Default)]
pub struct Seen {
    /// `None` if nothing is remembered: there is no installation, or it was made by a version that remembered nothing.
    pub memory: Option<Memory>,
    /// Settings that have begun to be applied, and of which nobody has said that they are.
    pub pending: Option<Given>,
    object: Option<ConfigMap>,
}

/// Looks at the installation in a namespace. `despite_damage`: what cannot be read counts as nothing. Errors: the
/// namespace holds a Helm release, the memory cannot be read, the API server does not answer.
pub async fn look(client: &Client, namespace: &str, despite_damage: bool) -> Result<Seen> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    if let Some(mesh) = get(&api, live_settings::NAME).await?
        && let Some(release) = mesh.annotations().get(HELM)
    {
        return Err(Mistake(format!(
            "namespace `{namespace}` has an installation by Helm (release `{release}`): change it by `helm upgrade`"
        ))
        .into());
    }
    let Some(object) = get(&api, NAME).await? else { return Ok(Seen::default()) };
    let memory = match Memory::read(&object) {
        Ok(memory) => Some(memory),
        Err(_) if despite_damage => None,
        Err(why) => {
            return Err(Mistake(format!(
                "ConfigMap {namespace}/{NAME}, which remembers the settings of the installation, cannot be read: \
                 {why}; mend or delete it, or install with --force"
            ))
            .into());
        }
    };
    // What cannot be read was never applied by this command.
    let pending = pending(&object).and_then(|text| read_given(PENDING, text).ok());
    Ok(Seen { memory, pending, object: Some(object) })
}

/// What is said of an installation that was begun and perhaps not finished.
pub fn unfinished(pending: &Given, given: &Given) -> String {
    let begun = "an earlier `install --apply` was interrupted, or another one goes on";
    let (was, now) = (pending.leaves(), given.leaves());
    let names: BTreeSet<&String> = was.keys().chain(now.keys()).collect();
    let other: Vec<String> = names.into_iter().filter(|name| was.get(*name) != now.get(*name)).cloned().collect();
    if other.is_empty() {
        return format!("{begun}, with these settings: all manifests are applied again");
    }
    format!("{begun}, with other settings ({}): what it has applied of them is replaced", listed(&other))
}

/// An object that an earlier installation has made; `None` if there is none. Error: the API server does not show it.
pub async fn get<K>(api: &Api<K>, name: &str) -> Result<Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let found = tokio::time::timeout(CALL, api.get_opt(name)).await;
    let found = found.map_err(|_| anyhow!("the API server gave no answer within {} s", CALL.as_secs()))?;
    let what = || {
        format!(
            "cannot read {} {name} to compare with an earlier installation; --ignore-cluster leaves that out",
            K::kind(&())
        )
    };
    found.with_context(what)
}

/// Notes that new settings begin to be applied, if nobody has noted or remembered any since `seen` (compare-and-set by the object's
/// resource version), in the namespace, which is created if it is missing. What is remembered stays until [`remember`]. Error: another
/// installation was faster, or the API server rejects it.
pub async fn begin(client: &Client, namespace: &Namespace, seen: Seen, memory: &Memory) -> Result<()> {
    let write = async {
        let post = PostParams::default();
        match Api::<Namespace>::all(client.clone()).create(&post, namespace).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error),
        }
        let name = namespace.name_any();
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &name);
        let wanted = memory.begun(&name, seen.object.as_ref()).map_err(|e| kube::Error::Service(e.into()))?;
        match seen.object {
            None => api.create(&post, &wanted).await.map(drop),
            Some(_) => api.replace(NAME, &post, &wanted).await.map(drop),
        }
    };
    match tokio::time::timeout(CALL, write).await {
        Ok(Ok(())) => Ok(()),
        // 404: the one that was seen has been deleted.
        Ok(Err(kube::Error::Api(status))) if status.code == 409 || status.code == 404 => Err(anyhow!(
            "somebody else has installed or removed Countersign in namespace `{}` meanwhile; nothing was applied. \
             Run it again to compare with what is there now",
            namespace.name_any()
        )),
        Ok(Err(error)) => Err(error).context("cannot note the settings; nothing was applied"),
        Err(_) => Err(anyhow!("the API server gave no answer within {} s; nothing was applied", CALL.as_secs())),
    }
}

/// Remembers settings that were applied.
pub async fn remember(client: &Client, namespace: &str, memory: &Memory) -> Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let write = async {
        loop {
            let mut data = memory.object(namespace)?.data.unwrap_or_default();
            // Somebody else may have begun meanwhile, and is not done.
            let now = api.get(NAME).await?;
            if pending(&now).is_some_and(|text| memory.values_text().is_ok_and(|ours| ours != text)) {
                data.remove(PENDING);
            }
            let seen = json!({ "metadata": { "resourceVersion": now.metadata.resource_version }, "data": data });
            match api.patch(NAME, &PatchParams::default(), &Patch::Merge(seen)).await {
                // It was written between the look and the patch.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                done => return anyhow::Ok(done.map(drop)?),
            }
        }
    };
    let written = tokio::time::timeout(CALL, write).await;
    let written = written.unwrap_or_else(|_| Err(anyhow!("the API server gave no answer within {} s", CALL.as_secs())));
    written.context("everything was applied, but the settings cannot be remembered: run it again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};

    fn with_ttl(ttl: &str) -> Memory {
        Memory::new(Given::of(json!({ "server": { "svidTTL": ttl } })).unwrap())
    }

    #[test]
    fn what_has_begun_to_be_applied_is_not_remembered_yet() {
        let before = with_ttl("30m").object("mesh").unwrap();
        assert_eq!(pending(&before), None);
        let begun = with_ttl("5m").begun("mesh", Some(&before)).unwrap();
        assert_eq!(Memory::read(&begun), Ok(with_ttl("30m")), "an interruption changes nothing that is remembered");
        assert_eq!(read_given(PENDING, pending(&begun).unwrap()), Ok(with_ttl("5m").given));
        // Applied by hand meanwhile, or in whole at the next time: nothing is pending.
        assert_eq!(with_ttl("5m").object("mesh").unwrap().data.unwrap()[PENDING], "");
        let first = with_ttl("5m").begun("mesh", None).unwrap();
        assert_eq!(Memory::read(&first), Ok(with_ttl("5m")), "what is there is of these settings, if anything is");
        assert!(!first.data.as_ref().unwrap().contains_key(VALUES));
        let mut older = first.clone();
        older.data.as_mut().unwrap().extend([(VERSION.into(), "0.0.1".into()), (DEFAULTS.into(), "1".into())]);
        let again = Memory::read(&with_ttl("1m").begun("mesh", Some(&older)).unwrap());
        assert_eq!(again, Ok(with_ttl("1m")), "with the defaults of now, for nothing older was finished");
        let mut damaged = before.clone();
        damaged.data.as_mut().unwrap().insert(VALUES.into(), "[".into());
        assert_eq!(Memory::read(&with_ttl("5m").begun("mesh", Some(&damaged)).unwrap()), Ok(with_ttl("5m")));
    }

    #[tokio::test]
    async fn what_was_applied_is_remembered_and_what_others_have_begun_meanwhile_stays() {
        for (begun, left) in [("5m", Some("")), ("1m", None)] {
            let now = with_ttl(begun).begun("mesh", None).unwrap();
            let client = client(move |asked: &Asked| {
                if asked.body["data"].is_object() {
                    assert!(asked.body["data"][VALUES].as_str().unwrap().contains("5m"));
                    assert_eq!(asked.body["data"][PENDING].as_str(), left, "{begun}");
                }
                Answer::Now(200, serde_json::to_value(&now).unwrap())
            });
            remember(&client, "mesh", &with_ttl("5m")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_others_begin_between_the_look_and_the_patch_is_looked_at_again() {
        let looks = std::sync::atomic::AtomicUsize::new(0);
        let client = client(move |asked: &Asked| {
            use std::sync::atomic::Ordering::Relaxed;
            if asked.body["data"].is_object() {
                let look = looks.load(Relaxed);
                assert_eq!(asked.body["metadata"]["resourceVersion"], look.to_string());
                if look == 1 {
                    return refused(409, "the object has been modified");
                }
                assert_eq!(asked.body["data"][PENDING].as_str(), None, "the other one's stays");
                return Answer::Now(200, json!({ "metadata": {} }));
            }
            let look = looks.fetch_add(1, Relaxed) + 1;
            let mut now = with_ttl(if look == 1 { "5m" } else { "1m" }).begun("mesh", None).unwrap();
            now.metadata.resource_version = Some(look.to_string());
            Answer::Now(200, serde_json::to_value(&now).unwrap())
        });
        remember(&client, "mesh", &with_ttl("5m")).await.unwrap();
    }

    #[test]
    fn an_installation_that_was_not_finished_is_said_with_what_is_replaced() {
        let given = |ttl: &str| Given::of(json!({ "server": { "svidTTL": ttl }, "logLevel": "info" })).unwrap();
        assert!(
            unfinished(&given("5m"), &given("5m")).ends_with("with these settings: all manifests are applied again")
        );
        let other = unfinished(&given("5m"), &given("1m"));
        assert!(other.contains("interrupted") && other.contains("other settings (server.svidTTL)"), "{other}");
    }

    #[test]
    fn what_is_remembered_is_what_was_named_and_it_is_read_again() {
        let given = json!({ "trustDomain": "td", "agent": { "podAnnotations": { "note": "a: \"b\"\n# c" } } });
        let memory = Memory::new(Given::of(given).unwrap());
        let object = memory.object("mesh").unwrap();
        assert_eq!(Memory::read(&object), Ok(memory));
        let text = &object.data.as_ref().unwrap()[VALUES];
        assert!(!text.contains("clusterName"), "no defaults: {text}");
        let nothing = Memory::new(Given::default());
        assert_eq!(Memory::read(&nothing.object("mesh").unwrap()), Ok(nothing));
    }

    #[test]
    fn a_memory_that_does_not_say_which_defaults_it_had_has_the_first_ones() {
        let with = |said: Option<&str>| {
            let mut object = Memory::new(Given::default()).object("mesh").unwrap();
            let data = object.data.as_mut().unwrap();
            assert_eq!(data.remove(DEFAULTS).unwrap(), Revision::NOW.to_string());
            data.extend(said.map(|said| (DEFAULTS.to_owned(), said.to_owned())));
            Memory::read(&object).map(|memory| memory.defaults)
        };
        assert_eq!((with(None), with(Some("1"))), (Ok(Revision::FIRST), Ok(Revision::FIRST)));
        assert_eq!(with(Some("x")).unwrap_err(), "key `defaults`: `x` is no number");
    }

    #[test]
    fn a_memory_that_somebody_has_damaged_says_where() {
        let with = |values: &str| {
            let mut object = Memory::new(Given::default()).object("mesh").unwrap();
            object.data.as_mut().unwrap().insert(VALUES.into(), values.into());
            Memory::read(&object).unwrap_err()
        };
        assert!(with("[").starts_with("key `values.yaml`"));
        assert_eq!(with("- a"), "key `values.yaml`: `[\"a\"]` is no object");
        assert_eq!(Memory::read(&ConfigMap::default()).unwrap_err(), "it has no key `values.yaml`");
    }
}
