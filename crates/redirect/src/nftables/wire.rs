//! Netlink messages of nf_tables: nested type-length-value attributes (`linux/netfilter/nf_tables.h`, netlink(7)).

use crate::InstalledRule;
use crate::rules::Hook;

/// Constants of the kernel interface that rules use.
pub mod attributes {
    /// Name of a packet's incoming interface.
    pub const META_IIFNAME: u32 = 6;
    /// Name of a packet's outgoing interface.
    pub const META_OIFNAME: u32 = 7;
    /// User ID of the sending socket.
    pub const META_SKUID: u32 = 10;
    /// The source address (`NFTA_FIB_F_SADDR`).
    pub const FIB_SOURCE: u32 = 1;
    /// The destination address (`NFTA_FIB_F_DADDR`).
    pub const FIB_DESTINATION: u32 = 2;
    /// Type of an address that is neither ours nor a group's (`RTN_UNICAST`, rtnetlink(7)).
    pub const UNICAST: u32 = 1;
    /// IP version of a packet.
    pub(super) const META_NFPROTO: u32 = 15;
    pub(super) const META_L4PROTO: u32 = 16;
    /// Value of [`META_NFPROTO`] for IPv4.
    pub const NFPROTO_IPV4: u8 = 2;
    /// Value of [`META_NFPROTO`] for IPv6.
    pub const NFPROTO_IPV6: u8 = 10;
}

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;

const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const DELRULE: u16 = 8;

const REGISTER_1: u32 = 1;
const REGISTER_VERDICT: u32 = 0;
const VERDICT_RETURN: i32 = -5;
const VERDICT_JUMP: i32 = -3;
const VERDICT_DROP: i32 = 0;
const VERDICT_ACCEPT: i32 = 1;
/// What the expression `fib` looks up: the type of an address (`NFT_FIB_RESULT_ADDRTYPE`).
const FIB_ADDRTYPE: u32 = 3;
/// The key `NFT_SOCKET_CGROUPV2` of the expression `socket`.
const SOCKET_CGROUP: u32 = 3;
const CT_STATE: u32 = 0;
/// `NF_CT_STATE_INVALID_BIT`. A packet has one state, so that it can be compared whole.
const CT_STATE_INVALID: u32 = 1;
const CT_DIRECTION: u32 = 1;
const CT_DIRECTION_REPLY: u8 = 1;
/// Rate and burst of logged packets: ten per minute, five at once.
const SAMPLES: (u64, u32) = (10, 5);
const SECONDS_OF_SAMPLES: u64 = 60;
/// `syslog` level of notices.
const LOG_NOTICE: u32 = 5;

/// Attributes under construction.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.put(kind, &[value.as_bytes(), b"\0"].concat())
    }

    fn nested(&mut self, kind: u16, inner: &Attributes) -> &mut Self {
        self.put(kind | NLA_F_NESTED, &inner.0)
    }

    fn with(change: impl FnOnce(&mut Self) -> &mut Self) -> Self {
        let mut new = Self::default();
        change(&mut new);
        new
    }
}

/// Builds one message, including its header.
pub struct Message;

impl Message {
    fn bytes(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, body: &Attributes) -> Vec<u8> {
        let length = u32::try_from(16 + 4 + body.0.len()).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(20 + body.0.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend([family, 0]);
        message.extend(resource.to_be_bytes());
        message.extend(&body.0);
        message
    }

    fn nftables(kind: u16) -> u16 {
        NFNL_SUBSYS_NFTABLES << 8 | kind
    }

    /// Requests all rules of a table.
    pub fn dump_rules(table: &str) -> Vec<u8> {
        let body = Attributes::with(|a| a.text(1, table));
        Self::bytes(Self::nftables(GETRULE), NLM_F_REQUEST | NLM_F_DUMP, 1, NFPROTO_INET, 0, &body)
    }
}

/// A transaction under construction.
pub struct Batch {
    bytes: Vec<u8>,
    messages: u32,
    /// Where the last message begins.
    last: usize,
}

impl Batch {
    /// An empty transaction.
    pub fn new() -> Self {
        let begin =
            Message::bytes(BATCH_BEGIN, NLM_F_REQUEST, 0, NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES, &Attributes::default());
        Self { bytes: begin, messages: 0, last: 0 }
    }

    fn push(&mut self, kind: u16, flags: u16, body: &Attributes) -> &mut Self {
        self.messages += 1;
        self.last = self.bytes.len();
        let flags = NLM_F_REQUEST | flags;
        self.bytes.extend(Message::bytes(Message::nftables(kind), flags, self.messages, NFPROTO_INET, 0, body));
        self
    }

