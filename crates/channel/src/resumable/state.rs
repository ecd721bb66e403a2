//! Both directions of one stream, as they stand: what to send next, what a frame means.
//! Pure: no I/O and no clock.

use bytes::{Bytes, BytesMut};

use super::frame::{Frame, MAX_DATA, Violation, data_header};
use super::queue::Queue;

/// Pieces in one write; more would only be split again by the system.
const PIECES: usize = 16;

/// See the module. Offsets count the stream's bytes from its beginning.
#[derive(Debug)]
pub(super) struct State {
    capacity: u64,

    /// Read from the user, not yet known to be delivered.
    out: Queue,
    /// The next byte to send on this link.
    cursor: u64,
    /// The furthest ever sent.
    sent: u64,
    /// What the limiter has let pass.
    granted: u64,
    /// How much may be under way: the peer's room.
    window: u64,
    /// The user has ended its side, at `out.end()`.
    fin: bool,
    fin_sent: bool,
    fin_acked: bool,

    /// Received, not yet delivered to the user.
    inn: Queue,
    peer_fin: Option<u64>,
    fin_delivered: bool,
    ack_sent: (u64, bool),

    /// The peer's `Resume` has come on this link.
    resumed: bool,
    resume_sent: bool,
    ping: Option<u64>,
    pong: Option<u64>,
    bye_sent: bool,
    bye_received: bool,
    abort: Option<String>,
    abort_sent: bool,

    /// Links on which the peer spoke.
    links: u64,
    /// Bytes that were sent more than once.
    pub(super) resent: u64,
}

impl State {
    /// Buffers at most `capacity` bytes each way.
    pub(super) fn new(capacity: u64, limited: bool) -> Self {
        Self {
            capacity,
            out: Queue::default(),
            cursor: 0,
            sent: 0,
            granted: if limited { 0 } else { u64::MAX },
            window: 0,
            fin: false,
            fin_sent: false,
            fin_acked: false,
            inn: Queue::default(),
            peer_fin: None,
            fin_delivered: false,
            ack_sent: (0, false),
            resumed: false,
            resume_sent: false,
            ping: None,
            pong: None,
            bye_sent: false,
            bye_received: false,
            abort: None,
            abort_sent: false,
            links: 0,
            resent: 0,
        }
    }

    // The user's side.

    /// How many bytes may be read from the user now.
    pub(super) fn room(&self) -> u64 {
        self.capacity.saturating_sub(self.out.len())
    }

    pub(super) fn push(&mut self, bytes: Bytes) {
        self.out.push(bytes);
    }

    /// The user ends its side.
    pub(super) fn end(&mut self) {
        self.fin = true;
    }

    /// The user is gone; the peer is to know why.
    pub(super) fn abort(&mut self, why: String) {
        self.abort.get_or_insert(why);
    }

    /// What to deliver next.
    pub(super) fn deliverable(&self) -> Vec<Bytes> {
        self.inn.slices(self.inn.start(), u64::MAX, PIECES)
    }

    /// The user took `n` bytes.
    pub(super) fn delivered(&mut self, n: usize) {
        self.inn.advance_to(self.inn.start() + n as u64);
    }

    /// Everything is delivered and the peer ended its side.
    pub(super) fn at_peers_end(&self) -> bool {
        self.peer_fin == Some(self.inn.start())
    }

    pub(super) fn end_delivered(&mut self) {
        self.fin_delivered = true;
    }

    // The limiter's side.

    /// Bytes that wait for the limiter.
    pub(super) fn ungranted(&self) -> u64 {
        self.out.end().saturating_sub(self.granted)
    }

    pub(super) fn grant(&mut self, n: u64) {
        self.granted += n;
    }

    // The link's side.

    /// A new link: each side begins by telling how much it has.
    pub(super) fn begin_link(&mut self) {
        self.resumed = false;
        self.resume_sent = false;
        self.fin_sent = false;
        self.bye_sent = false;
        self.abort_sent = false;
        self.ack_sent = (0, false);
        self.ping = None;
        self.pong = None;
    }

    pub(super) fn links(&self) -> u64 {
        self.links
    }

    pub(super) fn ping(&mut self, stamp: u64) {
        self.ping = Some(stamp);
    }

    pub(super) fn resumed(&self) -> bool {
        self.resumed
    }

    /// Both directions are delivered and both ends known.
    pub(super) fn complete(&self) -> bool {
        self.fin_acked && self.fin_delivered
    }

    /// Complete, and so is the peer: nobody needs a link any more.
    pub(super) fn finished(&self) -> bool {
        self.complete() && self.bye_received
    }

    pub(super) fn parted(&self) -> bool {
        self.finished() && self.bye_sent
    }

    /// Why the user is gone, once the peer was told.
    pub(super) fn aborted(&self) -> Option<String> {
        self.abort.clone().filter(|_| self.abort_sent)
    }

    /// Bytes read from the user that the peer's user does not have yet.
    pub(super) fn buffered(&self) -> u64 {
        self.out.len()
    }

