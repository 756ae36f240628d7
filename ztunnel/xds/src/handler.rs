use std::sync::{Arc, Mutex, PoisonError};

/// One change to one resource.
#[derive(Debug, Clone, PartialEq)]
pub enum Update<T> {
    /// The resource is new, or it replaces what had its name.
    Upsert {
        /// The name by which it will be removed.
        name: String,
        /// All of it.
        resource: T,
    },
    /// What came in place of the resource cannot be read. Its source says so to whoever sent it; the handler need
    /// not. What is known of the resource stays.
    Unreadable {
        /// The name under which it came.
        name: String,
        /// Its bytes, which may be none.
        bytes: Vec<u8>,
    },
    /// The resource is gone. The name may be unknown to the handler.
    Remove {
        /// The name under which it came, or which its handler would have given it.
        name: String,
    },
}

impl<T> Update<T> {
    /// The resource's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Upsert { name, .. } | Self::Unreadable { name, .. } | Self::Remove { name } => {
                name
            }
        }
    }
}

/// A resource that was not taken, and why. The state keeps what it had under that name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The resource's name.
    pub name: String,
    /// What is wrong, beginning with the path of the field.
    pub reason: String,
}

/// Takes the resources of one type, in order.
pub trait Handler<T>: Send {
    /// Applies a batch. What is good takes effect although its neighbour is bad.
    ///
    /// # Errors
    ///
    /// Those that were rejected; every other update of the batch is in effect.
    fn handle(&mut self, updates: Vec<Update<T>>) -> Result<(), Vec<Rejected>>;

    /// Judges a resource without taking it, so that a file can be refused as a whole.
    ///
    /// # Errors
    ///
    /// The reason for which [`Handler::handle`] would reject it.
    fn check(&self, _resource: &T) -> Result<(), String> {
        Ok(())
    }
}

/// One handler behind two sources, for instance a file and xDS side by side.
impl<T, H: Handler<T>> Handler<T> for Arc<Mutex<H>> {
    fn handle(&mut self, updates: Vec<Update<T>>) -> Result<(), Vec<Rejected>> {
        self.lock().unwrap_or_else(PoisonError::into_inner).handle(updates)
    }

    fn check(&self, resource: &T) -> Result<(), String> {
        self.lock().unwrap_or_else(PoisonError::into_inner).check(resource)
    }
}
