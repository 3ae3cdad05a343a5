//! Bodies that can be told from any other, byte by byte, and a server that sends them.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use gateway_tests::lab::Host;
use nix::sys::socket;

const PATIENCE: Duration = Duration::from_secs(20);

/// A body that its seed and the server's name determine.
pub(crate) fn body(server: &str, seed: u64, length: usize) -> Vec<u8> {
    let name = server.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut state = name ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Serves `GET /<seed>/<length>` over HTTP/1.1, one request after the other on a connection.
pub(crate) struct BodyServer {
    listener: TcpListener,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BodyServer {
    pub(crate) fn start(host: &Host, port: u16) -> Self {
        let listener = host.listen(Ipv4Addr::UNSPECIFIED, port).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let (accepting, ended) = (listener.try_clone().unwrap(), Arc::clone(&over));
        let name = host.name().to_owned();
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok((stream, _)) = accepting.accept() {
                    let name = name.clone();
                    // A client that goes away is its own affair: it checks what it got.
                    thread::spawn(move || drop(serve(&stream, &name)));
                }
            }
        });
        Self { listener, over, thread: Some(thread) }
    }
}

impl Drop for BodyServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: &TcpStream, name: &str) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let path = line.split(' ').nth(1).context("no path")?.to_owned();
        while line.trim() != "" {
            line.clear();
            reader.read_line(&mut line)?;
        }
        line.clear();
        let mut parts = path.split('/').skip(1).map(str::parse::<u64>);
        let (seed, length) = (parts.next().context("no seed")??, parts.next().context("no length")??);
        let body = body(name, seed, usize::try_from(length)?);
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")?;
        stream.write_all(&body)?;
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// Fetches a body of `server` over a connection that stays open, and compares every byte.
pub(crate) fn fetch(mut stream: &TcpStream, server: &str, seed: u64, length: usize) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET /{seed}/{length} HTTP/1.1\r\nHost: {server}\r\n\r\n")?;
    receive(stream, server, seed, length)
}

/// The answer to a request that was sent.
pub(crate) fn receive(stream: &TcpStream, server: &str, seed: u64, length: usize) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line == "HTTP/1.1 200 OK\r\n", "answered {line:?}");
    while line.trim() != "" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let mut found = vec![0; length];
    reader.read_exact(&mut found).context("the body ends early")?;
    ensure!(found == body(server, seed, length), "{server} sent another body for {seed}");
    Ok(())
}
