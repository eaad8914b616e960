//! Programs that run beside a test, and the little HTTP that it speaks with them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A program that ends with the test.
pub struct Server(Child);

impl Server {
    /// Starts it with its messages in the test's.
    pub fn start(command: &mut Command) -> Self {
        Server(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program starts"))
    }

    /// Fails when the program has ended.
    pub fn assert_running(&mut self, what: &str) {
        assert!(self.0.try_wait().unwrap().is_none(), "{what} has ended: its messages are above");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that nobody listens at now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The body of a GET; `None` while nobody listens.
pub fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // In this version a server closes when it has answered, and sends no chunks.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// A text as part of a query.
pub fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
