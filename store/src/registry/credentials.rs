//! Credentials: what `docker login` left, in `config.json` or with a helper (docker/cli, "Credential store").
//!
//! In: the folder of Docker's configuration, and a registry's host. Out: a user and a password, an identity token, or nothing. They are read
//! when a registry asks for them, and sent to nobody else.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Formatter};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::printable::Printable;

/// What Docker calls its own registry in its configuration.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The most that is read of a configuration or a helper's answer, in bytes.
const MOST: u64 = 1 << 20;
/// How long a helper may take: it may ask its user.
const HELPER_PATIENCE: Duration = Duration::from_secs(60);

/// Why credentials can't be had.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file is there and can't be read.
    #[error("Docker's configuration {} can't be read.", .path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not JSON, or not Docker's.
    #[error("Docker's configuration {} can't be understood: mend it, or log in again.", .path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An `auth` that is not base64 of `user:password`.
    #[error("Docker's configuration {} has unreadable credentials for {host}: log in again.", .path.display())]
    BadAuth {
        /// Its path.
        path: PathBuf,
        /// The registry.
        host: String,
    },
    /// It is called something that no program is.
    #[error("Docker's configuration names the credential helper {0:?}, which is no program's name.")]
    BadHelper(Printable),
    /// It can't be started.
    #[error("The credential helper {program} can't be run.")]
    HelperBroken {
        /// Its program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It failed, took too long, or said something strange.
    #[error("The credential helper {program} gave no credentials for {host}: {said}.")]
    HelperFailed {
        /// Its program.
        program: String,
        /// The registry.
        host: String,
        /// What it said.
        said: Printable,
    },
}

/// What proves to a registry who pulls.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// For Basic, or in exchange for a token.
    Password { user: String, password: String },
    /// Docker's OAuth 2 refresh token, in exchange for a token only.
    IdentityToken(String),
}

impl Debug for Credential {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(…)")
    }
}

impl Credential {
    /// The value of an `Authorization` header, where a password is had.
    pub(crate) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Self::IdentityToken(_) => None,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Looks up the credentials for a registry (`docker.io`, `host:port`).
pub(crate) fn find(folder: &Path, host: &str) -> Result<Option<Credential>, CredentialsError> {
    let path = folder.join("config.json");
    let Some(config) = read(&path)? else { return Ok(None) };
    let key = if host == "docker.io" { DOCKER_HUB_KEY } else { host };
    if let Some(helper) = config.cred_helpers.get(host).or(config.creds_store.as_ref())
        && let Some(credential) = ask(&program(helper)?, key, HELPER_PATIENCE)?
    {
        return Ok(Some(credential));
    }
    let same = |stored: &str| stored == key || bare(stored) == host;
    let Some(auth) = config.auths.iter().find_map(|(stored, auth)| same(stored).then_some(auth)) else {
        return Ok(None);
    };
    auth.credential().map_err(|()| CredentialsError::BadAuth { path, host: host.to_owned() })
}

fn read(path: &Path) -> Result<Option<Config>, CredentialsError> {
    let failed = |source| CredentialsError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
    let config = serde_json::from_slice(&bytes);
    config.map(Some).map_err(|source| CredentialsError::Malformed { path: path.to_owned(), source })
}

/// `https://host:port/v1/` is `host:port`, in old configurations.
fn bare(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

impl Auth {
    fn credential(&self) -> Result<Option<Credential>, ()> {
        if let Some(token) = self.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credential::IdentityToken(token.clone())));
        }
        if let (Some(user), Some(password)) = (&self.username, &self.password) {
            return Ok(Some(Credential::Password { user: user.clone(), password: password.clone() }));
        }
        let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) else { return Ok(None) };
        let text = STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or(())?;
        let (user, password) = text.trim_end_matches('\0').split_once(':').ok_or(())?;
        Ok(Some(Credential::Password { user: user.into(), password: password.into() }))
    }
}

/// `docker-credential-NAME`, to be found on the PATH.
fn program(helper: &str) -> Result<String, CredentialsError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if helper.is_empty() || !helper.bytes().all(plain) {
        return Err(CredentialsError::BadHelper(Printable::new(helper)));
    }
    Ok(format!("docker-credential-{helper}"))
}

