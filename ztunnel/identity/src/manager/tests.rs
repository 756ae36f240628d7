use super::*;
use crate::{
    ca::{Issued, Signing},
    testing::{CLIENT, HOUR, SERVER, TestCa, TokioClock, id, now},
    tls::Options,
};
use mesh_runtime::clock::Clock;
use rustls_pki_types::CertificateDer;
use std::sync::atomic::AtomicBool;

const SECOND: Duration = Duration::from_secs(1);

/// Answers as told, after a time, and keeps count.
struct ScriptedCa {
    ca: TestCa,
    clock: Arc<TokioClock>,
    takes: Duration,
    validity: Duration,
    fails: AtomicBool,
    panics: AtomicBool,
    log: Mutex<Vec<(SpiffeId, Instant)>>,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
}

impl CertificateAuthority for ScriptedCa {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a Csr) -> Signing<'a> {
        self.log.lock().unwrap().push((identity.clone(), Instant::now()));
        Box::pin(async {
            let now_flying = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_in_flight.fetch_max(now_flying, Ordering::Relaxed);
            tokio::time::sleep(self.takes).await;
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            assert!(!self.panics.load(Ordering::Relaxed), "as told");
            if self.fails.load(Ordering::Relaxed) {
                return Err(IssueError::Refused("not today".into()));
            }
            let request = rcgen::CertificateSigningRequestParams::from_der(csr.der()).unwrap();
            let mut params = crate::csr::params(identity).unwrap();
            params.not_before = self.clock.now().into();
            params.not_after = (self.clock.now() + self.validity).into();
            params.serial_number = Some(123_456_789_012_345_678.into());
            let leaf = params.signed_by(&request.public_key, &self.ca.issuer).unwrap();
            Ok(Issued { chain: vec![leaf.into()], roots: vec![self.ca.certificate.clone()] })
        })
    }
}

struct Bed {
    ca: Arc<ScriptedCa>,
    certificates: Certificates,
    _task: JoinSet<()>,
}

impl Bed {
    fn new(takes: Duration) -> Self {
        let clock = TokioClock::new();
        let ca = Arc::new(ScriptedCa {
            ca: TestCa::new("mesh"),
            clock: Arc::clone(&clock),
            takes,
            validity: HOUR,
            fails: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            log: Mutex::default(),
            in_flight: AtomicU64::new(0),
            most_in_flight: AtomicU64::new(0),
        });
        let context = Context::new(Options::default(), clock);
        let (certificates, manager) = Manager::new(Arc::clone(&ca) as _, context);
        let mut task = JoinSet::new();
        task.spawn(manager.run(std::future::pending()));
        Self { ca, certificates, _task: task }
    }

    fn fail(&self, fails: bool) {
        self.ca.fails.store(fails, Ordering::Relaxed);
    }

    /// Moments of the requests, in seconds since the first.
    fn asked(&self) -> Vec<f64> {
        let log = self.ca.log.lock().unwrap();
        log.iter().map(|(_, at)| (*at - log[0].1).as_secs_f64()).collect()
    }

    fn asked_for(&self) -> Vec<String> {
        let log = self.ca.log.lock().unwrap();
        log.iter().map(|(identity, _)| identity.service_account.to_string()).collect()
    }

    async fn get(&self) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        self.certificates.get(&id(CLIENT)).await
    }

    fn state(&self) -> String {
        self.certificates.dump()[0]["state"].as_str().unwrap().to_owned()
    }
}

async fn after(time: Duration) {
    tokio::time::sleep(time).await;
}

fn account(name: &str) -> SpiffeId {
    id(&format!("spiffe://cluster.local/ns/shop/sa/{name}"))
}

