//! One reading of the local source, and what it changes.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Cursor, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::workload::{Address, Service, Workload, address::Type};

use super::fault::{Fault, Place};
use super::kept::{Kept, UNKNOWN, hash};
use super::text::TextFault;
use super::tokens::Tokens;
use super::{policy, service, value, workload};
use crate::{Handler, Rejected, Update};

/// Resources handed over at once: enough to make the handler's lock cheap, few enough to weigh nothing.
const BATCH: usize = 512;
/// Batches read ahead of those that are being handed over: about a megabyte.
const AHEAD: usize = 2;

/// One value that takes every type of resource that a file can hold.
pub trait Handlers: Handler<Address> + Handler<Authorization> {}
impl<H: Handler<Address> + Handler<Authorization>> Handlers for H {}

/// Where the YAML is.
#[derive(Debug, Clone)]
pub enum Source {
    /// In a file.
    Path(PathBuf),
    /// In a setting.
    Inline(String),
}

impl Source {
    fn origin(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Inline(_) => "inline text".to_owned(),
        }
    }
}

/// Why a source could not be loaded.
#[derive(Debug)]
pub enum LoadError {
    /// The file could not be opened or read.
    Read {
        /// Its path.
        origin: String,
        /// Why.
        source: io::Error,
    },
    /// What is in it is not UTF-8 text.
    NotText {
        /// Its path.
        origin: String,
    },
    /// What is in it is not a mesh.
    Invalid {
        /// Its path.
        origin: String,
        /// What and where.
        source: Box<Fault>,
    },
    /// Its handler did not take some resources; the others are in effect.
    Rejected {
        /// Its path.
        origin: String,
        /// Which, why, and the line on which each begins.
        rejected: Vec<(usize, Rejected)>,
    },
    /// The file was written to while it was being read.
    Changed {
        /// Its path.
        origin: String,
    },
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read { origin, .. } => write!(f, "cannot read the local mesh from {origin}"),
            Self::NotText { origin } => write!(f, "{origin} is not UTF-8 text"),
            Self::Invalid { origin, .. } => write!(f, "{origin} does not describe a mesh"),
            Self::Rejected { origin, rejected } => {
                write!(f, "{origin}: {} resources rejected", rejected.len())?;
                for (line, Rejected { name, reason }) in rejected.iter().take(10) {
                    write!(f, "; line {line}: {name}: {reason}")?;
                }
                Ok(())
            }
            Self::Changed { origin } => write!(f, "{origin} changed while it was being read"),
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Read { source, .. } => Some(source),
            Self::Invalid { source, .. } => Some(source),
            Self::NotText { .. } | Self::Rejected { .. } | Self::Changed { .. } => None,
        }
    }
}

/// What a reading did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Workloads and services in the source.
    pub addresses: usize,
    /// Policies in the source.
    pub policies: usize,
    /// Resources handed over because they are new or different.
    pub changed: usize,
    /// Resources removed.
    pub removed: usize,
    /// Resources that their handler did not take.
    pub rejected: usize,
}