    /// Creates a table if it is missing.
    pub fn new_table(&mut self, name: &str) -> &mut Self {
        let body = Attributes::with(|a| a.text(1, name).u32(2, 0));
        self.push(NEWTABLE, NLM_F_CREATE, &body)
    }

    /// Deletes a table with everything in it.
    pub fn delete_table(&mut self, name: &str) -> &mut Self {
        let body = Attributes::with(|a| a.text(1, name));
        self.push(DELTABLE, 0, &body)
    }

    /// Adds a base chain of this type at a hook. Packets that no rule decides on are accepted.
    pub fn new_base_chain(&mut self, table: &str, name: &str, kind: &str, hook: Hook, priority: i32) -> &mut Self {
        // Numbers of `enum nf_inet_hooks`.
        let number = match hook {
            Hook::Prerouting => 0,
            Hook::OwnInput | Hook::GuardInput => 1,
            Hook::Sidecar | Hook::Output | Hook::Loopback | Hook::OwnPorts | Hook::GuardOutput => 3,
        };
        let place = Attributes::with(|a| a.u32(1, number).put(2, &priority.to_be_bytes()));
        let accept = 1;
        let body = Attributes::with(|a| a.text(1, table).text(3, name).nested(4, &place).u32(5, accept).text(7, kind));
        self.push(NEWCHAIN, NLM_F_CREATE, &body)
    }

    /// Adds a chain that rules of other chains jump to.
    pub fn new_chain(&mut self, table: &str, name: &str) -> &mut Self {
        let body = Attributes::with(|a| a.text(1, table).text(3, name));
        self.push(NEWCHAIN, NLM_F_CREATE, &body)
    }

    /// Deletes all rules of a chain, which must exist.
    pub fn delete_rules(&mut self, table: &str, chain: &str) -> &mut Self {
        let body = Attributes::with(|a| a.text(1, table).text(2, chain));
        self.push(DELRULE, 0, &body)
    }

    /// Appends a rule to a chain.
    pub fn new_rule(&mut self, table: &str, chain: &str, expressions: Expressions, comment: &str) -> &mut Self {
        let list = Attributes(expressions.0.0);
        // nft stores comments as type 0 of its own type-length-value format, terminated by NUL.
        let comment: Vec<u8> = comment.bytes().take(120).chain([0]).collect();
        let user_data = [&[0, u8::try_from(comment.len()).unwrap_or(u8::MAX)][..], &comment].concat();
        let body = Attributes::with(|a| a.text(1, table).text(2, chain).nested(4, &list).put(7, &user_data));
        self.push(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, &body)
    }

    /// The bytes to send. One answer comes back when all is done, and one for each message that is refused: an acknowledgement of
    /// each would not fit into the socket's memory, which is read only when the kernel has taken them all.
    pub fn finish(mut self) -> Vec<u8> {
        // Flags stand behind length and type (netlink(7)).
        if let Some(flags) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            flags.copy_from_slice(&(u16::from_ne_bytes([flags[0], flags[1]]) | NLM_F_ACK).to_ne_bytes());
        }
        let end = Message::bytes(
            BATCH_END,
            NLM_F_REQUEST,
            self.messages + 1,
            NFPROTO_UNSPEC,
            NFNL_SUBSYS_NFTABLES,
            &Attributes::default(),
        );
        self.bytes.extend(end);
        self.bytes
    }
}

/// The steps of a rule.
pub struct Expressions(Attributes);

impl Expressions {
    /// A rule without steps.
    pub fn new() -> Self {
        Self(Attributes::default())
    }

    fn step(&mut self, name: &str, data: impl FnOnce(&mut Attributes) -> &mut Attributes) -> &mut Self {
        let data = Attributes::with(data);
        let expression = Attributes::with(|a| a.text(1, name).nested(2, &data));
        self.0.nested(1, &expression);
        self
    }

    /// Loads metadata of the packet.
    pub fn meta(&mut self, key: u32) -> &mut Self {
        self.step("meta", |a| a.u32(1, REGISTER_1).u32(2, key))
    }

    /// Continues if the loaded value equals this one.
    pub fn equals(&mut self, value: &[u8]) -> &mut Self {
        let data = Attributes::with(|a| a.put(1, value));
        self.step("cmp", |a| a.u32(1, REGISTER_1).u32(2, 0).nested(3, &data))
    }

