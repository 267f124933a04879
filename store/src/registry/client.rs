//! The HTTP client of one registry: requests with proof of who asks, redirects, and answers told apart.
//!
//! ```text
//!   get ─▶ send ─ 3xx ─▶ send elsewhere (without the proof) ─ … ─▶ answer
//!            └── 401 ─▶ challenge ─▶ token or password ─▶ send again, once
//! ```
//!
//! Two rules hold everywhere: plain HTTP is spoken with loopback addresses or on request only, and the proof goes to the registry's own
//! origin only, wherever it redirects to.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::challenge::{self, Challenge};
use super::credentials::{self, Credential};
use super::refusal::RegistryError;
use crate::options::{Patience, PullOptions};
use crate::printable::Printable;
use crate::reference::{Remote, is_loopback};

/// A CDN behind a load balancer behind a mirror: more is a loop.
const MOST_REDIRECTS: usize = 5;
/// The most that is read of an error's or a token's document, in bytes.
const LARGEST_ANSWER: u64 = 256 << 10;

/// Speaks with one registry about one repository.
pub(super) struct Client {
    agent: Agent,
    /// `https://registry-1.docker.io`.
    base: String,
    /// For messages, and as the key of its credentials.
    host: String,
    repository: String,
    insecure: bool,
    docker_config: Option<std::path::PathBuf>,
    /// The `Authorization` that the registry took last.
    proof: Mutex<Option<String>>,
}

/// An answer, and whether it came from where we first asked.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    pub(super) redirected: bool,
}

