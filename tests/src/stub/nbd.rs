//! One client of the NBD server: fixed newstyle, structured replies, read only.

use super::block::read_at;
use super::export::Export;
use super::lock;
use super::machine::Qemu;
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The longest option and the longest read, in bytes.
const LONGEST: u32 = 32 << 20;
const ALLOCATION: &str = "base:allocation";
const BITMAP: &str = "qemu:dirty-bitmap:";

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const ERROR_UNSUPPORTED: u32 = 1 << 31 | 1;
const ERROR_INVALID: u32 = 1 << 31 | 3;
const ERROR_UNKNOWN: u32 = 1 << 31 | 6;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// What a client has chosen.
struct Session {
    stream: UnixStream,
    structured: bool,
    /// Contexts by id: 0 is the allocation, 2 and up are the export's bitmaps.
    contexts: Vec<u32>,
    /// The export that the contexts are of.
    contexts_of: String,
}

/// Serves a client until it leaves or is cut off.
pub fn serve(qemu: &Arc<Qemu>, stream: UnixStream, client: u64) {
    let (contexts, contexts_of) = (Vec::new(), String::new());
    let mut session = Session { stream, structured: false, contexts, contexts_of };
    // An error is the client's end, or its own fault.
    let _ = session.run(qemu, client);
}

