//! The CNI agent's side of ZDS: it tells the node proxy which pods are enrolled.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice, Read},
    net::Shutdown,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use mesh_proto::istio::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_request::Payload, workload_response,
};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use prost::Message;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::netns::Namespace;

/// As in the contract: the largest packet in either direction.
const PACKET: usize = 1024;
/// The agent's own patience is 5 s; a loaded machine gets more.
const PATIENCE: Duration = Duration::from_secs(15);

/// What the agent says of a pod.
#[derive(Clone, Debug)]
pub struct Info {
    /// The pod's name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

#[derive(Debug)]
struct Enrolled {
    info: Info,
    /// Where it is; `None` where the agent cannot tell, and says "keep".
    namespace: Option<Namespace>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Enrolled>,
    /// Those that have their snapshot, the newest last: two while a node proxy follows another.
    connected: Vec<Socket>,
    connections: usize,
    /// Whether the newest has its snapshot.
    greeted: bool,
    /// Why the newest snapshot failed, or parts of it.
    complaint: Option<String>,
}

#[derive(Debug)]
struct Agent {
    listener: Socket,
    state: Mutex<State>,
    changed: Condvar,
}

impl Agent {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Wakes the thread that accepts.
        let _closed = self.listener.shutdown(Shutdown::Both);
    }
}

/// The agent of one node.
#[derive(Clone, Debug)]
pub struct Zds(Arc<Agent>);

impl Zds {
    /// Listens there, until the last clone is dropped.
    pub fn listen(path: &Path) -> Result<Self> {
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        listener.bind(&SockAddr::unix(path)?).context("cannot listen for the node proxy")?;
        listener.listen(8)?;
        let accepting = listener.try_clone()?;
        let agent =
            Arc::new(Agent { listener, state: Mutex::default(), changed: Condvar::default() });
        let weak = Arc::downgrade(&agent);
        thread::Builder::new().name("zds".into()).spawn(move || accept(&accepting, &weak))?;
        Ok(Self(agent))
    }

    /// Enrols a pod; an error says what the node proxy answered. Without one it is for the next.
    pub fn add(&self, uid: &str, info: Info, namespace: &Namespace) -> Result<()> {
        let mut state = self.0.state();
        let pod = Enrolled { info, namespace: Some(namespace.clone()) };
        let message = add(uid, &pod);
        state.pods.insert(uid.to_owned(), pod);
        state.tell_newest(&message, namespace.fd())
    }

    /// Takes a pod out: every node proxy is told.
    pub fn del(&self, uid: &str) -> Result<()> {
        let mut state = self.0.state();
        state.pods.remove(uid);
        state.tell_all(&Payload::Del(DelWorkload { uid: uid.to_owned() }))
    }

    /// Forgets where a pod is, as an agent that was restarted may: it says "keep" from now on.
    pub fn forget(&self, uid: &str) {
        if let Some(pod) = self.0.state().pods.get_mut(uid) {
            pod.namespace = None;
        }
    }

    /// How many node proxies have connected so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.state().connections
    }

    /// Ends all connections, as an agent that goes away does.
    pub fn hang_up(&self) {
        self.0.state().connected.clear();
    }

    /// What went wrong with the newest snapshot.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        self.0.state().complaint.clone()
    }

    /// Waits until so many node proxies have connected and taken their snapshot.
    pub fn wait_connections(&self, count: usize, deadline: Duration) -> Result<()> {
        let there = |s: &mut State| s.connections < count || !s.greeted;
        let waited = self.0.changed.wait_timeout_while(self.0.state(), deadline, there);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("no node proxy came: {}", state.complaint.as_deref().unwrap_or("nothing heard"));
        }
        Ok(())
    }
}

impl State {
    /// What is new is for the newest alone. One that is gone is forgotten: the next one gets a snapshot.
    fn tell_newest(&mut self, message: &Payload, fd: BorrowedFd<'_>) -> Result<()> {
        while let Some(connection) = self.connected.last() {
            match ask(connection, message, Some(fd)) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(refusal)) => bail!("the node proxy refused: {refusal}"),
                Err(_) => drop(self.connected.pop()),
            }
        }
        Ok(())
    }

    fn tell_all(&mut self, message: &Payload) -> Result<()> {
        let mut refusals = Vec::new();
        self.connected.retain(|connection| match ask(connection, message, None) {
            Ok(answer) => {
                refusals.extend(answer.err());
                true
            }
            Err(_) => false,
        });
        anyhow::ensure!(refusals.is_empty(), "a node proxy refused: {refusals:?}");
        Ok(())
    }

    /// Hello, the pods, and the end of the snapshot.
    fn greet(&mut self, connection: &Socket) -> Result<()> {
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.set_write_timeout(Some(PATIENCE))?;
        let hello = ZdsHello::decode(receive(connection)?.as_slice()).context("no hello")?;
        anyhow::ensure!(hello.version == 1, "version {}", hello.version);
        for (uid, pod) in &self.pods {
            let answer = match &pod.namespace {
                Some(namespace) => ask(connection, &add(uid, pod), Some(namespace.fd()))?,
                None => ask(connection, &Payload::Keep(KeepWorkload { uid: uid.clone() }), None)?,
            };
            if let Err(refusal) = answer {
                self.complaint = Some(format!("{}: {refusal}", pod.info.name));
            }
        }
        let end = ask(connection, &Payload::SnapshotSent(SnapshotSent {}), None)?;
        end.map_err(|refusal| anyhow::anyhow!("snapshot: {refusal}"))
    }
}

fn accept(listener: &Socket, agent: &Weak<Agent>) {
    while let Ok((connection, _)) = listener.accept() {
        let Some(agent) = agent.upgrade() else { return };
        let mut state = agent.state();
        (state.greeted, state.complaint) = (false, None);
        match state.greet(&connection) {
            Ok(()) => {
                state.greeted = true;
                state.connected.push(connection);
            }
            Err(why) => state.complaint = Some(format!("{why:#}")),
        }
        state.connections += 1;
        drop(state);
        agent.changed.notify_all();
    }
}

fn add(uid: &str, pod: &Enrolled) -> Payload {
    let Info { name, namespace, service_account } = pod.info.clone();
    Payload::Add(AddWorkload {
        uid: uid.to_owned(),
        workload_info: Some(WorkloadInfo { name, namespace, service_account }),
    })
}

/// Sends one packet and waits for its one answer: `Ok(Err(_))` is a refusal.
fn ask(
    connection: &Socket,
    message: &Payload,
    fd: Option<BorrowedFd<'_>>,
) -> Result<Result<(), String>> {
    let bytes = WorkloadRequest { payload: Some(message.clone()) }.encode_to_vec();
    let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
    let vector = [IoSlice::new(&bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(connection.as_raw_fd(), &vector, rights, flags, None)?;
    let response = WorkloadResponse::decode(receive(connection)?.as_slice())?;
    let Some(workload_response::Payload::Ack(ack)) = response.payload else {
        bail!("an answer that is no ack");
    };
    Ok(if ack.error.is_empty() { Ok(()) } else { Err(ack.error) })
}

fn receive(mut connection: &Socket) -> io::Result<Vec<u8>> {
    let mut packet = vec![0; PACKET];
    match connection.read(&mut packet)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        length => {
            packet.truncate(length);
            Ok(packet)
        }
    }
}