impl Client {
    pub(super) fn new(remote: &Remote, options: &PullOptions) -> Self {
        let plain = options.insecure || remote.is_loopback();
        let api = if remote.host == "docker.io" { "registry-1.docker.io" } else { &remote.host };
        let base = format!("{}://{api}", if plain { "http" } else { "https" });
        Self {
            agent: agent(&options.patience, plain, remote.is_loopback()),
            base,
            host: remote.host.clone(),
            repository: remote.path.clone(),
            insecure: options.insecure,
            docker_config: options.docker_config.clone(),
            proof: Mutex::new(None),
        }
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Asks for something below `/v2/REPOSITORY/`.
    pub(super) fn get(&self, what: &str, headers: &[(&str, &str)]) -> Result<Answer, RegistryError> {
        let url = format!("{}/v2/{}/{what}", self.base, self.repository);
        let proof = self.proof();
        let answer = self.follow(&url, headers, proof.as_deref())?;
        if answer.redirected || answer.response.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let proof = self.authenticate(answer.response)?;
        let answer = self.follow(&url, headers, Some(&proof))?;
        if answer.response.status() != StatusCode::UNAUTHORIZED {
            *self.proof.lock().unwrap_or_else(PoisonError::into_inner) = Some(proof);
        }
        Ok(answer)
    }

    fn proof(&self) -> Option<String> {
        self.proof.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends a request wherever the registry says that it should go.
    fn follow(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        proof: Option<&str>,
    ) -> Result<Answer, RegistryError> {
        let mut url = url.to_owned();
        for hop in 0..=MOST_REDIRECTS {
            let mut request = self.agent.get(&url);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(proof) = proof.filter(|_| self.is_own(&url)) {
                request = request.header(AUTHORIZATION, proof);
            }
            tracing::debug!(url = %shown(&url), "asking");
            let response = request.call().map_err(|error| self.unreachable(&url, error))?;
            if !is_redirect(response.status()) {
                return Ok(Answer { response, redirected: hop > 0 });
            }
            url = self.target(&url, &response)?;
        }
        Err(RegistryError::Redirects(self.host.clone()))
    }

    /// Whether this is the registry's own origin: scheme, host and port.
    fn is_own(&self, url: &str) -> bool {
        url.strip_prefix(&self.base).is_some_and(|rest| rest.starts_with('/'))
    }

    /// Where a redirect leads, if it may lead there.
    fn target(&self, from: &str, response: &Response<Body>) -> Result<String, RegistryError> {
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).unwrap_or("");
        let bad = || RegistryError::BadRedirect { host: self.host.clone(), to: Printable::new(location) };
        let from: Uri = from.parse().map_err(|_| bad())?;
        let origin = |uri: &Uri| Some((uri.scheme_str()?.to_owned(), uri.authority()?.to_string()));
        let (scheme, authority) = origin(&from).ok_or_else(bad)?;
        let absolute = if location.starts_with("//") {
            format!("{scheme}:{location}")
        } else if location.starts_with('/') {
            format!("{scheme}://{authority}{location}")
        } else {
            location.to_owned()
        };
        let to: Uri = absolute.parse().map_err(|_| bad())?;
        let (scheme, authority) = origin(&to).ok_or_else(bad)?;
        // A password in a URL is nobody's business here.
        if authority.contains('@') {
            return Err(bad());
        }
        match scheme.as_str() {
            "https" => Ok(absolute),
            // Never down from HTTPS: who does that could also read along.
            "http" if self.base.starts_with("http:") && (self.insecure || is_loopback(&authority)) => {
                Ok(absolute)
            }
            _ => Err(bad()),
        }
    }

    /// Meets a challenge and returns the value of `Authorization`.
    fn authenticate(&self, refusal: Response<Body>) -> Result<String, RegistryError> {
        let headers = refusal.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenge::best(headers.iter().filter_map(|value| value.to_str().ok()));
        let credential = match &self.docker_config {
            Some(folder) => credentials::find(folder, &self.host)?,
            None => None,
        };
        let denied = |refusal| RegistryError::Denied {
            host: self.host.clone(),
            repository: self.repository.clone(),
            said: said(refusal),
        };
        match challenge {
            Some(Challenge::Bearer { realm, service, scope }) => {
                drop(refusal);
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                self.token(&realm, service.as_deref(), &scope, credential.as_ref())
            }
            Some(Challenge::Basic) => {
                credential.as_ref().and_then(Credential::basic).ok_or_else(|| denied(refusal))
            }
            None => Err(denied(refusal)),
        }
    }

    /// Fetches a token (Docker's token authentication; with an identity token by its OAuth 2 variant).
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credential: Option<&Credential>,
    ) -> Result<String, RegistryError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        self.check_realm(realm)?;
        let failed = |error| self.unreachable(realm, error);
        let service = service.map(|service| ("service", service));
        let response = match credential {
            Some(Credential::IdentityToken(token)) => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", "carrel"),
                    ("scope", scope),
                    ("refresh_token", token),
                ];
                self.agent.post(realm).send_form(form.into_iter().chain(service)).map_err(failed)?
            }
            other => {
                let query = [("scope", scope)].into_iter().chain(service);
                let mut request = self.agent.get(realm).query_pairs(query);
                if let Some(basic) = other.and_then(Credential::basic) {
                    request = request.header(AUTHORIZATION, basic);
                }
                request.call().map_err(failed)?
            }
        };
        if response.status() != StatusCode::OK {
            let (host, repository) = (self.host.clone(), self.repository.clone());
            return Err(RegistryError::Denied { host, repository, said: said(response) });
        }
        let text = limited(response).map_err(failed)?;
        let token: Option<Token> = serde_json::from_slice(&text).ok();
        let token = token.and_then(|token| token.token.or(token.access_token));
        // Into a header it goes as it is: nothing that could end the line.
        token
            .filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()))
            .map(|token| format!("Bearer {token}"))
            .ok_or_else(|| RegistryError::BadToken(self.host.clone()))
    }

    /// Passwords go to a token service over TLS, or over the same plain way on which the registry is spoken to.
    fn check_realm(&self, realm: &str) -> Result<(), RegistryError> {
        let bad = || RegistryError::BadRealm { host: self.host.clone(), realm: Printable::new(realm) };
        let uri: Uri = realm.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?.as_str();
        let plain = self.base.starts_with("http:") && (self.insecure || is_loopback(authority));
        match uri.scheme_str() {
            Some("https") => Ok(()),
            Some("http") if plain => Ok(()),
            _ => Err(bad()),
        }
    }

    /// No answer at all.
    pub(super) fn unreachable(&self, url: &str, error: ureq::Error) -> RegistryError {
        let at: Option<Uri> = url.parse().ok();
        let host = at.as_ref().and_then(|uri| uri.authority()).map_or("", |authority| authority.as_str());
        if matches!(error, ureq::Error::Timeout(_)) {
            return RegistryError::Stalled(Printable::new(host));
        }
        let what = match at.as_ref().and_then(Uri::scheme_str) {
            // So are loopback addresses spoken to anyway.
            Some("http") => "its name and the network, and whether it listens there",
            _ => "its name and the network, and whether it speaks plain HTTP (--insecure)",
        };
        RegistryError::Unreachable { host: Printable::new(host), what, source: Box::new(error) }
    }
}

