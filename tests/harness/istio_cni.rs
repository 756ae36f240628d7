//! The rules that istio-cni writes inside a pod (`spec/ztunnel.md` §9.3), in the same order, by each of the
//! tools that it may use: what a node proxy with `CAPTURE=external` relies on.

use std::fmt::Write;

use anyhow::{Context, Result};

use crate::topology::{PROBE, Pod};

/// Who writes the rules down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Backend {
    /// iptables, as Debian has it: rules of nftables underneath.
    Iptables,
    /// iptables of old.
    Legacy,
    /// nftables.
    Nftables,
}

/// What is captured.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Who writes them.
    pub backend: Backend,
    /// Whether DNS is captured as well.
    pub dns: bool,
    /// Whether what comes in is left alone (`ambient.istio.io/bypass-inbound-capture`).
    pub ingress: bool,
}

impl Rules {
    /// The usual ones, without DNS.
    #[must_use]
    pub const fn new(backend: Backend) -> Self {
        Self { backend, dns: false, ingress: false }
    }

    /// Writes them.
    pub fn write(self, pod: &Pod) -> Result<()> {
        let mut script = String::from("set -e\n");
        for ip in ["-4", "-6"] {
            let _always =
                writeln!(script, "ip {ip} rule add fwmark 0x111/0xfff pref 32764 lookup 100");
            let _always = writeln!(script, "ip {ip} route add local default dev lo table 100");
        }
        match self.backend {
            Backend::Iptables | Backend::Legacy => self.iptables(&mut script),
            Backend::Nftables => self.nftables(&mut script),
        }
        pod.run(["bash", "-c", &script])?.ok().with_context(|| format!("{:?}", self.backend))?;
        Ok(())
    }

    fn iptables(self, script: &mut String) {
        for (v6, local, probe) in
            [("", "127.0.0.1/32", PROBE.0.to_string()), ("6", "::1/128", PROBE.1.to_string())]
        {
            let tool = match self.backend {
                Backend::Legacy => format!("ip{v6}tables-legacy-restore -w"),
                Backend::Iptables | Backend::Nftables => format!("ip{v6}tables-restore"),
            };
            let _always = writeln!(script, "{tool} --noflush <<'EOF'");
            table(script, "mangle", "
                -A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
                -A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff");
            let inbound = format!("
                -A ISTIO_PRERT -s {probe} -p tcp -j ACCEPT
                -A ISTIO_PRERT ! -d {local} -p tcp ! --dport 15008 {UNMARKED} -j REDIRECT --to-ports 15006");
            let dns = format!("
                -A ISTIO_OUTPUT ! -o lo -p udp {UNMARKED} --dport 53 -j REDIRECT --to-ports 15053
                -A ISTIO_OUTPUT ! -d {local} -p tcp --dport 53 {UNMARKED} -j REDIRECT --to-ports 15053");
            let rules = format!(
                "{}
                -A ISTIO_OUTPUT -d {probe} -p tcp -j ACCEPT{}
                -A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
                -A ISTIO_OUTPUT ! -d {local} -o lo -j ACCEPT
                -A ISTIO_OUTPUT ! -d {local} -p tcp {UNMARKED} -j REDIRECT --to-ports 15001",
                if self.ingress { "" } else { &inbound },
                if self.dns { &dns } else { "" },
            );
            table(script, "nat", &rules);
            if self.dns {
                table(
                    script,
                    "raw",
                    &format!(
                        "
                    -A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff --dport 53 -j CT --zone 1
                    -A ISTIO_PRERT -p udp {UNMARKED} --sport 53 -j CT --zone 1"
                    ),
                );
            }
            script.push_str("EOF\n");
        }
    }

    fn nftables(self, script: &mut String) {
        const OURS: &str = "meta mark & 0xfff == 0x539";
        const NOT_OURS: &str = "meta mark & 0xfff != 0x539";
        script.push_str("nft -f - <<'EOF'\n");
        nft(
            script,
            "mangle",
            -150,
            ("filter", "route"),
            [
                &format!("{OURS} ct mark set ct mark & 0xfffff000 | 0x111"),
                "ct mark & 0xfff == 0x111 meta mark set ct mark",
            ],
        );
        let (mut inbound, mut outbound, mut dns, mut last) =
            (String::new(), String::new(), String::new(), String::new());
        for (family, local, probe) in
            [("ip", "127.0.0.1", PROBE.0.to_string()), ("ip6", "::1", PROBE.1.to_string())]
        {
            let _always = write!(
                inbound,
                "
                {family} saddr {probe} meta l4proto tcp accept
                {family} daddr != {local} tcp dport != 15008 {NOT_OURS} redirect to :15006"
            );
            let _always = write!(
                outbound,
                "
                {family} daddr {probe} meta l4proto tcp accept"
            );
            let _always = write!(
                dns,
                "
                meta nfproto {} oifname != \"lo\" udp dport 53 {NOT_OURS} redirect to :15053
                {family} daddr != {local} tcp dport 53 {NOT_OURS} redirect to :15053",
                if family == "ip" { "ipv4" } else { "ipv6" }
            );
            let _always = write!(
                last,
                "
                {family} daddr != {local} oifname \"lo\" accept
                {family} daddr != {local} meta l4proto tcp {NOT_OURS} redirect to :15001"
            );
        }
        if self.dns {
            outbound.push_str(&dns);
        }
        outbound.push_str("\nmeta l4proto tcp meta mark & 0xfff == 0x111 accept");
        outbound.push_str(&last);
        let inbound = if self.ingress { "" } else { inbound.as_str() };
        nft(script, "nat", -100, ("nat", "nat"), [inbound, &outbound]);
        if self.dns {
            nft(
                script,
                "raw",
                -300,
                ("filter", "filter"),
                [
                    &format!("udp sport 53 {NOT_OURS} ct zone set 1"),
                    &format!("udp dport 53 {OURS} ct zone set 1"),
                ],
            );
        }
        script.push_str("EOF\n");
    }
}

const UNMARKED: &str = "-m mark ! --mark 0x539/0xfff";

/// A table of iptables with the two chains that everything is in.
fn table(script: &mut String, name: &str, rules: &str) {
    let _always = writeln!(
        script,
        "*{name}\n:ISTIO_PRERT - [0:0]\n:ISTIO_OUTPUT - [0:0]\n\
         -A PREROUTING -j ISTIO_PRERT\n-A OUTPUT -j ISTIO_OUTPUT"
    );
    for rule in rules.lines().map(str::trim).filter(|rule| !rule.is_empty()) {
        let _always = writeln!(script, "{rule}");
    }
    script.push_str("COMMIT\n");
}

/// A table of nftables: what comes in, and what goes out.
fn nft(script: &mut String, name: &str, priority: i32, kinds: (&str, &str), rules: [&str; 2]) {
    let [inbound, outbound] = rules;
    let _always = writeln!(
        script,
        "table inet istio-ambient-{name} {{
        chain istio-prerouting {{\n{inbound}\n}}
        chain istio-output {{\n{outbound}\n}}
        chain prerouting {{ type {} hook prerouting priority {priority}; jump istio-prerouting; }}
        chain output {{ type {} hook output priority {priority}; jump istio-output; }}\n}}",
        kinds.0, kinds.1
    );
}
