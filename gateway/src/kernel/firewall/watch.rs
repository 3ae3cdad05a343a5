//! Tells when a table of nftables is changed, by whomever.

use std::{io, time::Duration};

use rtnetlink::sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER,
};
use tokio::sync::mpsc;
use tracing::warn;

/// Multicast group of nf_tables' changes (`NFNLGRP_NFTABLES`, linux/netfilter/nfnetlink.h).
const GROUP: u32 = 7;
/// Changes come in crowds, and looking costs a run of nft; so long is waited for the rest.
const SETTLE: Duration = Duration::from_millis(200);
/// Pause before a broken socket is opened again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Sends an event when something in the table of this name changes, or may have. Ends with the receiver.
///
/// # Errors
///
/// The first socket cannot be made.
pub fn watch(table: &str) -> io::Result<mpsc::Receiver<()>> {
    let (sender, receiver) = mpsc::channel(1);
    // Every message but the generation's carries the name of its table, with a final zero.
    let name = [table.as_bytes(), &[0]].concat();
    let mut socket = open()?;
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = sender.closed() => return,
                event = next(&mut socket, &name) => event,
            };
            if let Err(error) = event {
                // ENOBUFS: messages were lost, so the table may have changed.
                if error.raw_os_error() != Some(libc::ENOBUFS) {
                    warn!(%error, "cannot hear of changes of nftables; trying again");
                    tokio::time::sleep(REOPEN_PAUSE).await;
                    match open() {
                        Ok(opened) => socket = opened,
                        Err(error) => warn!(%error, "cannot open a netlink socket for nftables"),
                    }
                }
            }
            tokio::time::sleep(SETTLE).await;
            // A full channel has an event that nobody has seen yet.
            if let Err(mpsc::error::TrySendError::Closed(())) = sender.try_send(()) {
                return;
            }
        }
    });
    Ok(receiver)
}

fn open() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    socket.socket_mut().add_membership(GROUP)?;
    Ok(socket)
}

/// Waits for a message that names the table.
async fn next(socket: &mut TokioSocket, name: &[u8]) -> io::Result<()> {
    loop {
        let (message, _) = socket.recv_from_full().await?;
        if message.windows(name.len()).any(|window| window == name) {
            return Ok(());
        }
    }
}