/// Which file it was: another one under the same name, or the same one written to, differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::from(&metadata))
    }

    fn from(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What is remembered of a source that was loaded.
#[derive(Debug, Default)]
pub struct Loaded {
    addresses: Kept,
    policies: Kept,
    pub(super) stamp: Option<Stamp>,
}

/// Loads a source for the first time, handing over each resource as it is read.
///
/// # Errors
///
/// The first fault of the source, or every resource that was rejected. The handlers then hold a part of it.
pub fn load(source: &Source, handlers: &mut impl Handlers) -> Result<(Loaded, Report), LoadError> {
    let mut loaded = Loaded::default();
    let mut text = Text::open(source)?;
    let mut reading = Reading::new(handlers, &loaded, true);
    text.read(&mut |found| reading.take(found))?;
    let (next, report, rejected) = reading.finish();
    if !rejected.is_empty() {
        return Err(LoadError::Rejected { origin: text.origin, rejected });
    }
    loaded = next;
    loaded.stamp = text.stamp()?;
    Ok((loaded, report))
}

impl Loaded {
    /// Loads the source again: all of it is read before any of it takes effect.
    pub(super) fn reload(
        &mut self,
        source: &Source,
        handlers: &mut impl Handlers,
    ) -> Result<(Report, Vec<(usize, Rejected)>), LoadError> {
        let mut text = Text::open(source)?;
        let before = text.stamp()?;
        let mut names = Names::default();
        text.read(&mut |found| {
            names.add(&found)?;
            found.check(handlers)
        })?;
        text.rewind()?;
        if text.stamp()? != before {
            return Err(LoadError::Changed { origin: text.origin });
        }
        // Removals first: a pod that replaces another has its address.
        let removed = self.remove_all_but(&names, handlers);
        let mut reading = Reading::new(handlers, self, false);
        let second = text.read(&mut |found| reading.take(found));
        let (mut next, mut report, rejected) = reading.finish();
        report.removed = removed;
        if second.is_ok() && text.stamp()? == before {
            next.stamp = before;
            *self = next;
            return Ok((report, rejected));
        }
        // Written to between the two readings. What was handed over is in effect; remember that and the rest of
        // what was before, so that the next reading can take back or complete it.
        for (old, new) in
            [(&self.addresses, &mut next.addresses), (&self.policies, &mut next.policies)]
        {
            let present = new.index();
            for (name, print) in old.iter() {
                if !present.contains_key(&hash(&name)) {
                    new.push(&name, print);
                }
            }
        }
        *self = next;
        Err(LoadError::Changed { origin: text.origin })
    }

    fn remove_all_but(&self, names: &Names, handlers: &mut impl Handlers) -> usize {
        remove::<Address>(&self.addresses, &names.addresses, handlers)
            + remove::<Authorization>(&self.policies, &names.policies, handlers)
    }
}

fn remove<T>(old: &Kept, present: &HashSet<u64>, handler: &mut impl Handler<T>) -> usize {
    let mut removed = 0;
    let mut names = old.missing_from(present).peekable();
    while names.peek().is_some() {
        let batch: Vec<Update<T>> =
            names.by_ref().take(BATCH).map(|name| Update::Remove { name }).collect();
        removed += batch.len();
        for Rejected { name, reason } in handler.handle(batch).err().unwrap_or_default() {
            tracing::warn!(%name, %reason, "could not remove a resource of the local file");
        }
    }
    removed
}

/// One resource of the source.
struct Found {
    item: Item,
    name: String,
    print: u64,
    at: Place,
    section: Section,
    index: usize,
}

enum Item {
    Address(Box<Type>),
    Policy(Box<Authorization>),
}

#[derive(Debug, Clone, Copy)]
enum Section {
    Workloads,
    Services,
    Policies,
}

impl Item {
    fn workload(workload: Workload) -> (String, Self) {
        (workload.uid.clone(), Self::Address(Box::new(Type::Workload(workload))))
    }

    fn service(service: Service) -> (String, Self) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        (name, Self::Address(Box::new(Type::Service(service))))
    }

    fn policy(policy: Authorization) -> (String, Self) {
        (format!("{}/{}", policy.namespace, policy.name), Self::Policy(Box::new(policy)))
    }
}

impl Found {
    /// A fault of the item as a whole.
    fn fault(&self, what: String) -> Box<Fault> {
        let section = match self.section {
            Section::Workloads => "workloads",
            Section::Services => "services",
            Section::Policies => "policies",
        };
        Fault::new(self.at, what).within(&format!("{section}[{}]", self.index))
    }

    fn check(mut self, handlers: &mut impl Handlers) -> Result<(), Box<Fault>> {
        let item = std::mem::replace(&mut self.item, Item::Policy(Box::default()));
        let checked = match item {
            Item::Address(address) => handlers.check(&Address { r#type: Some(*address) }),
            Item::Policy(policy) => handlers.check(&*policy),
        };
        checked.map_err(|reason| self.fault(format!("{}: {reason}", self.name)))
    }
}

/// The names of a source while it is read.
#[derive(Default)]
struct Names {
    addresses: HashSet<u64>,
    policies: HashSet<u64>,
}

impl Names {
    fn add(&mut self, found: &Found) -> Result<(), Box<Fault>> {
        let names = match found.item {
            Item::Address(_) => &mut self.addresses,
            Item::Policy(_) => &mut self.policies,
        };
        if names.insert(hash(&found.name)) {
            return Ok(());
        }
        Err(found.fault(format!("`{}` stands here for the second time", found.name)))
    }
}

/// A reading that hands over what differs from the one before.
struct Reading<'h, H> {
    handlers: &'h mut H,
    before: (HashMap<u64, u64>, HashMap<u64, u64>),
    /// Only of a first reading; a later one has been over the names already.
    names: Option<Names>,
    next: Loaded,
    report: Report,
    addresses: Batch<Address>,
    policies: Batch<Authorization>,
    rejected: Vec<(usize, Rejected)>,
}

/// Updates that wait to be handed over, with position and line of each.
struct Batch<T> {
    updates: Vec<Update<T>>,
    origins: Vec<(usize, usize)>,
}

impl<T> Batch<T> {
    fn new() -> Self {
        Self { updates: Vec::with_capacity(BATCH), origins: Vec::with_capacity(BATCH) }
    }