    pub(super) fn read_total(&self) -> u64 {
        self.out.end()
    }

    pub(super) fn delivered_total(&self) -> u64 {
        self.inn.start()
    }

    /// What to write next; empty when there is nothing to say.
    pub(super) fn next_batch(&mut self) -> Vec<Bytes> {
        let mut head = BytesMut::new();
        if !self.resume_sent {
            self.resume_sent = true;
            Frame::Resume { received: self.inn.end(), window: self.capacity }.put(&mut head);
        }
        if !self.resumed {
            return nonempty(head);
        }
        if let Some(why) = self.abort.clone().filter(|_| !self.abort_sent) {
            self.abort_sent = true;
            Frame::Abort(why).put(&mut head);
        }
        if let Some(stamp) = self.ping.take() {
            Frame::Ping(stamp).put(&mut head);
        }
        if let Some(stamp) = self.pong.take() {
            Frame::Pong(stamp).put(&mut head);
        }
        let ack = (self.inn.start(), self.fin_delivered);
        if ack != self.ack_sent {
            self.ack_sent = ack;
            Frame::Ack { delivered: ack.0, fin: ack.1 }.put(&mut head);
        }
        let data = self.next_data(&mut head);
        if self.fin && !self.fin_sent && self.cursor == self.out.end() && data.is_empty() {
            self.fin_sent = true;
            Frame::Fin { at: self.cursor }.put(&mut head);
        }
        if self.complete() && !self.bye_sent {
            self.bye_sent = true;
            Frame::Bye.put(&mut head);
        }
        let mut batch = nonempty(head);
        batch.extend(data);
        batch
    }

    fn next_data(&mut self, head: &mut BytesMut) -> Vec<Bytes> {
        let limit = self.granted.min(self.out.start() + self.window);
        let most = limit.saturating_sub(self.cursor).min(MAX_DATA);
        let data = self.out.slices(self.cursor, most, PIECES);
        let length: usize = data.iter().map(Bytes::len).sum();
        if length > 0 {
            data_header(head, self.cursor, length);
            let end = self.cursor + length as u64;
            self.resent += self.sent.min(end).saturating_sub(self.cursor);
            self.cursor = end;
            self.sent = self.sent.max(end);
        }
        data
    }

    /// Takes in a frame. Returns the stamp of a ping that came back.
    pub(super) fn take(&mut self, frame: Frame) -> Result<Option<u64>, Violation> {
        match frame {
            Frame::Resume { received, window } => self.resume(received, window)?,
            _ if !self.resumed => return Err(Violation("a link did not begin with Resume")),
            Frame::Data { offset, bytes } => self.receive(offset, bytes)?,
            Frame::Ack { delivered, fin } => self.acknowledge(delivered, fin)?,
            Frame::Fin { at } => {
                let known = self.peer_fin.is_some_and(|known| known != at);
                if known || at != self.inn.end() {
                    return Err(Violation("the stream's end is not where it was said to be"));
                }
                self.peer_fin = Some(at);
            }
            Frame::Ping(stamp) => self.pong = Some(stamp),
            Frame::Pong(stamp) => return Ok(Some(stamp)),
            Frame::Bye => self.bye_received = true,
            // The session ends by it.
            Frame::Abort(_) => {}
        }
        Ok(None)
    }

    fn resume(&mut self, received: u64, window: u64) -> Result<(), Violation> {
        if self.resumed {
            return Err(Violation("a link was resumed twice"));
        }
        if received < self.out.start() || received > self.sent {
            return Err(Violation("the peer does not have what it had; was it restarted?"));
        }
        self.resumed = true;
        self.links += 1;
        self.window = window;
        self.cursor = received;
        Ok(())
    }

    fn receive(&mut self, offset: u64, mut bytes: Bytes) -> Result<(), Violation> {
        // Only a link that was cut mid-frame leads here with bytes that are known.
        let known = self.inn.end().checked_sub(offset);
        let known = known.ok_or(Violation("bytes are missing in the stream"))?;
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len());
        let new = bytes.split_off(known);
        if self.inn.len() + new.len() as u64 > self.capacity {
            return Err(Violation("the peer sent more than there is room for"));
        }
        if self.peer_fin.is_some() && !new.is_empty() {
            return Err(Violation("bytes came after the stream's end"));
        }
        self.inn.push(new);
        Ok(())
    }

    fn acknowledge(&mut self, delivered: u64, fin: bool) -> Result<(), Violation> {
        if delivered < self.out.start() || delivered > self.cursor {
            return Err(Violation("the peer acknowledged what was not sent"));
        }
        if fin && !(self.fin && delivered == self.out.end()) {
            return Err(Violation("the peer acknowledged an end that is not there"));
        }
        self.out.advance_to(delivered);
        self.fin_acked |= fin;
        Ok(())
    }
}

fn nonempty(head: BytesMut) -> Vec<Bytes> {
    if head.is_empty() { Vec::new() } else { vec![head.freeze()] }
}
