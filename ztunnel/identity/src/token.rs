//! The token that tells the control plane who asks: `AUTH_TOKEN`.

use std::{
    error::Error,
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// Where Kubernetes mounts it.
pub const DEFAULT_PATH: &str = "./var/run/secrets/tokens/istio-token";

/// Where the token comes from.
pub enum Token {
    /// A file, read for each call, as the kubelet replaces it.
    File(PathBuf),
    /// A file that may be absent: then there is no token.
    Optional(PathBuf),
    /// Itself.
    Literal(String),
}

/// There should be a token, and there is none.
#[derive(Debug)]
#[expect(clippy::module_name_repetitions, reason = "a bare `Error` says nothing")]
pub enum TokenError {
    /// The file cannot be read.
    Io(PathBuf, io::Error),
    /// The file is empty.
    Empty(PathBuf),
}

impl Token {
    /// Reads a setting: a path, the token itself, or nothing, which is [`DEFAULT_PATH`] if it is there.
    ///
    /// What begins like a path is one, though it may not exist yet: no token does.
    #[must_use]
    pub fn from_setting(setting: Option<&str>) -> Self {
        match setting {
            None | Some(DEFAULT_PATH) => Self::Optional(DEFAULT_PATH.into()),
            Some(text) if text.starts_with(['/', '.']) || Path::new(text).exists() => {
                Self::File(text.into())
            }
            Some(text) => Self::Literal(text.trim().into()),
        }
    }

    /// The token to send now, if any. Blocks for as long as a small file takes to read.
    ///
    /// # Errors
    ///
    /// Returns an error if a token was promised and is not there.
    pub fn read(&self) -> Result<Option<String>, TokenError> {
        let path = match self {
            Self::Literal(token) => return Ok(Some(token.clone())),
            Self::Optional(path) if !path.exists() => return Ok(None),
            Self::Optional(path) | Self::File(path) => path,
        };
        let text = fs::read_to_string(path).map_err(|e| TokenError::Io(path.clone(), e))?;
        // A newline at the end is not part of it (upstream fails on one).
        match text.trim() {
            "" => Err(TokenError::Empty(path.clone())),
            token => Ok(Some(token.into())),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) | Self::Optional(path) => f.debug_tuple("Token").field(path).finish(),
            Self::Literal(_) => f.write_str("Token(***)"),
        }
    }
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(path, _) => write!(f, "the token {} cannot be read", path.display()),
            Self::Empty(path) => write!(f, "the token {} is empty", path.display()),
        }
    }
}

impl Error for TokenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Empty(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_file_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let token = Token::from_setting(path.to_str());
        assert!(matches!(token.read(), Err(TokenError::Io(..))), "a path, though not there yet");
        for (text, expected) in [("one\n", Some("one")), (" two ", Some("two")), ("\n", None)] {
            fs::write(&path, text).unwrap();
            assert_eq!(token.read().ok().flatten().as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn literals_and_nothing() {
        let literal = Token::from_setting(Some("eyJhbGciOi.x.y\n"));
        assert_eq!(literal.read().unwrap().as_deref(), Some("eyJhbGciOi.x.y"));
        assert_eq!(format!("{literal:?}"), "Token(***)");
        assert_eq!(Token::from_setting(None).read().unwrap(), None);
    }
}