    /// Continues if the register holds another value than this.
    pub fn differs(&mut self, value: &[u8]) -> &mut Self {
        let data = Attributes::with(|a| a.put(1, value));
        self.step("cmp", |a| a.u32(1, REGISTER_1).u32(2, 1).nested(3, &data))
    }

    /// Loads the type of an address by the routing tables.
    pub fn address_type(&mut self, of: u32) -> &mut Self {
        self.step("fib", |a| a.u32(1, REGISTER_1).u32(2, FIB_ADDRTYPE).u32(3, of))
    }

    /// Loads the ID of the cgroup (version 2) of the packet's socket, or of its parent that is so many levels below the root.
    pub fn cgroup(&mut self, level: u8) -> &mut Self {
        self.step("socket", |a| a.u32(1, SOCKET_CGROUP).u32(2, REGISTER_1).u32(3, level.into()))
    }

    /// Continues for this protocol above IP.
    pub fn protocol(&mut self, number: u8) -> &mut Self {
        self.meta(attributes::META_L4PROTO).equals(&[number])
    }

    /// Continues for packets of the reply direction of a connection.
    pub fn reply(&mut self) -> &mut Self {
        self.step("ct", |a| a.u32(1, REGISTER_1).u32(2, CT_DIRECTION)).equals(&[CT_DIRECTION_REPLY])
    }

    /// Goes on for a packet that belongs to no connection.
    pub fn invalid(&mut self) -> &mut Self {
        self.step("ct", |a| a.u32(1, REGISTER_1).u32(2, CT_STATE)).equals(&CT_STATE_INVALID.to_ne_bytes())
    }

    /// Goes on for this IP version.
    pub fn family(&mut self, nfproto: u8) -> &mut Self {
        self.meta(attributes::META_NFPROTO).equals(&[nfproto])
    }

    fn header(&mut self, base: u32, offset: u32, length: u32) -> &mut Self {
        self.step("payload", |a| a.u32(1, REGISTER_1).u32(2, base).u32(3, offset).u32(4, length))
    }

    /// Loads bytes of the IP header.
    pub fn network_header(&mut self, offset: u32, length: u32) -> &mut Self {
        self.header(1, offset, length)
    }

    /// Loads bytes of the TCP or UDP header.
    pub fn transport_header(&mut self, offset: u32, length: u32) -> &mut Self {
        self.header(2, offset, length)
    }

    /// Keeps the bits of the mask in the loaded value.
    pub fn mask(&mut self, mask: &[u8]) -> &mut Self {
        let value = |bytes: &[u8]| Attributes::with(|a| a.put(1, bytes));
        let (keep, flip) = (value(mask), value(&vec![0; mask.len()]));
        let length = u32::try_from(mask.len()).unwrap_or(0);
        self.step("bitwise", |a| {
            a.u32(1, REGISTER_1).u32(2, REGISTER_1).u32(3, length).nested(4, &keep).nested(5, &flip)
        })
    }

    /// Counts packets and bytes.
    pub fn counter(&mut self) -> &mut Self {
        self.step("counter", |a| a)
    }

    /// Leaves the chain without a further rule.
    pub fn returns(&mut self) -> &mut Self {
        self.verdict(VERDICT_RETURN)
    }

    /// Lets the packet pass this hook's chain.
    pub fn accepts(&mut self) -> &mut Self {
        self.verdict(VERDICT_ACCEPT)
    }

    /// Continues in another chain, and returns here unless that one decides.
    pub fn jumps(&mut self, chain: &str) -> &mut Self {
        let verdict = Attributes::with(|a| a.put(1, &VERDICT_JUMP.to_be_bytes()).text(2, chain));
        self.decide(&verdict)
    }

    /// Drops the packet.
    pub fn drops(&mut self) -> &mut Self {
        self.verdict(VERDICT_DROP)
    }

    fn verdict(&mut self, code: i32) -> &mut Self {
        self.decide(&Attributes::with(|a| a.put(1, &code.to_be_bytes())))
    }

    fn decide(&mut self, verdict: &Attributes) -> &mut Self {
        let data = Attributes::with(|a| a.nested(2, verdict));
        self.step("immediate", |a| a.u32(1, REGISTER_VERDICT).nested(2, &data))
    }

    /// Writes some of the packets to the kernel's log.
    pub fn samples(&mut self, prefix: &str) -> &mut Self {
        let (rate, burst) = SAMPLES;
        self.step("limit", |a| {
            a.put(1, &rate.to_be_bytes()).put(2, &SECONDS_OF_SAMPLES.to_be_bytes()).u32(3, burst).u32(4, 0).u32(5, 0)
        });
        self.step("log", |a| a.text(2, prefix).u32(5, LOG_NOTICE))
    }

