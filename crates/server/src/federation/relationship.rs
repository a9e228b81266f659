//! One relationship: where a foreign trust domain's bundle is fetched, and how that endpoint is authenticated.

use std::fmt;
use std::str::FromStr;

use countersign_identity::shown::shown;
use countersign_identity::{SpiffeId, TrustDomain};
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::PathAndQuery;

/// Longest URL of a bundle endpoint, in bytes.
pub const MAX_URL_BYTES: usize = 2_048;
/// Port of https.
const HTTPS: u16 = 443;

/// Why text is no URL of a bundle endpoint (SPIFFE Federation 5.1).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{}` is no URL of a bundle endpoint: {why}", shown(text))]
pub struct UrlError {
    text: String,
    why: String,
}

/// The URL of a bundle endpoint: https, with a host and without userinfo or fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointUrl {
    text: String,
    host: String,
    port: u16,
    path: String,
}

impl EndpointUrl {
    /// The URL as it was given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Its host, an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Host and port, as a connection is made to them.
    pub fn server(&self) -> String {
        let (host, port) = (&self.host, self.port);
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// Host, and the port if it is not that of https, as a request names them.
    pub fn authority(&self) -> String {
        let server = self.server();
        server.strip_suffix(&format!(":{HTTPS}")).map_or(server.clone(), str::to_owned)
    }

    /// Path and query, beginning with `/`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where a redirect from here leads: to an https URL, or to another path of this server.
    pub fn redirected(&self, location: &str) -> Result<Self, UrlError> {
        if location.starts_with("//") {
            return format!("https:{location}").parse();
        }
        if location.starts_with('/') {
            return format!("https://{}{location}", self.authority()).parse();
        }
        location.parse()
    }
}

impl FromStr for EndpointUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let wrong = |why: &str| UrlError { text: text.to_owned(), why: why.to_owned() };
        if text.len() > MAX_URL_BYTES {
            return Err(wrong(&format!("it is longer than {MAX_URL_BYTES} bytes")));
        }
        // The parser below would drop it without a word.
        if text.contains('#') {
            return Err(wrong("it has a fragment (`#`)"));
        }
        let uri: Uri = text.parse().map_err(|e: tonic::codegen::http::uri::InvalidUri| wrong(&e.to_string()))?;
        if uri.scheme_str() != Some("https") {
            return Err(wrong("it must begin with `https://`"));
        }
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it has a user or password, and a bundle endpoint authenticates no client"));
        }
        let host = authority.host();
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(wrong("it names no host"));
        }
        let port = match authority.as_str().rsplit_once(':') {
            // Only what stands behind the host: an IPv6 address has colons of its own.
            Some((before, port)) if before == authority.host() => port.parse().ok().filter(|p| *p != 0),
            _ => Some(HTTPS),
        };
        let port = port.ok_or_else(|| wrong("its port is none"))?;
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { text: text.to_owned(), host: host.to_owned(), port, path })
    }
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// How a bundle endpoint is authenticated (SPIFFE Federation 5.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Profile {
    /// By a certificate for its host name, under the certificate authorities that this machine trusts.
    HttpsWeb,
    /// By an SVID of exactly this ID, under the bundle of the ID's trust domain.
    HttpsSpiffe(SpiffeId),
}

impl Profile {
    /// Its name in the standard.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HttpsWeb => "https_web",
            Self::HttpsSpiffe(_) => "https_spiffe",
        }
    }
}

/// A relationship with a foreign trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relationship {
    /// The foreign trust domain.
    pub trust_domain: TrustDomain,
    /// Where its bundle is fetched.
    pub url: EndpointUrl,
    /// How the endpoint is authenticated.
    pub profile: Profile,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_for_the_connection_and_the_request() {
        let cases = [
            ("https://a.test", "a.test:443", "a.test", "/"),
            ("https://a.test:8443/bundle?x=1", "a.test:8443", "a.test:8443", "/bundle?x=1"),
            ("https://[fd00::1]/b", "[fd00::1]:443", "[fd00::1]", "/b"),
            ("https://[fd00::1]:9443", "[fd00::1]:9443", "[fd00::1]:9443", "/"),
            ("https://192.0.2.1:443?x", "192.0.2.1:443", "192.0.2.1", "/?x"),
        ];
        for (text, server, authority, path) in cases {
            let url: EndpointUrl = text.parse().unwrap();
            assert_eq!((&*url.server(), &*url.authority(), url.path(), url.as_str()), (server, authority, path, text));
        }
        assert_eq!("https://[fd00::1]".parse::<EndpointUrl>().unwrap().host(), "fd00::1");
    }

    #[test]
    fn a_url_that_the_standard_does_not_allow_is_refused_with_the_rule() {
        let long = format!("https://a/{}", "x".repeat(MAX_URL_BYTES));
        for (text, rule) in [
            ("", "empty"),
            ("a.test", "https://"),
            ("http://a.test", "https://"),
            ("https://user:secret@a.test", "no client"),
            ("https://user@a.test", "no client"),
            ("https://a.test/#x", "fragment"),
            ("https://a.test:0", "port"),
            ("https://a.test:99999", "port"),
            ("https:///bundle", "format"),
            ("https://a test", "invalid"),
            (&long, "2048"),
        ] {
            let why = text.parse::<EndpointUrl>().unwrap_err().to_string();
            assert!(why.contains(rule), "{text}: {why}");
        }
    }

    #[test]
    fn a_redirect_leads_to_https_alone() {
        let url: EndpointUrl = "https://a.test:8443/old".parse().unwrap();
        let to = |location: &str| url.redirected(location).map(|u| u.as_str().to_owned());
        assert_eq!(to("/new?x").unwrap(), "https://a.test:8443/new?x");
        assert_eq!(to("https://b.test/").unwrap(), "https://b.test/");
        assert_eq!(to("//b.test/").unwrap(), "https://b.test/");
        for refused in ["http://a.test:8443/new", "new", "", "https://u@b.test/", "javascript:x"] {
            assert!(to(refused).is_err(), "{refused}");
        }
    }
}