#[tokio::test(start_paused = true)]
async fn one_fetch_for_all_who_wait() {
    let bed = Bed::new(SECOND);
    let (client, other) = (id(CLIENT), id(SERVER));
    let get = || bed.certificates.get(&client);
    let (a, b, c, d) = tokio::join!(get(), get(), get(), bed.certificates.get(&other));
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert!(Arc::ptr_eq(&a, &b) && Arc::ptr_eq(&b, &c));
    assert_eq!(*a.identity(), client);
    assert_eq!(*d.unwrap().identity(), other);
    assert_eq!(bed.asked().len(), 2);
    // From the cache: no time passes.
    let before = Instant::now();
    assert!(Arc::ptr_eq(&a, &bed.get().await.unwrap()));
    assert_eq!(before, Instant::now());
}

#[tokio::test(start_paused = true)]
async fn refreshes_at_half_life() {
    let bed = Bed::new(SECOND);
    let first = bed.get().await.unwrap();
    after(HOUR / 2 - 2 * SECOND).await;
    assert!(Arc::ptr_eq(&first, &bed.get().await.unwrap()));
    after(4 * SECOND).await;
    let second = bed.get().await.unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert_ne!(first.chain(), second.chain(), "a new key each time");
    let asked = bed.asked();
    assert_eq!(asked.len(), 2);
    // X.509 counts in seconds, so that the second may be short of a part.
    assert!((asked[1] - 1801.0).abs() < 1.0, "{asked:?}");
    assert_eq!(bed.certificates.fetches(), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_failing_refresh_keeps_what_is_valid_until_its_end() {
    let bed = Bed::new(Duration::ZERO);
    let first = bed.get().await.unwrap();
    bed.fail(true);
    after(HOUR * 3 / 4).await;
    assert!(Arc::ptr_eq(&first, &bed.get().await.unwrap()));
    assert_eq!(bed.state(), "Available");
    after(HOUR / 4 + SECOND).await;
    let error = bed.get().await.unwrap_err();
    assert!(error.to_string().contains("next attempt in"), "{error}");
    assert_eq!(error.source().unwrap().to_string(), "the CA refused to sign");
    assert_eq!(bed.state(), "Unavailable: the CA refused to sign: not today");
    // One attempt falls on the very end.
    assert!(bed.asked().iter().any(|at| (*at - 3600.0).abs() < 1.0), "{:?}", bed.asked());

    bed.fail(false);
    after(151 * SECOND).await;
    assert!(bed.get().await.unwrap().is_valid_at(bed.ca.clock.now()));
    assert_eq!(bed.state(), "Available");
}

#[tokio::test(start_paused = true)]
async fn a_failed_first_fetch_tells_all_and_backs_off() {
    let bed = Bed::new(SECOND / 10);
    bed.fail(true);
    let (a, b) = tokio::join!(bed.get(), bed.get());
    assert!(matches!(a, Err(IdentityError::Unavailable { retry: Some(_), .. })));
    assert!(b.is_err());
    // The next ones learn it at once, and do not ask.
    let before = Instant::now();
    bed.get().await.unwrap_err();
    assert_eq!(before, Instant::now());
    assert_eq!(bed.asked().len(), 1);

    after(16 * SECOND).await;
    let asked = bed.asked();
    let gaps: Vec<_> = asked.windows(2).map(|pair| pair[1] - pair[0] - 0.1).collect();
    for (gap, nominal) in gaps.iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((nominal * 0.79..nominal * 1.21).contains(gap), "{gaps:?}");
    }
    assert!(gaps.len() >= 3, "{gaps:?}");
    bed.fail(false);
    after(40 * SECOND).await;
    bed.get().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_waits_goes_first_and_eight_at_a_time() {
    let bed = Bed::new(SECOND);
    for i in 0..20 {
        bed.certificates.prefetch(account(&format!("warm{i:02}")));
    }
    after(SECOND / 2).await;
    // Eight are on their way. These two go next, one of them already queued.
    let (new, queued) = (account("urgent"), account("warm19"));
    let (a, b) = tokio::join!(bed.certificates.get(&new), bed.certificates.get(&queued));
    a.unwrap();
    b.unwrap();
    after(5 * SECOND).await;
    let order = bed.asked_for();
    assert_eq!(order.len(), 21);
    let next: std::collections::HashSet<_> = order[8..10].iter().map(String::as_str).collect();
    assert_eq!(next, ["urgent", "warm19"].into());
    assert_eq!(order[10], "warm08", "then first come, first served");
    assert_eq!(bed.ca.most_in_flight.load(Ordering::Relaxed), 8);
}

#[tokio::test(start_paused = true)]
async fn prefetched_is_there_when_asked_for() {
    let bed = Bed::new(SECOND);
    bed.certificates.prefetch(id(CLIENT));
    assert_eq!(bed.state(), "Initializing");
    after(2 * SECOND).await;
    let before = Instant::now();
    bed.get().await.unwrap();
    assert_eq!(before, Instant::now());
    bed.certificates.prefetch(id(CLIENT));
    after(SECOND).await;
    assert_eq!(bed.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn forgetting_discards_what_is_in_flight() {
    let bed = Bed::new(SECOND);
    let waiting = bed.get();
    let forget = async {
        after(SECOND / 2).await;
        bed.certificates.forget(&id(CLIENT));
    };
    let (got, ()) = tokio::join!(waiting, forget);
    assert!(matches!(got, Err(IdentityError::Forgotten(_))));
    after(2 * HOUR).await;
    assert_eq!(bed.certificates.dump(), serde_json::json!([]));
    assert_eq!(bed.asked().len(), 1, "no refresh of what nobody wants");

    // And wanted again while the old answer is still on its way: that one is not taken for the new.
    bed.certificates.prefetch(id(CLIENT));
    after(SECOND / 2).await;
    bed.certificates.forget(&id(CLIENT));
    let certificate = bed.get().await.unwrap();
    let asked = bed.asked();
    assert_eq!(asked.len(), 3);
    assert!((asked[2] - asked[1] - 1.0).abs() < 0.01, "one at a time: {asked:?}");
    assert!(certificate.is_valid_at(bed.ca.clock.now()));
    assert_eq!(bed.certificates.fetches(), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_kept_while_a_workload_has_its_identity() {
    let bed = Bed::new(SECOND);
    let (one, two) = (bed.certificates.hold(id(CLIENT)), bed.certificates.hold(id(CLIENT)));
    assert_eq!(one.identity(), &id(CLIENT));
    after(2 * SECOND).await;
    assert_eq!(bed.asked().len(), 1, "ready before it is asked for");
    drop(one);
    let before = Instant::now();
    bed.get().await.unwrap();
    assert_eq!(before, Instant::now());
    drop(two);
    assert_eq!(bed.certificates.dump(), serde_json::json!([]));
    after(2 * HOUR).await;
    assert_eq!(bed.asked().len(), 1, "no refresh of what nobody has");
}

#[tokio::test(start_paused = true)]
async fn a_silent_ca_is_given_up() {
    let bed = Bed::new(HOUR);
    let start = Instant::now();
    let error = bed.get().await.unwrap_err();
    assert_eq!(start.elapsed(), LONGEST_FETCH);
    assert_eq!(error.source().unwrap().to_string(), "the CA did not answer within 10s");
}

#[tokio::test(start_paused = true)]
async fn a_panicking_ca_costs_one_attempt() {
    let bed = Bed::new(SECOND);
    bed.ca.panics.store(true, Ordering::Relaxed);
    bed.get().await.unwrap_err();
    bed.ca.panics.store(false, Ordering::Relaxed);
    after(3 * SECOND).await;
    bed.get().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_task_ends_waiting_but_not_the_cache() {
    let clock = TokioClock::new();
    let mut bed = Bed::new(SECOND);
    bed.get().await.unwrap();
    let (stop, stopping) = tokio::sync::oneshot::channel::<()>();
    let context = Context::new(Options::default(), clock);
    let (certificates, manager) = Manager::new(Arc::clone(&bed.ca) as _, context);
    bed._task.spawn(manager.run(async { drop(stopping.await) }));
    certificates.get(&id(CLIENT)).await.unwrap();
    let (other, end) = (id(SERVER), async {
        after(SECOND / 2).await;
        stop.send(()).unwrap();
    });
    let (got, ()) = tokio::join!(certificates.get(&other), end);
    assert!(matches!(got, Err(IdentityError::Stopped(_))), "{got:?}");
    certificates.get(&id(CLIENT)).await.expect("cached");
    certificates.get(&other).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn refresh_times_of_odd_validities() {
    let ca = TestCa::new("mesh");
    let context = crate::testing::context();
    // Before, after, and the refresh: in seconds from now.
    for (name, before, after, expected) in [
        ("a day from now", 0, 86_400, 43_200),
        ("dated back two minutes", -120, 86_400, 43_140),
        ("half is past", -3600, 600, 60),
        ("all but gone", -3600, 3, 1),
        ("gone", -3600, -3, 1),
    ] {
        let at = |seconds: i64| {
            let start = now() - Duration::from_hours(1);
            start + Duration::from_secs(u64::try_from(3600 + seconds).unwrap())
        };
        let certificate = ca.workload_with(&[SERVER], &context, |params| {
            params.not_before = at(before).into();
            params.not_after = at(after).into();
        });
        let refresh = refresh_time(&certificate, now()).duration_since(now()).unwrap();
        assert_eq!(refresh.as_secs(), expected, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn dumps_what_istioctl_reads() {
    let bed = Bed::new(Duration::ZERO);
    bed.certificates.get(&id(SERVER)).await.unwrap();
    bed.get().await.unwrap();
    let dump = bed.certificates.dump();
    let identities: Vec<_> = dump.as_array().unwrap().iter().map(|c| &c["identity"]).collect();
    assert_eq!(identities, [CLIENT, SERVER], "sorted");
    let entry = &dump[0];
    assert_eq!(entry["certChain"].as_array().unwrap().len(), 1);
    assert_eq!(entry["rootCerts"].as_array().unwrap().len(), 1);
    let leaf = &entry["certChain"][0];
    assert_eq!(leaf["serialNumber"], "123456789012345678");
    assert_eq!(leaf["validFrom"], "2026-11-21T22:26:40Z");
    assert_eq!(leaf["expirationTime"], "2026-11-21T23:26:40Z");
    // The PEM inside is that of the certificate.
    let pem = decode(leaf["pem"].as_str().unwrap());
    let der = <CertificateDer<'_> as rustls_pki_types::pem::PemObject>::from_pem_slice(&pem);
    assert_eq!(der.unwrap(), bed.get().await.unwrap().chain()[0]);
    assert_eq!(bed.certificates.expiries().len(), 2);
}

/// Base64, by way of a parser that is not ours.
fn decode(text: &str) -> Vec<u8> {
    let lines: Vec<_> =
        text.as_bytes().chunks(64).map(|line| str::from_utf8(line).unwrap()).collect();
    let pem =
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"));
    let der =
        <CertificateDer<'_> as rustls_pki_types::pem::PemObject>::from_pem_slice(pem.as_bytes());
    der.unwrap().to_vec()
}

#[tokio::test(start_paused = true)]
async fn shows_ends_and_results() {
    let bed = Bed::new(Duration::ZERO);
    bed.get().await.unwrap();
    bed.fail(true);
    bed.certificates.get(&id(SERVER)).await.unwrap_err();
    let registry = mesh_runtime::metrics::Registry::new();
    crate::metrics::certificates(&registry, &bed.certificates);
    let text = registry.render();
    for line in [
        "istio_certificate_fetches_total{result=\"issued\"} 1",
        "istio_certificate_fetches_total{result=\"failed\"} 1",
        "istio_certificate_expiration_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/client\"} 1795303600",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

/// The refresh is planned by a clock that stands still while a machine sleeps; validity is not.
#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_asks_at_once() {
    let bed = Bed::new(SECOND);
    let first = bed.get().await.unwrap();
    bed.ca.clock.jump(2 * HOUR);
    let before = Instant::now();
    let second = bed.get().await.unwrap();
    assert_eq!(before.elapsed(), SECOND);
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(second.is_valid_at(bed.ca.clock.now()));
    // Still one plan: the refresh at half life, once.
    after(HOUR / 2 + 10 * SECOND).await;
    assert_eq!(bed.asked().len(), 3);
}
