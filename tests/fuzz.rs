//! Every parser of what peers send, given nonsense: first the kept corpus (`fuzz/<target>/`), then, for
//! `MESH_FUZZ_SECONDS` each, what comes of changing it. What breaks one is to be kept.

use std::{
    any::Any,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::SpiffeId;
use mesh_xds::{
    Handler, Rejected, Update,
    file::{LoadError, Source, load},
};
use tokio::time::Instant;

/// A parser's invariant: it panics where a promise is broken.
struct Target {
    name: &'static str,
    check: fn(&[u8]),
    /// What is rarely found by chance.
    words: &'static [&'static str],
}

const TARGETS: &[Target] = &[
    Target { name: "authority", check: mesh_hbone::fuzz::authority, words: HEADERS },
    Target { name: "baggage", check: mesh_hbone::fuzz::baggage, words: HEADERS },
    Target { name: "forwarded", check: mesh_hbone::fuzz::forwarded, words: HEADERS },
    Target { name: "trace_parent", check: mesh_hbone::fuzz::trace_parent, words: HEADERS },
    Target { name: "http2_frames", check: mesh_hbone::fuzz::frames, words: FRAMES },
    Target { name: "http2_headers", check: mesh_hbone::fuzz::headers, words: FIELDS },
    Target { name: "spiffe", check: spiffe, words: WORDS },
    Target {
        name: "zds",
        check: ztunnel::pod::protocol::fuzz_request,
        words: &["\u{a}", "\u{12}"],
    },
    Target { name: "local_file", check: local_file, words: YAML },
    Target {
        name: "xds_response",
        check: mesh_xds::fuzz::response,
        words: &["type.googleapis.com/"],
    },
    Target { name: "peer_certificate", check: mesh_identity::fuzz::peer_certificate, words: WORDS },
    Target { name: "revocation_lists", check: mesh_identity::fuzz::revocation_lists, words: &[] },
    Target { name: "alert", check: mesh_identity::fuzz::alert, words: &[] },
    Target {
        name: "dns_query",
        check: mesh_dns::fuzz::query,
        words: &["\u{0}\u{1}\u{0}\u{1}", "\u{3}web", "\u{0}\u{0}\u{29}"],
    },
];

const HEADERS: &[&str] =
    &[",", "=", ";", "\"", "host=", "for=", "k8s.", "service.name", "[::1]:80", "00-"];

/// A CONNECT, and heads of frames.
const FRAMES: &[&str] = &[
    "\u{0}\u{0}\u{d}\u{1}\u{4}\u{0}\u{0}\u{0}\u{1}\u{2}\u{7}CONNECT\u{1}\u{3}a:1",
    "\u{0}\u{0}\u{4}\u{0}\u{8}\u{0}\u{0}\u{0}\u{1}",
    "\u{0}\u{0}\u{4}\u{3}\u{0}\u{0}\u{0}\u{0}\u{1}",
    "\u{0}\u{0}\u{6}\u{4}\u{0}\u{0}\u{0}\u{0}\u{0}",
    "\u{0}\u{0}\u{4}\u{8}\u{0}\u{0}\u{0}\u{0}\u{1}",
    "\u{0}\u{0}\u{8}\u{6}\u{0}\u{0}\u{0}\u{0}\u{0}",
];

/// Beginnings of fields.
const FIELDS: &[&str] = &[":authority", ":method", "CONNECT", "content-length", "\u{3f}", "\u{40}"];

const WORDS: &[&str] = &["spiffe://", "/ns/", "/sa/", "cluster.local"];

const YAML: &[&str] = &[
    "workloads:\n",
    "services:\n",
    "policies:\n",
    "- ",
    ": ",
    "\n  ",
    "[",
    "{",
    "&a ",
    "*a",
    "|\n",
    "!!str ",
    "protocol: HBONE\n",
    "network: \"\"\n",
    "10.0.0.0/8",
];

/// An identity prints as the text that it was parsed from.
fn spiffe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(identity) = text.parse::<SpiffeId>() {
        assert_eq!(identity.to_string(), text);
    }
}

/// Takes everything.
struct Taker;

impl<T> Handler<T> for Taker {
    fn handle(&mut self, _updates: Vec<Update<T>>) -> Result<(), Vec<Rejected>> {
        Ok(())
    }
}

/// What the reader promises, and that what it says of a fault is one line in a log.
fn local_file(bytes: &[u8]) {
    mesh_xds::fuzz::local_file(bytes);
    let Ok(text) = String::from_utf8(bytes.to_vec()) else { return };
    if let Err(LoadError::Invalid { source, .. }) = load(&Source::Inline(text), &mut Taker) {
        let said = source.to_string();
        assert!(!said.contains(char::is_control), "{said:?}");
    }
}

