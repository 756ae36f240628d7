//! The log never holds up a connection: where nobody reads it, its queue fills, lines are dropped, and counted.

use std::{
    fs::OpenOptions,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::fs::OpenOptionsExt,
    time::Duration,
};

use mesh_tests::{
    Scene,
    proxy::log_of,
    scene::{TCP, web},
    wait::{self, SOON},
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::mkfifo,
};

const DROPPED: &str = "istio_log_lines_dropped_total";
/// Connections at a time between two looks at the counter.
const BATCH: usize = 50;

#[test]
fn a_log_that_nobody_reads_drops_lines_and_holds_up_nobody() {
    let scene = Scene::bare().unwrap();
    let path = log_of(scene.lab.folder(), "a");
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // Open, and not read.
    let nonblock = OFlag::O_NONBLOCK.bits();
    let pipe = OpenOptions::new().read(true).custom_flags(nonblock).open(&path).unwrap();
    // Many lines a connection, so that the queue is full soon.
    scene.begin(&[("RUST_LOG", "trace")]).unwrap();
    let to = web(TCP)[0];
    let echo = || {
        scene.client.namespace().run(|| {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"echo\nhello\n")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            anyhow::ensure!(answer == "hello\n", "{answer:?}");
            Ok(())
        })
    };
    wait::retry("an echo", SOON, echo).unwrap();
    let dropped = || scene.a.with_proxy(|proxy| Ok(proxy.metrics()?.sum(DROPPED, &[])));
    wait::until("lines that are dropped", Duration::from_secs(60), || {
        for _ in 0..BATCH {
            echo()?;
        }
        Ok((dropped()? > 0.5).then_some(()))
    })
    .unwrap();
    // Full: connections go on as before, and all of them are counted.
    let opened = |name| scene.a.with_proxy(|proxy| Ok(proxy.metrics()?.sum(name, &[]))).unwrap();
    let before = opened("istio_tcp_connections_opened_total");
    for _ in 0..BATCH {
        echo().unwrap();
    }
    let after = opened("istio_tcp_connections_opened_total");
    assert!(after - before >= 49.5, "{before} and then {after}");
    let lost = dropped().unwrap();
    // Read at last, the log says how many are missing.
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let told = BufReader::new(pipe).lines().map_while(Result::ok).find_map(|line| {
        let count = line.split_once("lines were dropped")?.1.split_once("count=")?.1;
        count.trim().parse::<f64>().ok()
    });
    let told = told.unwrap();
    assert!(told >= lost, "{told} in the log and {lost} in the metric");
}