    /// Hands over what waits; returns the positions of those that were rejected.
    fn flush(
        &mut self,
        handler: &mut impl Handler<T>,
        rejected: &mut Vec<(usize, Rejected)>,
    ) -> Vec<usize> {
        let updates = std::mem::replace(&mut self.updates, Vec::with_capacity(BATCH));
        let origins = std::mem::take(&mut self.origins);
        // The handler owns the updates: keep the names only where something can be rejected.
        let names: Vec<u64> = updates.iter().map(|update| hash(update.name())).collect();
        let mut positions = Vec::new();
        for bad in handler.handle(updates).err().unwrap_or_default() {
            let bad_hash = hash(&bad.name);
            let found = names.iter().zip(&origins).find(|(name, _)| **name == bad_hash);
            let (position, line) = found.map_or((usize::MAX, 0), |(_, origin)| *origin);
            positions.push(position);
            rejected.push((line, bad));
        }
        positions
    }
}

impl<'h, H: Handlers> Reading<'h, H> {
    fn new(handlers: &'h mut H, before: &Loaded, first: bool) -> Self {
        Self {
            handlers,
            before: (before.addresses.index(), before.policies.index()),
            names: first.then(Names::default),
            next: Loaded::default(),
            report: Report::default(),
            addresses: Batch::new(),
            policies: Batch::new(),
            rejected: Vec::new(),
        }
    }

    fn take(&mut self, found: Found) -> Result<(), Box<Fault>> {
        if let Some(names) = &mut self.names {
            names.add(&found)?;
        }
        let (before, kept) = match found.item {
            Item::Address(_) => (&self.before.0, &mut self.next.addresses),
            Item::Policy(_) => (&self.before.1, &mut self.next.policies),
        };
        let known = before.get(&hash(&found.name)).copied().unwrap_or(UNKNOWN);
        let position = kept.len();
        kept.push(&found.name, found.print);
        if known != UNKNOWN && known == found.print {
            return Ok(());
        }
        self.report.changed += 1;
        let origin = (position, found.at.line);
        let name = found.name;
        match found.item {
            Item::Address(address) => {
                let resource = Address { r#type: Some(*address) };
                self.addresses.updates.push(Update::Upsert { name, resource });
                self.addresses.origins.push(origin);
            }
            Item::Policy(policy) => {
                self.policies.updates.push(Update::Upsert { name, resource: *policy });
                self.policies.origins.push(origin);
            }
        }
        if self.addresses.updates.len() >= BATCH || self.policies.updates.len() >= BATCH {
            self.flush();
        }
        Ok(())
    }

    fn flush(&mut self) {
        let positions = self.addresses.flush(self.handlers, &mut self.rejected);
        self.next.addresses.forget(positions);
        let positions = self.policies.flush(self.handlers, &mut self.rejected);
        self.next.policies.forget(positions);
    }

    fn finish(mut self) -> (Loaded, Report, Vec<(usize, Rejected)>) {
        self.flush();
        self.next.addresses.shrink();
        self.next.policies.shrink();
        self.report.addresses = self.next.addresses.len();
        self.report.policies = self.next.policies.len();
        self.report.rejected = self.rejected.len();
        (self.next, self.report, self.rejected)
    }
}

/// The source's text, which can be read more than once.
struct Text<'s> {
    origin: String,
    from: From<'s>,
}

enum From<'s> {
    File(File),
    Inline(Cursor<&'s [u8]>),
}

impl<'s> Text<'s> {
    fn open(source: &'s Source) -> Result<Self, LoadError> {
        let origin = source.origin();
        let from = match source {
            Source::Inline(text) => From::Inline(Cursor::new(text.as_bytes())),
            Source::Path(path) => match File::open(path) {
                Ok(file) => From::File(file),
                Err(source) => return Err(LoadError::Read { origin, source }),
            },
        };
        Ok(Self { origin, from })
    }