impl Session {
    fn run(&mut self, qemu: &Arc<Qemu>, client: u64) -> io::Result<()> {
        let mut hello = MAGIC.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        // Fixed newstyle, no zeroes.
        hello.extend(3u16.to_be_bytes());
        self.stream.write_all(&hello)?;
        self.u32()?;
        let Some(export) = self.negotiate(qemu, client)? else { return Ok(()) };
        while self.request(qemu, &export)? {}
        Ok(())
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// `None` when the client gives up.
    fn negotiate(&mut self, qemu: &Qemu, client: u64) -> io::Result<Option<Export>> {
        loop {
            if self.u64()? != OPTION_MAGIC {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let (option, len) = (self.u32()?, self.u32()?);
            if len > LONGEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data)?;
            match option {
                // ABORT
                2 => {
                    self.option_reply(option, REPLY_ACK, &[])?;
                    return Ok(None);
                }
                // INFO, GO
                6 | 7 => {
                    if let Some(export) = self.describe(qemu, option, &data)?
                        && option == 7
                        && lock(&qemu.exports).enter(&export.name, client)
                    {
                        self.option_reply(option, REPLY_ACK, &[])?;
                        return Ok(Some(export));
                    }
                }
                // STRUCTURED_REPLY
                8 => {
                    self.structured = true;
                    self.option_reply(option, REPLY_ACK, &[])?;
                }
                // LIST_META_CONTEXT, SET_META_CONTEXT
                9 | 10 => self.meta_context(qemu, option, &data)?,
                _ => self.option_reply(option, ERROR_UNSUPPORTED, b"unsupported option")?,
            }
        }
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for field in [option, kind, data.len() as u32] {
            reply.extend(field.to_be_bytes());
        }
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    fn describe(&mut self, qemu: &Qemu, option: u32, data: &[u8]) -> io::Result<Option<Export>> {
        let name = string(&mut &data[..]).unwrap_or_default();
        let export = lock(&qemu.exports).by_name(&name);
        let size = export.as_ref().and_then(|export| size_of(qemu, export));
        let (Some(export), Some((size, direct))) = (export, size) else {
            let text = format!("export '{name}' not present");
            self.option_reply(option, ERROR_UNKNOWN, text.as_bytes())?;
            return Ok(None);
        };
        let mut sizes = 3u16.to_be_bytes().to_vec();
        for size in [if direct { 512 } else { 1 }, 4096, LONGEST] {
            sizes.extend(u32::to_be_bytes(size));
        }
        self.option_reply(option, REPLY_INFO, &sizes)?;
        // Has flags, read only, flush, FUA, several connections, cache; and "don't fragment".
        let flags = 0x50f | if self.structured { 1 << 7 } else { 0u16 };
        let mut info = 0u16.to_be_bytes().to_vec();
        info.extend(size.to_be_bytes());
        info.extend(flags.to_be_bytes());
        self.option_reply(option, REPLY_INFO, &info)?;
        if option == 6 {
            self.option_reply(option, REPLY_ACK, &[])?;
        }
        if self.contexts_of != export.name {
            self.contexts.clear();
        }
        Ok(Some(export))
    }

    fn meta_context(&mut self, qemu: &Qemu, option: u32, mut data: &[u8]) -> io::Result<()> {
        let name = string(&mut data).unwrap_or_default();
        let export = lock(&qemu.exports).by_name(&name);
        let Some(export) = export else {
            let text = format!("export '{name}' not present");
            return self.option_reply(option, ERROR_UNKNOWN, text.as_bytes());
        };
        if !self.structured || data.len() < 4 {
            let text = b"structured replies must be negotiated first";
            return self.option_reply(option, ERROR_INVALID, text);
        }
        data = &data[4..];
        let mut queries = Vec::new();
        while let Some(query) = string(&mut data) {
            queries.push(query);
        }
        let mut offered = vec![(0, ALLOCATION.to_owned())];
        offered.extend((2..).zip(export.bitmaps.iter().map(|(_, name)| format!("{BITMAP}{name}"))));
        // A list without queries names all; a query that ends in a colon all of its kind.
        let all = option == 9 && queries.is_empty();
        let asked = |name: &str| {
            let matches = |query: &String| {
                name == query || query.ends_with(':') && name.starts_with(query.as_str())
            };
            all || queries.iter().any(matches)
        };
        offered.retain(|(_, name)| asked(name));
        for (id, name) in &offered {
            let mut reply = u32::to_be_bytes(*id).to_vec();
            reply.extend(name.as_bytes());
            self.option_reply(option, REPLY_META_CONTEXT, &reply)?;
        }
        if option == 10 {
            self.contexts = offered.into_iter().map(|(id, _)| id).collect();
            self.contexts_of = name;
        }
        self.option_reply(option, REPLY_ACK, &[])
    }

    /// Answers one request; false when the client is done.
    fn request(&mut self, qemu: &Qemu, export: &Export) -> io::Result<bool> {
        if self.u32()? != REQUEST_MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let kind = self.u32()?;
        let (flags, kind) = ((kind >> 16) as u16, kind as u16);
        let (cookie, offset, len) = (self.u64()?, self.u64()?, self.u32()?);
        let inside = offset
            .checked_add(len.into())
            .is_some_and(|end| size_of(qemu, export).is_some_and(|(size, _)| end <= size));
        match kind {
            // DISC
            2 => return Ok(false),
            // WRITE, TRIM, WRITE_ZEROES
            1 | 4 | 6 => {
                if kind == 1 {
                    io::copy(&mut (&mut self.stream).take(len.into()), &mut io::sink())?;
                }
                self.fail(cookie, EPERM)?;
            }
            _ if !inside => self.fail(cookie, EINVAL)?,
            // READ
            0 if len > 0 && len <= LONGEST => self.read(qemu, export, cookie, offset, len)?,
            // FLUSH, CACHE
            3 | 5 => self.done(cookie)?,
            // BLOCK_STATUS
            7 if !self.contexts.is_empty() && len > 0 => {
                self.block_status(qemu, export, flags, cookie, offset, len)?;
            }
            _ => self.fail(cookie, EINVAL)?,
        }
        Ok(true)
    }

    fn simple(&mut self, cookie: u64, error: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(error.to_be_bytes());
        reply.extend(cookie.to_be_bytes());
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    fn chunk(&mut self, last: bool, kind: u16, cookie: u64, data: &[u8]) -> io::Result<()> {
        let mut chunk = CHUNK_MAGIC.to_be_bytes().to_vec();
        chunk.extend(u16::from(last).to_be_bytes());
        chunk.extend(kind.to_be_bytes());
        chunk.extend(cookie.to_be_bytes());
        chunk.extend((data.len() as u32).to_be_bytes());
        chunk.extend(data);
        self.stream.write_all(&chunk)
    }

    fn done(&mut self, cookie: u64) -> io::Result<()> {
        match self.structured {
            true => self.chunk(true, 0, cookie, &[]),
            false => self.simple(cookie, 0, &[]),
        }
    }

    fn fail(&mut self, cookie: u64, errno: u32) -> io::Result<()> {
        if !self.structured {
            return self.simple(cookie, errno, &[]);
        }
        let mut data = errno.to_be_bytes().to_vec();
        data.extend(0u16.to_be_bytes());
        self.chunk(true, 1 << 15 | 1, cookie, &data)
    }

    fn read(
        &mut self,
        qemu: &Qemu,
        export: &Export,
        cookie: u64,
        offset: u64,
        len: u32,
    ) -> io::Result<()> {
        let Some(file) = file_of(qemu, export) else { return self.fail(cookie, EIO) };
        if !self.structured {
            return match read_at(&file, offset, len as usize) {
                Ok(data) => self.simple(cookie, 0, &data),
                Err(_) => self.fail(cookie, EIO),
            };
        }
        let mut at = offset;
        let extents = allocation(&file, offset, len.into());
        for (i, (len, hole)) in extents.iter().enumerate() {
            let last = i + 1 == extents.len();
            let mut data = at.to_be_bytes().to_vec();
            if *hole {
                data.extend((*len as u32).to_be_bytes());
                self.chunk(last, 2, cookie, &data)?;
            } else {
                let Ok(bytes) = read_at(&file, at, *len as usize) else {
                    return self.fail(cookie, EIO);
                };
                data.extend(bytes);
                self.chunk(last, 1, cookie, &data)?;
            }
            at += len;
        }
        Ok(())
    }

    fn block_status(
        &mut self,
        qemu: &Qemu,
        export: &Export,
        flags: u16,
        cookie: u64,
        offset: u64,
        len: u32,
    ) -> io::Result<()> {
        /// Only one extent is wanted.
        const REQ_ONE: u16 = 1 << 3;
        let contexts = self.contexts.clone();
        for (i, id) in contexts.iter().enumerate() {
            let extents = match id {
                0 => file_of(qemu, export).map(|file| {
                    let both = |(len, hole)| (len, if hole { 3 } else { 0 });
                    allocation(&file, offset, len.into()).into_iter().map(both).collect()
                }),
                id => dirty(qemu, export, (id - 2) as usize, offset, len.into()),
            };
            let Some(mut extents): Option<Vec<(u64, u32)>> = extents else {
                return self.fail(cookie, EIO);
            };
            if flags & REQ_ONE != 0 {
                extents.truncate(1);
            }
            let mut data = id.to_be_bytes().to_vec();
            for (len, flags) in extents {
                data.extend((len as u32).to_be_bytes());
                data.extend(flags.to_be_bytes());
            }
            self.chunk(i + 1 == contexts.len(), 5, cookie, &data)?;
        }
        Ok(())
    }
}

/// Takes a length and as many bytes of text.
fn string(data: &mut &[u8]) -> Option<String> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = u32::from_be_bytes(*len) as usize;
    let text = rest.get(..len)?;
    *data = &rest[len..];
    Some(String::from_utf8_lossy(text).into_owned())
}

/// An export's size in bytes, and whether its image is read past the page cache.
fn size_of(qemu: &Qemu, export: &Export) -> Option<(u64, bool)> {
    let graph = lock(&qemu.graph);
    let size = graph.find(&export.node).ok()?.size;
    Some((size, graph.image(&export.node)?.direct))
}

fn file_of(qemu: &Qemu, export: &Export) -> Option<Arc<File>> {
    Some(lock(&qemu.graph).image(&export.node)?.file.clone())
}

/// A range in stretches: their lengths, and whether they are holes.
fn allocation(file: &File, offset: u64, len: u64) -> Vec<(u64, bool)> {
    let end = offset + len;
    let mut extents = Vec::new();
    let mut at = offset;
    while at < end {
        // No data behind: the rest is a hole. A file that cannot tell is all data.
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => at,
        };
        if data > at {
            extents.push((data - at, true));
        }
        if data < end {
            let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(end).clamp(data + 1, end);
            extents.push((hole - data, false));
            at = hole;
        } else {
            at = end;
        }
    }
    extents
}

fn dirty(
    qemu: &Qemu,
    export: &Export,
    index: usize,
    offset: u64,
    len: u64,
) -> Option<Vec<(u64, u32)>> {
    let (node, name) = export.bitmaps.get(index)?;
    let graph = lock(&qemu.graph);
    let bitmap = graph.find(node).ok()?.bitmaps.iter().find(|bitmap| bitmap.name == *name)?;
    let runs = bitmap.runs(offset..offset + len);
    Some(runs.iter().map(|run| (run.len, u32::from(run.dirty))).collect())
}
