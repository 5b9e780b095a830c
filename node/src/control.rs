//! The thread on which a node talks to its peers about who lives and who leads.
//!
//! With all cores taken, thousands of tasks stand in line for the node's other threads, and whatever joins the line waits for
//! hundreds of milliseconds at each of the five or six tasks through which a ping and its answer go: a node with much to do would be taken for dead,
//! and the elections that this brings on would give everybody more to do. The system's scheduler lets a thread that does
//! little run at once, so the control connections have one: their sockets, TLS, HTTP/2 and Raft pipes, at both ends.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime with one thread. It ends, without waiting for what runs on it, when this is dropped.
pub(crate) struct ControlThread(Option<Runtime>);

impl ControlThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("ensign-control").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    pub(crate) fn runtime(&self) -> Handle {
        self.0.as_ref().expect("it is taken only when this is dropped").handle().clone()
    }
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Waiting is not allowed where a node is dropped, which is on the other runtime.
            runtime.shutdown_background();
        }
    }
}
