//! Challenges: how a registry says in a 401 what proof it wants (RFC 9110 §11.6.1; Docker's token authentication specification).
//!
//! In: the values of `WWW-Authenticate`. Out: the challenge that we can meet.

/// What a registry wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token from this service.
    Bearer {
        /// Where tokens are given out.
        realm: String,
        /// For whom.
        service: Option<String>,
        /// For what.
        scope: Option<String>,
    },
    /// User and password.
    Basic,
}

/// Finds the best challenge: a token is worth less to a thief than a password.
pub(super) fn best<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for (scheme, parameters) in parse(header) {
            let find = |name: &str| {
                let found = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = find("realm")
            {
                return Some(Challenge::Bearer { realm, service: find("service"), scope: find("scope") });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

type Parsed = Vec<(String, Vec<(String, String)>)>;

/// `SCHEME key=value, key="value", SCHEME …`. What can't be read ends it: what came before still counts.
fn parse(header: &str) -> Parsed {
    let mut challenges: Parsed = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (token, after) = split_token(rest);
        if token.is_empty() {
            return challenges;
        }
        let after = after.trim_start_matches([' ', '\t']);
        let Some(value) = after.strip_prefix('=') else {
            challenges.push((token.to_owned(), Vec::new()));
            rest = after;
            continue;
        };
        let Some((value, after)) = split_value(value.trim_start_matches([' ', '\t'])) else {
            return challenges;
        };
        let Some((_, parameters)) = challenges.last_mut() else { return challenges };
        parameters.push((token.to_owned(), value));
        rest = after;
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

fn split_token(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c| !is_token(c)).unwrap_or(text.len()))
}

/// A token or a quoted string, in which a backslash takes the next character as it is.
fn split_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.into(), service: owned(service), scope: owned(scope) })
    }

    #[test]
    fn what_registries_send_is_read() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull""#;
        let scope = Some("repository:library/debian:pull");
        let expected = bearer("https://auth.docker.io/token", Some("registry.docker.io"), scope);
        assert_eq!(best([hub].into_iter()), expected);
        let commas = r#"Bearer realm="https://a/b", scope="repository:x:pull,push" , error="invalid_token""#;
        assert_eq!(best([commas].into_iter()), bearer("https://a/b", None, Some("repository:x:pull,push")));
        assert_eq!(best([r#"Basic realm="Registry Realm""#].into_iter()), Some(Challenge::Basic));
        assert_eq!(best([r#"basic realm=x, BEARER realm="y""#].into_iter()), bearer("y", None, None));
        assert_eq!(best([r#"Basic realm="x""#, "Bearer realm=y"].into_iter()), bearer("y", None, None));
        assert_eq!(best([r#"Bearer realm="quo\"ted""#].into_iter()), bearer("quo\"ted", None, None));
        for nothing in ["", "Negotiate", "Bearer", r#"Bearer realm="open"#, "realm=x"] {
            assert_eq!(best([nothing].into_iter()), None, "{nothing}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(header in "\\PC{0,80}", odd in "[Ba-e \",=\\\\]{0,40}") {
            let _ = best([header.as_str(), odd.as_str()].into_iter());
        }
    }
}