/// No input is longer: parsers are to be quick, and so is finding.
const LONGEST: usize = 8 << 10;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(target);
    let mut files: Vec<PathBuf> =
        fs::read_dir(&folder).into_iter().flatten().flatten().map(|file| file.path()).collect();
    files.sort();
    files.iter().filter_map(|file| fs::read(file).ok()).collect()
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
}

/// Fails the test, and keeps the input where it can be found.
#[expect(clippy::panic, reason = "it is a test")]
fn check(target: &Target, input: &[u8]) {
    let run = AssertUnwindSafe(|| (target.check)(input));
    if let Err(panic) = catch_unwind(run) {
        let kept = std::env::temp_dir().join(format!("fuzz-{}", target.name));
        let saved = fs::write(&kept, input);
        panic!(
            "{} broke its promise: {}\non {:?}\nkept in {} ({saved:?})",
            target.name,
            words_of(panic.as_ref()),
            String::from_utf8_lossy(input),
            kept.display()
        );
    }
}

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], target: &Target, random: &mut fastrand::Rng) {
    for _ in 0..=random.u8(..4) {
        let at = random.usize(..=input.len());
        match random.u8(..8) {
            0 => input.insert(at, random.u8(..)),
            1 if at < input.len() => drop(input.remove(at)),
            2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.u8(..8);
                }
            }
            3 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.u8(..);
                }
            }
            4 => input.truncate(at),
            5 => {
                let piece: Vec<u8> =
                    input.iter().skip(at).take(random.usize(1..64)).copied().collect();
                let to = random.usize(..=input.len());
                drop(input.splice(to..to, piece));
            }
            6 => {
                if let Some(other) = random.choice(corpus) {
                    let from = random.usize(..=other.len());
                    let piece = other.iter().skip(from).take(random.usize(1..64)).copied();
                    drop(input.splice(at..at, piece.collect::<Vec<_>>()));
                }
            }
            _ => {
                if let Some(word) = random.choice(target.words) {
                    drop(input.splice(at..at, word.bytes()));
                }
            }
        }
        input.truncate(LONGEST);
    }
}

fn fuzz(target: &Target, time: Duration) {
    let mut corpus = corpus(target.name);
    corpus.push(Vec::new());
    let (mut random, start, mut count) = (fastrand::Rng::new(), Instant::now(), 0_u64);
    let seed = random.get_seed();
    while start.elapsed() < time {
        for _ in 0..64 {
            let mut input = random.choice(&corpus).cloned().unwrap_or_default();
            mutate(&mut input, &corpus, target, &mut random);
            check(target, &input);
            count += 1;
            // Changes upon changes: now and then what came of one is where the next begins.
            if corpus.len() < 512 && count.is_multiple_of(1024) {
                corpus.push(input);
            }
        }
    }
    #[expect(clippy::print_stdout, reason = "how much was tried is part of the result")]
    {
        println!("{:<20} {count} inputs, seed {seed:016x}", target.name);
    }
}

#[test]
fn what_was_kept() {
    for target in TARGETS {
        let corpus = corpus(target.name);
        assert!(!corpus.is_empty(), "there is no corpus for {}", target.name);
        for input in corpus {
            check(target, &input);
            // Nothing cut short breaks it either.
            for end in 0..input.len().min(512) {
                check(target, input.get(..end).unwrap_or_default());
            }
        }
    }
}

#[test]
fn what_chance_brings() {
    let asked = std::env::vars().find(|(key, _)| key == "MESH_FUZZ_SECONDS");
    let Some(seconds) = asked.and_then(|(_, seconds)| seconds.parse().ok()) else {
        // A taste, where no time was given.
        TARGETS.iter().for_each(|target| fuzz(target, Duration::from_millis(100)));
        return;
    };
    let time = Duration::from_secs(seconds);
    // Two at a time: as many as the smallest machine has cores.
    for pair in TARGETS.chunks(2) {
        std::thread::scope(|scope| {
            for target in pair {
                scope.spawn(move || fuzz(target, time));
            }
        });
    }
}

#[test]
fn a_broken_promise_is_found() {
    let target = Target {
        name: "planted",
        check: |input| assert!(!input.windows(3).any(|w| w == b"abc"), "planted"),
        words: &["abc"],
    };
    let found = catch_unwind(|| fuzz(&target, Duration::from_secs(5)));
    let said = found.map_err(|panic| words_of(panic.as_ref())).unwrap_err();
    assert!(said.contains("planted broke its promise"), "{said}");
}