fn agent(patience: &Patience, plain: bool, loopback: bool) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent(concat!("carrel/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(patience.connect))
        .timeout_connect(Some(patience.connect))
        .timeout_recv_response(Some(patience.stall))
        .timeout_per_read(Some(patience.stall))
        .timeout_per_write(Some(patience.stall));
    if loopback {
        // A proxy's loopback is another machine's.
        config = config.proxy(None);
    }
    // A token service or a CDN may speak HTTPS behind a plain registry, but reading certificates takes a while: on loopback
    // Mozilla's are good enough.
    if !(plain && loopback) {
        config = config.tls_config(TlsConfig::builder().root_certs(roots()).build());
    }
    config.build().new_agent()
}

/// The machine's own certificates, so that a company's registry works and a root that its owner removed doesn't; Mozilla's where
/// there are none. `SSL_CERT_FILE` and `SSL_CERT_DIR` count.
fn roots() -> RootCerts {
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::debug!(%error, "a certificate is passed over");
    }
    if native.certs.is_empty() {
        return RootCerts::WebPki;
    }
    native.certs.iter().map(|der| Certificate::from_der(der).to_owned()).into()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// A URL without its query, which in a redirect is often a signature.
fn shown(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

/// How long a registry asks us to wait, in the form in which it is a number of seconds.
pub(super) fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    Some(Duration::from_secs(value.trim().parse::<u16>().ok()?.into()))
}

/// What a registry says about a failure: its own words where there are some (distribution-spec 1.1, "Error Codes").
pub(super) fn said(response: Response<Body>) -> Printable {
    #[derive(Deserialize)]
    struct Failures {
        errors: Vec<Failure>,
    }
    #[derive(Deserialize)]
    struct Failure {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let status = response.status();
    let text = limited(response).unwrap_or_default();
    let failures: Option<Failures> = serde_json::from_slice(&text).ok();
    let first = failures.and_then(|failures| failures.errors.into_iter().next());
    match first {
        Some(Failure { code, message }) if !message.is_empty() => {
            Printable::new(&format!("{message} ({code}, {})", status.as_u16()))
        }
        _ => Printable::new(&status.to_string()),
    }
}

fn limited(response: Response<Body>) -> Result<Vec<u8>, ureq::Error> {
    response.into_body().into_with_config().limit(LARGEST_ANSWER).read_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::options;

    fn client(name: &str, insecure: bool) -> Client {
        let remote: Remote = name.parse().unwrap();
        Client::new(&remote, &PullOptions { insecure, ..options() })
    }

    fn redirect(client: &Client, to: &str) -> Result<String, RegistryError> {
        let response =
            Response::builder().status(307).header("Location", to).body(Body::builder().data("")).unwrap();
        client.target(&format!("{}/v2/a/blobs/x", client.base), &response)
    }

    #[test]
    fn plain_http_is_for_loopback_or_on_request() {
        assert_eq!(client("debian", false).base, "https://registry-1.docker.io");
        assert_eq!(client("127.0.0.1:5000/a", false).base, "http://127.0.0.1:5000");
        assert_eq!(client("[::1]:5000/a", false).base, "http://[::1]:5000");
        assert_eq!(client("registry.lan:5000/a", false).base, "https://registry.lan:5000");
        assert_eq!(client("registry.lan:5000/a", true).base, "http://registry.lan:5000");
    }

    #[test]
    fn redirects_never_lead_down_to_plain_http_elsewhere() {
        let tls = client("registry.example/a", false);
        assert_eq!(redirect(&tls, "https://cdn.example/x?sig=1").unwrap(), "https://cdn.example/x?sig=1");
        assert_eq!(redirect(&tls, "/other").unwrap(), "https://registry.example/other");
        assert_eq!(redirect(&tls, "//cdn.example/x").unwrap(), "https://cdn.example/x");
        for bad in
            ["http://cdn.example/x", "http://127.0.0.1/x", "ftp://a/b", "", "x", "https://u:p@cdn.example/"]
        {
            assert!(redirect(&tls, bad).is_err(), "{bad}");
        }
        let loopback = client("127.0.0.1:5000/a", false);
        assert!(redirect(&loopback, "http://127.0.0.2:1/x").is_ok());
        assert!(redirect(&loopback, "http://registry.example/x").is_err());
        assert!(redirect(&client("registry.lan/a", true), "http://cdn.lan/x").is_ok());
    }

    #[test]
    fn the_proof_is_for_the_registrys_own_origin() {
        let client = client("registry.example:5000/a", false);
        assert!(client.is_own("https://registry.example:5000/v2/a/blobs/x"));
        for other in [
            "https://registry.example/v2/",
            "https://registry.example:50001/v2/",
            "https://registry.example:5000.evil.example/",
            "http://registry.example:5000/v2/",
        ] {
            assert!(!client.is_own(other), "{other}");
        }
    }

    #[test]
    fn passwords_go_to_no_token_service_over_plain_http_elsewhere() {
        let tls = client("registry.example/a", false);
        assert!(tls.check_realm("https://auth.example/token").is_ok());
        assert!(tls.check_realm("http://auth.example/token").is_err());
        assert!(tls.check_realm("http://127.0.0.1/token").is_err());
        assert!(tls.check_realm("nonsense").is_err());
        let loopback = client("127.0.0.1:1/a", false);
        assert!(loopback.check_realm("http://127.0.0.1:2/token").is_ok());
        assert!(loopback.check_realm("http://auth.example/token").is_err());
    }
}
