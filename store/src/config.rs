//! An image's configuration (OCI image-spec 1.1, config.md): what to run, as whom, where, and for which platform.
//!
//! In: bytes whose digest was checked. Out: [`ImageConfig`]. Fields that we don't know are left out, and `null` is as good as
//! absent: Docker, BuildKit, umoci and Go's encoder differ there.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;
use crate::platform::Platform;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a field of another type.
    #[error("The configuration {digest} is not an image's configuration.")]
    Malformed {
        /// The configuration.
        digest: Digest,
        /// Which field.
        #[source]
        source: serde_json::Error,
    },
    /// It and the manifest disagree.
    #[error(
        "The configuration {digest} names {named} layers, and the image has {present}: it was not built properly."
    )]
    LayerCount {
        /// The configuration.
        digest: Digest,
        /// How many `diff_ids` it has.
        named: usize,
        /// How many layers the manifest has.
        present: usize,
    },
    /// `rootfs.type` is not `layers`.
    #[error("The configuration {0} describes no layers: its root file system is of an unknown type.")]
    UnknownRootfs(Digest),
    /// No system call takes such a string.
    #[error("The configuration {digest} has a NUL character in {field}.")]
    Nul {
        /// The configuration.
        digest: Digest,
        /// `Env`, `Cmd`…
        field: &'static str,
    },
}

/// What an image says about running it. Serialised with the specification's own names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ImageConfig {
    /// `NAME=value`.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// What runs, whatever the user's words are.
    #[serde(default, deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// What runs after the entry point if the user says nothing else.
    #[serde(default, deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Where; empty is `/`.
    #[serde(default, deserialize_with = "or_default")]
    pub working_dir: String,
    /// As whom: `user`, `uid`, `user:group`, `uid:gid`; empty is root.
    #[serde(default, deserialize_with = "or_default")]
    pub user: String,
    /// What ends it politely: `SIGTERM`, `SIGRTMIN+3`, `15`.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Folders whose content is not the image's but the container's.
    #[serde(default, deserialize_with = "keys")]
    pub volumes: BTreeSet<String>,
    /// `80/tcp`, `53/udp`, `80`.
    #[serde(default, deserialize_with = "keys")]
    pub exposed_ports: BTreeSet<String>,
    /// Free words.
    #[serde(default, deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// What it was built for; `os` is empty where the image doesn't say.
    #[serde(default)]
    pub platform: Platform,
}

/// `null` is the default, as for Go.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    d: D,
) -> Result<T, D::Error> {
    Option::deserialize(d).map(Option::unwrap_or_default)
}

/// A set written as `{"a": {}, "b": {}}`, as Go writes one; or, from our own pen, as `["a", "b"]`.
fn keys<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeSet<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Set {
        Object(BTreeMap<String, serde::de::IgnoredAny>),
        Array(BTreeSet<String>),
    }
    Ok(match Option::deserialize(d)? {
        None => BTreeSet::new(),
        Some(Set::Object(map)) => map.into_keys().collect(),
        Some(Set::Array(set)) => set,
    })
}

#[derive(Deserialize)]
struct Whole {
    #[serde(default, deserialize_with = "or_default")]
    os: String,
    #[serde(default, deserialize_with = "or_default")]
    architecture: String,
    #[serde(default, deserialize_with = "or_default")]
    variant: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    config: ImageConfig,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    #[serde(rename = "type", default, deserialize_with = "or_default")]
    kind: String,
    #[serde(default, deserialize_with = "or_default")]
    diff_ids: Vec<Digest>,
}

/// Reads a configuration: what it says about running, and the digest of each layer's uncompressed tar, lowest first.
///
/// # Errors
///
/// If it is malformed, or has another number of layers than `layers`.
pub(crate) fn parse(
    bytes: &[u8],
    digest: &Digest,
    layers: usize,
) -> Result<(ImageConfig, Vec<Digest>), ConfigError> {
    let whole: Whole = serde_json::from_slice(bytes)
        .map_err(|source| ConfigError::Malformed { digest: digest.clone(), source })?;
    if whole.rootfs.kind != "layers" && !whole.rootfs.kind.is_empty() {
        return Err(ConfigError::UnknownRootfs(digest.clone()));
    }
    let named = whole.rootfs.diff_ids.len();
    if named != layers {
        return Err(ConfigError::LayerCount { digest: digest.clone(), named, present: layers });
    }
    let mut config = whole.config;
    config.platform = Platform {
        os: whole.os,
        architecture: whole.architecture,
        variant: whole.variant.filter(|variant| !variant.is_empty()),
    };
    if let Some(field) = config.field_with_nul() {
        return Err(ConfigError::Nul { digest: digest.clone(), field });
    }
    Ok((config, whole.rootfs.diff_ids))
}

