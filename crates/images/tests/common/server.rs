//! A web server with faults.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What goes wrong with one answer, after so many bytes of its body.
#[derive(Clone)]
pub enum Fault {
    /// The connection ends.
    Cut(usize),
    /// Nothing comes any more.
    Stall(usize),
    /// The connection ends, and the object is another one from then on.
    Change(usize, Vec<u8>),
}

#[derive(Default)]
pub struct Site {
    pub body: Vec<u8>,
    pub version: u32,
    pub ranges: bool,
    /// Sends ranges of an object that has changed as well.
    pub careless: bool,
    pub redirect: Option<String>,
    pub faults: VecDeque<Fault>,
    /// The heads of the requests that came.
    pub requests: Vec<String>,
    /// How many bytes of bodies were sent.
    pub sent: usize,
}

/// Ends with its test.
pub struct Server {
    address: SocketAddr,
    site: Arc<Mutex<Site>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(site: Site) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let site = Arc::new(Mutex::new(site));
        let own = site.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // The client may go at any time.
                tokio::spawn(answer(stream, own.clone()));
            }
        });
        Self { address, site, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}/disk.img", self.address)
    }

    pub fn site(&self) -> MutexGuard<'_, Site> {
        self.site.lock().unwrap()
    }
}

async fn answer(mut stream: TcpStream, site: Arc<Mutex<Site>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let (status, body, fault) = {
        let mut site = site.lock().unwrap();
        let (status, body) = site.respond(&head);
        site.requests.push(head);
        (status, body, site.faults.pop_front())
    };
    stream.write_all(status.as_bytes()).await?;
    let end = match &fault {
        Some(Fault::Cut(end) | Fault::Stall(end) | Fault::Change(end, _)) => body.len().min(*end),
        None => body.len(),
    };
    stream.write_all(&body[..end]).await?;
    stream.flush().await?;
    site.lock().unwrap().sent += end;
    match fault {
        Some(Fault::Stall(_)) => std::future::pending().await,
        Some(Fault::Change(_, body)) => {
            let mut site = site.lock().unwrap();
            site.body = body;
            site.version += 1;
        }
        _ => {}
    }
    stream.shutdown().await
}

impl Site {
    fn respond(&self, head: &str) -> (String, Vec<u8>) {
        if let Some(to) = &self.redirect {
            let head = format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
            return (head, Vec::new());
        }
        let header = |name: &str| {
            head.lines()
                .filter_map(|line| line.split_once(": "))
                .find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.to_owned()))
        };
        let etag = format!("\"v{}\"", self.version);
        let start = header("range")
            .filter(|_| {
                self.ranges && (self.careless || header("if-range").as_ref() == Some(&etag))
            })
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let body = self.body[start.unwrap_or(0)..].to_vec();
        let range = start.map_or("200 OK\r\n".to_owned(), |start: usize| {
            let (last, total) = (self.body.len() - 1, self.body.len());
            format!("206 Partial Content\r\nContent-Range: bytes {start}-{last}/{total}\r\n")
        });
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {range}ETag: {etag}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        (head, body)
    }
}