/// Runs a helper's `get` with the registry on its standard input (docker/docker-credential-helpers, README).
fn ask(program: &str, key: &str, patience: Duration) -> Result<Option<Credential>, CredentialsError> {
    let broken = |source| CredentialsError::HelperBroken { program: program.to_owned(), source };
    let failed = |said: &str| CredentialsError::HelperFailed {
        program: program.to_owned(),
        host: key.to_owned(),
        said: Printable::new(said.trim()),
    };
    let spawned = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        // A configuration that came from another machine: what is public can still be pulled.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(program, "the credential helper is not installed; going on without credentials");
            return Ok(None);
        }
        Err(error) => return Err(broken(error)),
    };
    if let Some(mut input) = child.stdin.take() {
        // A helper that ends without reading says why by its status.
        let _ = input.write_all(key.as_bytes());
    }
    let output = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        output.map_or(Ok(0), |output| output.take(MOST).read_to_end(&mut text)).map(|_| text)
    });
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().map_err(broken)? {
            Some(status) => break status,
            None if begun.elapsed() > patience => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed("it did not answer in time"));
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = reader.join().map_err(|_| failed("its answer was not read"))?.map_err(broken)?;
    let text = String::from_utf8_lossy(&text);
    if !status.success() {
        return if text.contains("credentials not found") { Ok(None) } else { Err(failed(&text)) };
    }
    let answer: Answer = serde_json::from_str(&text).map_err(|_| failed("its answer is not understood"))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credential::IdentityToken(answer.secret),
        _ => Credential::Password { user: answer.username, password: answer.secret },
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn lookup(config: &str, host: &str) -> Result<Option<Credential>, CredentialsError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config).unwrap();
        find(folder.path(), host)
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn every_form_of_docker_logins_is_found_under_the_registrys_name_only() {
        let auth = STANDARD.encode("me:pass:word");
        let config = format!(
            r#"{{"auths": {{
                "registry.example": {{"auth": "{auth}"}},
                "https://old.example:5000/v1/": {{"username": "a", "password": "b"}},
                "https://index.docker.io/v1/": {{"auth": "{auth}", "identitytoken": "t"}},
                "empty.example": {{}}
            }}, "HttpHeaders": {{}}}}"#
        );
        assert_eq!(lookup(&config, "registry.example").unwrap(), password("me", "pass:word"));
        assert_eq!(lookup(&config, "old.example:5000").unwrap(), password("a", "b"));
        assert_eq!(lookup(&config, "docker.io").unwrap(), Some(Credential::IdentityToken("t".into())));
        for other in ["empty.example", "other.example", "registry.example:5000", "old.example"] {
            assert_eq!(lookup(&config, other).unwrap(), None, "{other}");
        }
        assert_eq!(find(Path::new("/no/such/folder"), "a").unwrap(), None);
    }

    #[test]
    fn what_is_damaged_is_told_and_never_shown() {
        let config = r#"{"auths": {"a.example": {"auth": "c2VjcmV0"}}}"#;
        let said = lookup(config, "a.example").unwrap_err().to_string();
        assert!(
            said.contains("a.example") && !said.contains("secret") && !said.contains("c2VjcmV0"),
            "{said}"
        );
        assert!(lookup("{", "a").unwrap_err().to_string().contains("config.json"));
        assert!(!format!("{:?}", password("me", "hidden")).contains("hidden"));
        let bad = r#"{"credsStore": "../../bin/sh"}"#;
        assert!(matches!(lookup(bad, "a"), Err(CredentialsError::BadHelper(_))));
        assert_eq!(lookup(r#"{"credsStore": "not-installed-anywhere"}"#, "a").unwrap(), None);
    }

    #[test]
    fn helpers_are_asked_in_their_own_protocol() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker-credential-test");
        let script = "#!/bin/sh\nread -r host || true\ncase $host in\n\
            known.example) echo '{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"s\"}';;\n\
            token.example) echo '{\"Username\":\"<token>\",\"Secret\":\"s\"}';;\n\
            broken.example) echo 'the vault is locked'; exit 1;;\n\
            slow.example) exec sleep 60;;\n\
            *) echo 'credentials not found in native keychain'; exit 1;;\nesac\n";
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let program = path.to_str().unwrap();
        let ask_for = |host| ask(program, host, Duration::from_secs(20));
        assert_eq!(ask_for("known.example").unwrap(), password("u", "s"));
        assert_eq!(ask_for("token.example").unwrap(), Some(Credential::IdentityToken("s".into())));
        assert_eq!(ask_for("other.example").unwrap(), None);
        assert!(ask_for("broken.example").unwrap_err().to_string().contains("the vault is locked"));
        let slow = ask(program, "slow.example", Duration::from_millis(100));
        assert!(slow.unwrap_err().to_string().contains("in time"));
    }
}
