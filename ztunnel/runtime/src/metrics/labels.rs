//! Label sets, rendered once.

use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::{Arc, LazyLock};

use hashbrown::DefaultHashBuilder;

// One seed for the process: label values come from peers, who must not be able to make them collide.
static SEED: LazyLock<DefaultHashBuilder> = LazyLock::new(DefaultHashBuilder::default);

/// Labels in the order given, as their text `a="b",c="d"`, which is also the key of a series. Cheap to clone;
/// hashed once.
#[derive(Clone)]
pub struct Labels {
    text: Arc<str>,
    hash: u64,
}

/// Collects labels. Clone it half-way to share a beginning.
#[derive(Clone, Debug, Default)]
pub struct Builder(String);

impl Labels {
    /// No labels.
    #[must_use]
    pub fn empty() -> Self {
        Builder::default().build()
    }

    /// Renders labels. Names are ours and not checked; values are escaped.
    pub fn new<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut builder = Builder::default();
        for (name, value) in labels {
            builder.push(name, value);
        }
        builder.build()
    }

    /// Starts a label set of about so many bytes.
    #[must_use]
    pub fn builder(capacity: usize) -> Builder {
        Builder(String::with_capacity(capacity))
    }

    /// The text, without braces.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Well spread over all 64 bits.
    pub(super) const fn hash_value(&self) -> u64 {
        self.hash
    }
}

impl Builder {
    /// Adds a label.
    pub fn push(&mut self, name: &str, value: &str) -> &mut Self {
        let text = &mut self.0;
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        escape(text, value);
        text.push('"');
        self
    }

    /// Ends the label set.
    #[must_use]
    pub fn build(&self) -> Labels {
        let text: Arc<str> = self.0.as_str().into();
        Labels { hash: SEED.hash_one(&*text), text }
    }
}

/// Escapes backslash, quote and line feed, as the exposition formats want.
pub(super) fn escape(text: &mut String, value: &str) {
    if !value.bytes().any(|byte| matches!(byte, b'\\' | b'"' | b'\n')) {
        text.push_str(value);
        return;
    }
    for char in value.chars() {
        match char {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

impl PartialEq for Labels {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && (Arc::ptr_eq(&self.text, &other.text) || self.text == other.text)
    }
}

impl Eq for Labels {}

impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Default for Labels {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{}}}", self.text)
    }
}