impl ImageConfig {
    fn field_with_nul(&self) -> Option<&'static str> {
        let nul = |text: &String| text.contains('\0');
        [
            ("Env", self.env.iter().any(nul)),
            ("Entrypoint", self.entrypoint.iter().any(nul)),
            ("Cmd", self.cmd.iter().any(nul)),
            ("WorkingDir", nul(&self.working_dir)),
            ("User", nul(&self.user)),
            ("Volumes", self.volumes.iter().any(nul)),
        ]
        .into_iter()
        .find_map(|(field, found)| found.then_some(field))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(document: &serde_json::Value, layers: usize) -> Result<(ImageConfig, Vec<Digest>), ConfigError> {
        parse(document.to_string().as_bytes(), &Digest::of(b""), layers)
    }

    #[test]
    fn every_field_is_read_and_strangers_are_left_out() {
        let document = json!({
            "created": "2026-01-01T00:00:00Z", "os": "linux", "architecture": "arm64", "variant": "v8", "history": [{}],
            "config": {
                "Env": ["PATH=/bin"], "Entrypoint": ["/init"], "Cmd": ["a", "b"], "WorkingDir": "/work", "User": "1:2",
                "StopSignal": "SIGQUIT", "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}, "Labels": {"a": "b"},
                "ArgsEscaped": true, "Healthcheck": {"Test": []}, "OnBuild": null,
            },
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"1")] },
        });
        let (config, diff_ids) = read(&document, 1).unwrap();
        assert_eq!(diff_ids, [Digest::of(b"1")]);
        assert_eq!(config.platform.to_string(), "linux/arm64/v8");
        assert_eq!((config.env[0].as_str(), config.entrypoint[0].as_str()), ("PATH=/bin", "/init"));
        assert_eq!(config.cmd, ["a", "b"]);
        assert_eq!((config.working_dir.as_str(), config.user.as_str()), ("/work", "1:2"));
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert!(config.volumes.contains("/v") && config.exposed_ports.contains("80/tcp"));
        assert_eq!(config.labels["a"], "b");
        let again: ImageConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let nothing = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": null } });
        let (absent, _) = read(&nothing, 0).unwrap();
        let mut nulls = nothing;
        nulls["config"] = json!({
            "Env": null, "Entrypoint": null, "Cmd": null, "Volumes": null, "ExposedPorts": null, "Labels": null,
            "StopSignal": null, "User": null, "WorkingDir": null,
        });
        assert_eq!(read(&nulls, 0).unwrap().0, absent);
        nulls["config"] = json!(null);
        assert_eq!(read(&nulls, 0).unwrap().0, absent);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = json!({ "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"1")] } });
        assert!(read(&good, 1).is_ok());
        assert!(matches!(read(&good, 2), Err(ConfigError::LayerCount { named: 1, present: 2, .. })));
        assert!(matches!(read(&json!({}), 0), Err(ConfigError::Malformed { .. })));
        assert!(matches!(read(&json!([]), 0), Err(ConfigError::Malformed { .. })));
        assert!(matches!(
            read(&json!({ "rootfs": { "type": "flat" } }), 0),
            Err(ConfigError::UnknownRootfs(_))
        ));
        let nul = json!({ "rootfs": {}, "config": { "Env": ["A=\0"] } });
        assert!(matches!(read(&nul, 0), Err(ConfigError::Nul { field: "Env", .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, &Digest::of(b""), 1);
        }

        #[test]
        fn a_configuration_with_any_place_changed_is_read_or_refused(
            at in any::<proptest::sample::Index>(),
            text in "[-0-9a-z\\[\\]{}\",:\\\\]{0,6}",
        ) {
            let mut bytes = json!({
                "os": "linux", "architecture": "amd64", "created": "2026-01-01T00:00:00Z",
                "config": { "Env": ["A=b"], "Cmd": ["sh"], "User": "0:0", "Volumes": { "/v": {} }, "StopSignal": "SIGTERM" },
                "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"1")] },
            }).to_string().into_bytes();
            let at = at.index(bytes.len());
            let end = (at + text.len()).min(bytes.len());
            bytes.splice(at..end, text.bytes());
            if let Ok((_, diff_ids)) = parse(&bytes, &Digest::of(b""), 1) {
                prop_assert_eq!(diff_ids.len(), 1);
            }
        }
    }
}
