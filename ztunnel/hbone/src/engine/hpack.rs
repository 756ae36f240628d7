//! Header compression: RFC 7541. We decode all of it, and encode without state: what we say is never put in the
//! peer's table, so that a tunnel holds none for it.

mod huffman;
mod table;

pub(crate) use self::table::Decoder;

/// Literals that no table keeps (section 6.2.2) and names in the static table (appendix A).
pub(super) struct Encoder<'a>(&'a mut Vec<u8>);

/// Fields and names of the static table.
pub(super) const STATUS_200: u8 = 8;
pub(super) const AUTHORITY: usize = 1;
pub(super) const METHOD: usize = 2;
pub(super) const STATUS: usize = 8;

impl<'a> Encoder<'a> {
    /// Of a new block. The first of a connection begins by saying that its table is empty, and stays so
    /// (section 6.3).
    pub(super) fn new(out: &'a mut Vec<u8>, first: bool) -> Self {
        if first {
            out.push(0x20);
        }
        Self(out)
    }

    /// A field that is in the static table, as it is.
    pub(super) fn known(&mut self, field: u8) {
        self.0.push(0x80 | field);
    }

    /// A field whose name is in the static table.
    pub(super) fn indexed(&mut self, name: usize, value: &[u8]) {
        self.number(0x0f, name);
        self.text(value);
    }

    /// A field by its name.
    pub(super) fn literal(&mut self, name: &[u8], value: &[u8]) {
        self.0.push(0);
        self.text(name);
        self.text(value);
    }

    fn text(&mut self, text: &[u8]) {
        self.number(0x7f, text.len());
        self.0.extend_from_slice(text);
    }

    /// A number (section 5.1), with this largest one that fits into its first byte.
    fn number(&mut self, prefix: u8, number: usize) {
        if let Ok(small) = u8::try_from(number)
            && small < prefix
        {
            return self.0.push(small);
        }
        self.0.push(prefix);
        let mut rest = number.saturating_sub(usize::from(prefix));
        while rest >= 0x80 {
            self.0.push(0x80 | u8::try_from(rest & 0x7f).unwrap_or_default());
            rest >>= 7;
        }
        self.0.push(u8::try_from(rest).unwrap_or_default());
    }
}

/// What is wrong with a block. The connection cannot go on after it: the tables differ.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Garbled;

#[cfg(test)]
mod tests;