    fn stamp(&self) -> Result<Option<Stamp>, LoadError> {
        match &self.from {
            From::Inline(_) => Ok(None),
            From::File(file) => match file.metadata() {
                Ok(metadata) => Ok(Some(Stamp::from(&metadata))),
                Err(source) => Err(LoadError::Read { origin: self.origin.clone(), source }),
            },
        }
    }

    fn rewind(&mut self) -> Result<(), LoadError> {
        match &mut self.from {
            From::Inline(text) => text.set_position(0),
            From::File(file) => {
                let rewound = file.rewind();
                rewound
                    .map_err(|source| LoadError::Read { origin: self.origin.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Reads it all. A thread of its own reads and converts, this one takes: of a large mesh each is seconds of
    /// work. Should the YAML parser panic, which is not ours, that is a fault like another.
    fn read(
        &mut self,
        each: &mut dyn FnMut(Found) -> Result<(), Box<Fault>>,
    ) -> Result<(), LoadError> {
        let reader: Box<dyn Read + Send + '_> = match &mut self.from {
            From::File(file) => Box::new(file),
            From::Inline(text) => Box::new(text),
        };
        let (send, batches) = sync_channel::<Vec<Found>>(AHEAD);
        let read = std::thread::scope(|threads| {
            let thread = std::thread::Builder::new().name("local-file".to_owned());
            let reading = thread
                .spawn_scoped(threads, move || items(reader, &send))
                .map_err(Stop::CannotStart)?;
            let mut taken = Ok(());
            for batch in batches {
                taken = batch.into_iter().try_for_each(&mut *each);
                if taken.is_err() {
                    break; // which drops the receiver, and so stops the thread
                }
            }
            let read = reading.join().unwrap_or(Err(Stop::Panic));
            taken.map_err(Stop::Fault).and(read)
        });
        let origin = self.origin.clone();
        read.map_err(|stop| match stop {
            Stop::Text(TextFault::Read(source)) | Stop::CannotStart(source) => {
                LoadError::Read { origin, source }
            }
            Stop::Text(TextFault::NotText) => LoadError::NotText { origin },
            Stop::Fault(source) => LoadError::Invalid { origin, source },
            Stop::Panic => {
                let source = Fault::new(Place { line: 1, column: 1 }, "not YAML that can be read");
                LoadError::Invalid { origin, source }
            }
        })
    }
}

/// Why a reading ended early.
enum Stop {
    Text(TextFault),
    Fault(Box<Fault>),
    CannotStart(io::Error),
    Panic,
}

/// Reads all items of a text, and sends them in batches.
fn items(reader: Box<dyn Read + '_>, send: &SyncSender<Vec<Found>>) -> Result<(), Stop> {
    let mut tokens = Tokens::new(reader);
    let mut batch = Vec::with_capacity(BATCH);
    let read = document(&mut tokens, &mut |found| {
        let at = found.at;
        batch.push(found);
        if batch.len() < BATCH {
            return Ok(());
        }
        let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
        // Whoever takes them has found a fault of its own, which is the one that counts.
        send.send(full).map_err(|_stopped| Fault::new(at, "stopped"))
    });
    // What stands before a fault is judged before it.
    let _stopped = send.send(batch);
    match (tokens.ended_early(), read) {
        (Some(fault), _) => Err(Stop::Text(fault)),
        (None, Err(fault)) => Err(Stop::Fault(fault)),
        (None, Ok(())) => Ok(()),
    }
}

fn document(
    tokens: &mut Tokens<'_>,
    each: &mut dyn FnMut(Found) -> Result<(), Box<Fault>>,
) -> Result<(), Box<Fault>> {
    let Some(start) = tokens.begin()? else { return Ok(()) };
    value::map(tokens, &start, |tokens, key, name, token| {
        let section = match name {
            "workloads" => Section::Workloads,
            "services" => Section::Services,
            "policies" => Section::Policies,
            _ => return Err(value::unknown(key)),
        };
        tokens.fingerprint();
        let mut index = 0;
        value::list(tokens, &token, |tokens, item| {
            let (name, resource) = match section {
                Section::Workloads => Item::workload(workload::read(tokens, &item)?),
                Section::Services => Item::service(service::read(tokens, &item)?),
                Section::Policies => Item::policy(policy::read(tokens, &item)?),
            };
            let print = tokens.fingerprint();
            let found = Found { item: resource, name, print, at: item.at, section, index };
            index += 1;
            each(found)
        })
    })?;
    tokens.finish()
}
