//! Who may do what. Only hashes of tokens are kept, in memory as in the file, and comparing takes the same time whatever is
//! guessed.

use std::path::Path;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::ServiceError;

/// Variable that holds a token of every scope. Workers do not inherit it.
pub const TOKEN_VARIABLE: &str = "PATRICKSTAR_TOKEN";
/// Tokens that can be guessed are worse than none: they look safe.
const SHORTEST: usize = 16;

/// What a token may do; each scope includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Look.
    Read,
    /// Upload, create, pause, cancel, have texts written.
    Write,
    /// Change the service.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Scope; 3] = [Scope::Read, Scope::Write, Scope::Admin];

    /// As it is written in the token file.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Write => "write",
            Scope::Admin => "admin",
        }
    }
}

/// The tokens that are accepted.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<(Scope, [u8; 32])>);

impl Tokens {
    /// From a file of lines `SCOPE sha256:HEX`, and a token of every scope.
    pub fn load(file: Option<&Path>, token: Option<&str>) -> Result<Self, ServiceError> {
        let mut tokens = Vec::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|error| ServiceError::io(path, error))?;
            for (index, line) in text.lines().enumerate() {
                let line = line.trim();
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                // The line itself stays out of the message: it may be a token.
                let entry = parse_line(line).ok_or_else(|| {
                    ServiceError::Setup(format!(
                        "{} line {}: write `read`, `write` or `admin`, then sha256: and the 64 digits that \
                         `printf %s TOKEN | sha256sum` prints",
                        path.display(),
                        index + 1
                    ))
                })?;
                tokens.push(entry);
            }
            if tokens.is_empty() {
                return Err(ServiceError::Setup(format!(
                    "{} holds no token: add one, or leave it out",
                    path.display()
                )));
            }
        }
        if let Some(token) = token {
            if token.len() < SHORTEST {
                let message = format!("{TOKEN_VARIABLE} is shorter than {SHORTEST} characters: use a random one");
                return Err(ServiceError::Setup(message));
            }
            tokens.push((Scope::Admin, Sha256::digest(token.as_bytes()).into()));
        }
        Ok(Tokens(tokens))
    }

    /// Whether nobody has to show a token.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the bearer of `token` may do, and the number that the token goes by.
    pub fn find(&self, token: &str) -> Option<(Scope, usize)> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        // All are compared, so that the time does not tell which one was close.
        let known = self.0.iter().enumerate().filter(|(_, (_, known))| bool::from(known.ct_eq(&hash)));
        known.map(|(number, (scope, _))| (*scope, number)).max()
    }
}

fn parse_line(line: &str) -> Option<(Scope, [u8; 32])> {
    let (scope, hash) = line.split_once(char::is_whitespace)?;
    let scope = Scope::ALL.into_iter().find(|known| known.name() == scope)?;
    let digits = hash.trim().strip_prefix("sha256:")?;
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
    }
    Some((scope, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_the_scope_of_their_line_and_are_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        let hex = |token: &str| Sha256::digest(token.as_bytes()).iter().map(|b| format!("{b:02x}")).collect::<String>();
        std::fs::write(&path, format!("# two\nread sha256:{}\n\nwrite sha256:{}\n", hex("r"), hex("w"))).unwrap();
        let tokens = Tokens::load(Some(&path), Some("a-long-random-token")).unwrap();
        assert_eq!(tokens.find("r"), Some((Scope::Read, 0)));
        assert_eq!(tokens.find("w"), Some((Scope::Write, 1)));
        assert_eq!(tokens.find("a-long-random-token"), Some((Scope::Admin, 2)));
        assert_eq!(tokens.find(&hex("r")), None);
        assert!(Tokens::load(None, Some("short")).is_err());
        for bad in ["read secret-token-in-the-open", "root sha256:00", &format!("read sha256:{}", "g".repeat(64)), "x"]
        {
            std::fs::write(&path, bad).unwrap();
            let error = Tokens::load(Some(&path), None).unwrap_err().to_string();
            assert!(error.contains("line 1") && !error.contains("in-the-open"), "{error}");
        }
    }
}