    /// Redirects the connection to a local port.
    pub fn redirect_to(&mut self, port: u16) -> &mut Self {
        let data = Attributes::with(|a| a.put(1, &port.to_be_bytes()));
        self.step("immediate", |a| a.u32(1, REGISTER_1).nested(2, &data));
        // The port is given, so the flag NF_NAT_RANGE_PROTO_SPECIFIED is set.
        self.step("redir", |a| a.u32(1, REGISTER_1).u32(3, 2))
    }
}

/// A message from the kernel.
pub enum Answer<'a> {
    /// The end of a dump.
    Done,
    /// An acknowledgement (0) or a positive error number.
    Error(i32),
    /// The attributes of a rule.
    Rule(&'a [u8]),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The relevant messages of a buffer. Stops at the first malformed one.
pub fn messages(buffer: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(u32_at(rest, 0)?).ok()?;
            let kind = u16_at(rest, 4)?;
            let message = rest.get(16..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match kind {
                NLMSG_DONE => return Some(Answer::Done),
                NLMSG_ERROR => {
                    let code = i32::from_ne_bytes(message.get(..4)?.try_into().ok()?);
                    // The smallest number has no positive counterpart; the kernel never sends it, and it must not cause
                    // a panic.
                    return Some(Answer::Error(code.saturating_neg()));
                }
                k if k == Message::nftables(NEWRULE) => return Some(Answer::Rule(message.get(4..)?)),
                _ => {}
            }
        }
    })
}

/// Whether what is dumped was changed during the dump, as any of these messages says (`NLM_F_DUMP_INTR`).
pub fn was_interrupted(buffer: &[u8]) -> bool {
    let mut rest = buffer;
    while let (Some(length), Some(flags)) = (u32_at(rest, 0), u16_at(rest, 6)) {
        if flags & NLM_F_DUMP_INTR != 0 {
            return true;
        }
        let next = usize::try_from(length).ok().map(|length| length.max(16).next_multiple_of(4));
        rest = next.and_then(|next| rest.get(next..)).unwrap_or_default();
    }
    false
}

/// The attributes of a message, type and value. Stops at the first malformed one.
fn each(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    each(bytes).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

/// The comment and the counter of a rule; `None` if it has no comment.
pub fn read_rule(rule: &[u8]) -> Option<InstalledRule> {
    let user_data = find(rule, 7)?;
    let length = usize::from(*user_data.get(1)?);
    let comment = user_data.get(2..2 + length)?;
    let comment = String::from_utf8_lossy(comment).trim_end_matches('\0').to_owned();
    let mut installed = InstalledRule { comment, packets: 0, bytes: 0 };
    for (_, expression) in each(find(rule, 4)?) {
        if find(expression, 1) == Some(b"counter\0") {
            let data = find(expression, 2)?;
            let number = |kind| find(data, kind).and_then(|v| v.try_into().ok()).map_or(0, u64::from_be_bytes);
            installed.bytes = number(1);
            installed.packets = number(2);
        }
    }
    Some(installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_any_number_is_read() {
        for (number, read) in [(-2, 2), (0, 0), (i32::MIN, i32::MAX)] {
            let mut answer = [&20_u32.to_ne_bytes()[..], &NLMSG_ERROR.to_ne_bytes(), &[0; 10]].concat();
            answer.extend(i32::to_ne_bytes(number));
            let found: Vec<i32> = messages(&answer)
                .filter_map(|answer| if let Answer::Error(code) = answer { Some(code) } else { None })
                .collect();
            assert_eq!(found, [read]);
        }
    }

    #[test]
    fn a_dump_says_in_any_of_its_messages_that_it_was_interrupted() {
        let message =
            |flags: u16| [&18_u32.to_ne_bytes()[..], &[0; 2], &flags.to_ne_bytes(), &[0; 10], &[0; 2]].concat();
        let (whole, interrupted) = (message(2), message(NLM_F_DUMP_INTR | 2));
        assert!(!was_interrupted(&[]) && !was_interrupted(&[whole.clone(), whole.clone()].concat()));
        assert!(was_interrupted(&[whole.clone(), interrupted.clone()].concat()));
        assert!(was_interrupted(&[interrupted, whole].concat()));
        assert!(!was_interrupted(&[0; 40]), "a length of nothing ends");
    }
}
