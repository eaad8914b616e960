//! A service of its own for each test, and the few HTTP requests that tests need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for anything: tests share two cores.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Names another program than the one that was built for the test: one that was built for speed, say.
const PROGRAM_VARIABLE: &str = "PATRICKSTAR_PROGRAM";

/// A running service; killed when the test ends, however it ends.
pub struct Service {
    child: Child,
    pub address: String,
    pub data: PathBuf,
    /// Sent with every request.
    pub token: Option<String>,
    arguments: Vec<String>,
    /// What it says after it listens.
    log: Log,
}

/// Lines, as they come.
type Log = Arc<Mutex<String>>;

/// An answer.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The body of a success.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The message of an error, which must have OpenAI's shape.
    pub fn error(self, status: u16) -> String {
        let text = String::from_utf8_lossy(&self.body).into_owned();
        assert_eq!(self.status, status, "{text}");
        let error = &self.json()["error"];
        for key in ["message", "type", "param", "code"] {
            assert!(error.get(key).is_some(), "no {key} in {text}");
        }
        error["message"].as_str().unwrap().to_owned()
    }
}

impl Service {
    pub fn start(data: &Path) -> Self {
        Self::start_with(data, &[], None)
    }

    pub fn start_with(data: &Path, arguments: &[&str], token: Option<&str>) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        let log = Log::default();
        let (child, address) = spawn(data, "127.0.0.1:0", &arguments, token, &log);
        Service { child, address, data: data.to_owned(), token: token.map(str::to_owned), arguments, log }
    }

    /// As `kill -9` would, at once.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// At the address that it had: clients that wait for it find it there.
    pub fn restart(&mut self) {
        let (child, address) = spawn(&self.data, &self.address, &self.arguments, self.token.as_deref(), &self.log);
        (self.child, self.address) = (child, address);
    }

    /// What it has said.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn terminate(&self) {
        self.signal("TERM");
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        until("the service's end", || self.child.try_wait().unwrap())
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.try_request(method, path, headers, body).unwrap()
    }

    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<Answer> {
        let mut stream = self.send(method, path, headers, body)?;
        let mut whole = Vec::new();
        // A service that refuses a large body closes before it has read it all; its answer comes first.
        let _ = stream.read_to_end(&mut whole);
        let end = whole.windows(4).position(|bytes| bytes == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let head = String::from_utf8_lossy(&whole[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = whole[end + 4..].to_vec();
        let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        Ok(Answer { status, head, body: if chunked { unchunk(&body) } else { body } })
    }

    /// Sends a request and leaves its answer to be read.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head += &format!("Host: {}\r\n", self.address);
        }
        if let Some(token) = &self.token {
            head += &format!("Authorization: Bearer {token}\r\n");
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        // In one piece: a second small one would wait until the first is acknowledged. What a service that refuses early has
        // not read is no error here.
        let _ = stream.write_all(&[head.as_bytes(), b"\r\n", body].concat());
        Ok(stream)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    pub fn upload(&self, name: &str, purpose: &str, content: &[u8]) -> Answer {
        let mut body = Vec::new();
        let part = |name: &str| format!("--edge\r\nContent-Disposition: form-data; name=\"{name}\"");
        body.extend(format!("{}\r\n\r\n{purpose}\r\n", part("purpose")).into_bytes());
        body.extend(format!("{}; filename=\"{name}\"\r\n\r\n", part("file")).into_bytes());
        body.extend(content);
        body.extend(b"\r\n--edge--\r\n");
        self.request("POST", "/v1/files", &[("Content-Type", "multipart/form-data; boundary=edge")], &body)
    }

    /// Uploads text to train on, and returns the file's id.
    pub fn training_file(&self) -> String {
        let line = json!({ "messages": [
            { "role": "user", "content": "which way does the river run?" },
            { "role": "assistant", "content": "down to the sea, as all of them do" },
        ] });
        let content = format!("{line}\n").repeat(40);
        let file = self.upload("talk.jsonl", "fine-tune", content.as_bytes()).ok();
        file["id"].as_str().unwrap().to_owned()
    }

    /// Creates a job of the tiny model and returns its id.
    pub fn job(&self, file: &str, settings: &Value) -> String {
        let body = json!({ "model": "gpt-tiny", "training_file": file, "seed": 5, "patrickstar": settings });
        let job = self.post("/v1/fine_tuning/jobs", &body).ok();
        job["id"].as_str().unwrap().to_owned()
    }

    pub fn show(&self, job: &str) -> Value {
        self.get(&format!("/v1/fine_tuning/jobs/{job}")).ok()
    }

    pub fn order(&self, job: &str, order: &str) -> Answer {
        self.post(&format!("/v1/fine_tuning/jobs/{job}/{order}"), &json!({}))
    }

    /// Waits for a status; a job that fails instead tells why.
    pub fn until_status(&self, job: &str, status: &str) -> Value {
        until(&format!("{job} to be {status}"), || {
            let shown = self.show(job);
            assert!(status == "failed" || shown["status"] != "failed", "{}", shown["error"]);
            (shown["status"] == status).then_some(shown)
        })
    }

    /// Waits until the job has done so many steps.
    pub fn until_step(&self, job: &str, step: u64) {
        until(&format!("step {step}"), || {
            let shown = self.show(job);
            assert!(shown["status"] != "failed", "{}", shown["error"]);
            (shown["patrickstar"]["step"].as_u64() >= Some(step)).then_some(())
        });
    }

    /// All events, oldest first.
    pub fn events(&self, job: &str) -> Vec<Value> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let page = self.get(&format!("/v1/fine_tuning/jobs/{job}/events?limit=100{after}")).ok();
            all.extend(page["data"].as_array().unwrap().iter().cloned());
            after = format!("&after={}", page["last_id"].as_str().unwrap_or_default());
            if page["has_more"] == false {
                all.reverse();
                return all;
            }
        }
    }

    /// The loss of every step, by its bits.
    pub fn losses(&self, job: &str) -> Vec<(u64, u64)> {
        let metrics = self.events(job).into_iter().filter(|event| event["type"] == "metrics");
        metrics
            .map(|event| {
                let data = &event["data"];
                (data["step"].as_u64().unwrap(), data["train_loss"].as_f64().unwrap().to_bits())
            })
            .collect()
    }

    /// Processes that this service has started.
    pub fn workers(&self) -> Vec<u32> {
        let parent = format!("PPid:\t{}", self.pid());
        let is_child = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line == parent) && !status.contains("State:\tZ")
        };
        let names = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.to_str()?.parse().ok()).filter(is_child).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(data: &Path, listen: &str, arguments: &[String], token: Option<&str>, log: &Log) -> (Child, String) {
    let program = std::env::var_os(PROGRAM_VARIABLE).unwrap_or_else(|| env!("CARGO_BIN_EXE_patrickstar").into());
    let mut command = Command::new(program);
    command.args(["serve", "--listen", listen, "--data"]).arg(data).args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(token) = token {
        command.env("PATRICKSTAR_TOKEN", token);
    }
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = Vec::new();
    let address = loop {
        let line = lines.next().unwrap_or_else(|| panic!("the service ended: {seen:?}")).unwrap();
        if let Some(address) = line.strip_prefix("listening on http://") {
            break address.to_owned();
        }
        seen.push(line);
    };
    // What it says later is shown by the test runner, and must be read lest the service waits.
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            println!("service: {line}");
            *log.lock().unwrap() += &format!("{line}\n");
        }
    });
    (child, address)
}

/// Asks again and again until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// False if the process has just ended by itself.
pub fn kill(pid: u32) -> bool {
    Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status().unwrap().success()
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|bytes| bytes == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap().trim(), 16).unwrap();
        let rest = &body[end + 2..];
        if size == 0 || rest.len() < size + 2 {
            break;
        }
        whole.extend(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}
