//! Requests that nobody should send: whatever comes, the service refuses or answers, and neither fails nor writes elsewhere.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Service;
use crate::routes::{Route, routes};

/// Requests in all.
const REQUESTS: u64 = 20_000;
/// Threads that send them.
const SENDERS: u64 = 4;
/// Another seed sends other requests: set `PATRICKSTAR_FUZZ_SEED`.
const SEED: u64 = 20_261_125;
/// Server errors that are documented: ending, or full.
const DOCUMENTED: [u16; 2] = [503, 507];
/// Texts that have broken programs before.
const NASTY: [&str; 22] = [
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/store.sqlite",
    "..\\..\\windows",
    "%00",
    "a%00b",
    "%",
    "%zz",
    "%ff%fe",
    "%c0%ae%c0%ae/",
    "//etc/passwd",
    "/etc/passwd",
    "file-../../../etc/passwd",
    "ftjob-",
    "'; DROP TABLE jobs; --",
    "\u{202e}\u{0}\u{feff}",
    "{{7*7}}",
    "-1",
    "99999999999999999999999999",
    "NaN",
    "",
    "${jndi:ldap://x}",
];

/// Numbers that a seed decides (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = self.below(of.len());
        &of[index]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.next() as u8).collect()
    }
}

/// Tokens of a text that is really written: there are many.
const FEW_TOKENS: u64 = 40;

/// What the service has that requests may name.
struct Target {
    routes: Vec<Route>,
    /// A job, a file, a trained model, a checkpoint, and nonsense.
    names: Vec<String>,
    file: String,
    /// Every setting of a job.
    settings: Vec<String>,
}

/// A request as it goes over the wire, and what it must not be answered.
struct Request {
    bytes: Vec<u8>,
    /// It came from a page of another origin, or under another name.
    foreign: bool,
    /// Nothing else will be said: a service that expects more must not wait for it.
    over: bool,
    /// What is told when something is wrong with the answer.
    line: String,
}

fn request(dice: &mut Dice, target: &Target, address: &str) -> Request {
    if dice.one_in(20) {
        return Request { bytes: dice.bytes(600), foreign: false, over: true, line: "noise".into() };
    }
    let route = dice.pick(&target.routes);
    let mut method = route.method.clone();
    if dice.one_in(10) {
        method =
            (*dice.pick(&["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO", "get", "HEAD"])).to_owned();
    }
    let path = path(dice, target, &route.path);
    let (mut kind, body) = body(dice, target, &route.path);
    if dice.one_in(15) {
        kind = dice
            .pick(&["text/html", "application/json; charset=utf-7", "multipart/form-data", "a/b;;;", "\t"])
            .to_string();
    }
    let line = format!("{method} {path}");
    let (headers, foreign) = headers(dice, address, body.len());
    // One that wants a text must stay to get it.
    let honest = headers.contains(&format!("Content-Length: {}\r\n", body.len())) && !headers.contains("chunked");
    let over = !(honest && path.contains("completions"));
    let mut bytes = format!("{line} HTTP/1.1\r\n{headers}Content-Type: {kind}\r\n\r\n").into_bytes();
    bytes.extend(&body);
    if dice.one_in(40) {
        let at = dice.below(bytes.len());
        bytes[at] = dice.next() as u8;
        return Request { bytes, foreign: false, over: true, line };
    }
    Request { bytes, foreign, over, line }
}

fn path(dice: &mut Dice, target: &Target, known: &str) -> String {
    let mut path = known.to_owned();
    if dice.one_in(2) {
        for placeholder in ["ftjob-000000000000000000000000", "file-000000000000000000000000"] {
            let name: &String = dice.pick(&target.names);
            path = path.replace(placeholder, name);
        }
    }
    if dice.one_in(4) {
        let parts: Vec<&str> = path.split('/').collect();
        let at = dice.below(parts.len());
        let mut parts: Vec<String> = parts.into_iter().map(str::to_owned).collect();
        parts[at] = (*dice.pick(&NASTY)).to_owned();
        path = parts.join("/");
    }
    if dice.one_in(50) {
        path += &"a/".repeat(dice.below(20_000));
    }
    if dice.one_in(3) {
        let name =
            *dice.pick(&["limit", "after", "order", "purpose", "metadata[a]", "metadata", "metadata%5B", "&&=", "x"]);
        path += &format!("?{name}={}", dice.pick(&NASTY));
    }
    // A line ends at the first of these, and what follows would be headers.
    path.replace(['\r', '\n', ' '], "%20")
}

fn headers(dice: &mut Dice, address: &str, length: usize) -> (String, bool) {
    let mut headers = String::new();
    let mut foreign = false;
    match dice.below(12) {
        0 => foreign = true,
        1 => headers += &format!("Host: {address}\r\nHost: evil.example\r\n"),
        2 => {}
        _ => headers += &format!("Host: {address}\r\n"),
    }
    if foreign {
        let host = *dice.pick(&["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "a b", "[::1", ""]);
        headers += &format!("Host: {host}\r\n");
    }
    if dice.one_in(10) {
        let origin =
            *dice.pick(&["http://evil.example", "null", "file://", "http://127.0.0.1.evil.example", "http://[", ""]);
        headers += &format!("Origin: {origin}\r\n");
        foreign = true;
    }
    if dice.one_in(20) {
        headers += "Sec-Fetch-Site: cross-site\r\n";
        foreign = true;
    }
    if dice.one_in(10) {
        headers += &format!("Last-Event-ID: {}\r\n", dice.pick(&NASTY).replace(['\u{0}', '\u{202e}', '\u{feff}'], ""));
    }
    if dice.one_in(30) {
        headers += &(0..dice.below(200)).map(|index| format!("X-{index}: {}\r\n", "y".repeat(50))).collect::<String>();
    }
    if dice.one_in(10) {
        let authorization = *dice.pick(&["Bearer", "Bearer ", "Basic eDp5", "Bearer \u{fc}", "Bearer a b c"]);
        headers += &format!("Authorization: {authorization}\r\n");
    }
    let length = match dice.below(25) {
        0 => format!("Content-Length: {}\r\n", length + 1 + dice.below(1000)),
        1 => format!("Content-Length: {}\r\n", length / 2),
        2 => (*dice.pick(&["Content-Length: -1\r\n", "Content-Length: 9999999999999\r\n", "Content-Length: x\r\n"]))
            .to_owned(),
        3 => "Transfer-Encoding: chunked\r\n".to_owned(),
        4 => format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
        _ => format!("Content-Length: {length}\r\n"),
    };
    (headers + &length + "Connection: close\r\n", foreign)
}

fn body(dice: &mut Dice, target: &Target, path: &str) -> (String, Vec<u8>) {
    if path == "/v1/files" && !dice.one_in(4) {
        return form(dice);
    }
    let mut value = template(dice, target, path);
    for _ in 0..dice.below(4) {
        mutate(dice, &mut value);
    }
    let tokens = value.get_mut("max_tokens").filter(|tokens| tokens.as_u64().is_some_and(|count| count <= 4096));
    tokens.into_iter().for_each(|tokens| *tokens = json!(FEW_TOKENS.min(tokens.as_u64().unwrap_or(0))));
    let mut body = value.to_string().into_bytes();
    match dice.below(20) {
        0 => body.truncate(dice.below(body.len() + 1)),
        1 => body = dice.bytes(3000),
        2 => body = vec![b'['; dice.below(200_000)],
        3 => {
            body = format!("{{\"model\": \"gpt-tiny\", \"patrickstar\": {}1{}", "{\"a\":".repeat(500), "}".repeat(500))
                .into_bytes()
        }
        4 if dice.one_in(8) => body = vec![b' '; (1 << 20) + dice.below(1 << 20)],
        _ => {}
    }
    ("application/json".into(), body)
}

/// A body that the route would accept, or nearly.
fn template(dice: &mut Dice, target: &Target, path: &str) -> Value {
    let mut settings = json!({ "train": { "steps": 2, "lr": 0.001 }, "memory.device": "32MB", "priority": 0 });
    for _ in 0..dice.below(3) {
        let key: &String = dice.pick(&target.settings);
        settings[key.as_str()] = extreme(dice);
    }
    if path.ends_with("completions") {
        let messages = json!([{ "role": "user", "content": "hi" }]);
        return json!({
            "model": dice.pick(&target.names), "prompt": "a", "messages": messages, "max_tokens": 3, "n": 1, "stop": ["x"],
            "seed": 1, "temperature": 1.0, "top_p": 0.5, "stream": true, "stream_options": { "include_usage": true },
        });
    }
    json!({
        "model": "gpt-tiny", "training_file": target.file, "seed": 1, "suffix": "s", "metadata": { "a": "b" },
        "method": { "type": "supervised", "supervised": { "hyperparameters": { "batch_size": 2 } } },
        "hyperparameters": { "n_epochs": "auto" }, "patrickstar": settings, "set": { "eviction.policy": "lru" },
    })
}

/// Replaces something somewhere in it.
fn mutate(dice: &mut Dice, value: &mut Value) {
    match value {
        Value::Object(object) if !object.is_empty() && !dice.one_in(8) => {
            let keys: Vec<String> = object.keys().cloned().collect();
            let key = dice.pick(&keys);
            match dice.below(6) {
                0 => drop(object.remove(key)),
                1 => drop(object.insert((*dice.pick(&NASTY)).to_owned(), extreme(dice))),
                _ => object.values_mut().nth(dice.below(keys.len())).into_iter().for_each(|inner| mutate(dice, inner)),
            }
        }
        Value::Array(items) if !items.is_empty() && !dice.one_in(4) => {
            let at = dice.below(items.len());
            mutate(dice, &mut items[at]);
        }
        other => *other = extreme(dice),
    }
}

fn extreme(dice: &mut Dice) -> Value {
    match dice.below(12) {
        0 => Value::Null,
        1 => json!(u64::MAX),
        2 => json!(i64::MIN),
        3 => json!(1e308),
        4 => json!(-0.0),
        5 => json!([]),
        6 => json!({}),
        7 => json!("x".repeat(dice.below(5000))),
        8 => json!(1u64 << dice.below(64)),
        9 => json!(true),
        10 => json!([dice.next(), *dice.pick(&NASTY), { "a": [null] }]),
        _ => json!(*dice.pick(&NASTY)),
    }
}

/// A form, more or less.
fn form(dice: &mut Dice) -> (String, Vec<u8>) {
    let edge = *dice.pick(&["edge", "e", "", "\"", "a b"]);
    let mut body = Vec::new();
    for _ in 0..dice.below(20) {
        let name = *dice.pick(&["purpose", "file", "expires_after[seconds]", "", "file\"; x=\"", "\u{0}"]);
        let file = if dice.one_in(2) { format!("; filename=\"{}\"", dice.pick(&NASTY)) } else { String::new() };
        body.extend(format!("--{edge}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n").into_bytes());
        match dice.below(3) {
            0 => body.extend(b"fine-tune"),
            1 => body.extend(b"{\"text\": \"a\"}\n"),
            _ => body.extend(dice.bytes(5000)),
        }
        body.extend(b"\r\n");
    }
    if !dice.one_in(5) {
        body.extend(format!("--{edge}--\r\n").into_bytes());
    }
    (format!("multipart/form-data; boundary={edge}"), body)
}

/// Sends a request and returns status and body of the answer; none if the connection was closed without one.
fn send(address: &str, request: &Request) -> Option<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // A service that refuses early need not read it all.
    let _ = stream.write_all(&request.bytes);
    if request.over {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut whole = Vec::new();
    if let Err(error) = stream.read_to_end(&mut whole) {
        let waited = matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
        assert!(!waited, "no end of the answer to {}", request.line);
    }
    let end = whole.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let status = std::str::from_utf8(whole.get(9..12)?).ok()?.parse().ok()?;
    Some((status, whole[end + 4..].to_vec()))
}

fn attack(service: &Service, target: &Target, dice: &mut Dice, requests: u64) -> [u64; 6] {
    let mut by_class = [0; 6];
    for _ in 0..requests {
        let request = request(dice, target, &service.address);
        let Some((status, body)) = send(&service.address, &request) else {
            by_class[0] += 1;
            continue;
        };
        let text = String::from_utf8_lossy(&body);
        assert!(status < 500 || DOCUMENTED.contains(&status), "{} gave {status}: {text}", request.line);
        assert!(
            !request.foreign || !(200..300).contains(&status),
            "{} from elsewhere gave {status}: {text}",
            request.line
        );
        by_class[usize::from(status / 100)] += 1;
        // A job that was accepted must not keep the cores busy.
        let created: Option<Value> = serde_json::from_slice(&body).ok();
        if let Some(job) = created.filter(|job| status == 200 && job["object"] == "fine_tuning.job") {
            service.order(job["id"].as_str().unwrap(), "cancel");
        }
    }
    by_class
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}

#[test]
fn ten_thousand_hostile_requests_break_nothing() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("a/b/c/data");
    std::fs::create_dir_all(&data).unwrap();
    let service = Service::start_with(&data, &["--max-upload", "20KB", "--max-waiting", "20"], None);
    let file = service.training_file();
    let job = service.job(&file, &json!({ "train.steps": 2 }));
    let shown = service.until_status(&job, "succeeded");
    let checkpoint = service.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).ok()["data"][0]["id"].clone();
    let known = [&job, &file, shown["fine_tuned_model"].as_str().unwrap(), checkpoint.as_str().unwrap()];
    let names = known.into_iter().map(str::to_owned).chain(NASTY.map(str::to_owned)).collect();
    let settings = patrickstar::Config::keys().into_iter().map(|info| info.key).collect();
    let target = Target { routes: routes(), names, file: file.clone(), settings };
    let seed = std::env::var("PATRICKSTAR_FUZZ_SEED").map_or(SEED, |text| text.parse().unwrap());
    println!("seed {seed}");
    let began = Instant::now();
    let answers = std::thread::scope(|scope| {
        let (service, target) = (&service, &target);
        let sender =
            |index| scope.spawn(move || attack(service, target, &mut Dice(seed ^ index << 32), REQUESTS / SENDERS));
        let senders: Vec<_> = (0..SENDERS).map(sender).collect();
        senders.into_iter().map(|sender| sender.join().unwrap()).fold([0; 6], |mut sum, part| {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            sum
        })
    });
    let [closed, _, good, _, refused, failed] = answers;
    println!("{good} granted, {refused} refused, {closed} closed, {failed} full, {:?}", began.elapsed());
    assert!(good > 500 && refused > 5000, "the requests are too much alike: {answers:?}");

    // It lives, remembers everything, and has complained of nothing that it should not.
    assert_eq!(service.get("/livez").status, 200);
    assert_eq!(service.show(&job)["status"], "succeeded");
    let mut found = Vec::new();
    files(place.path(), &mut found);
    for path in found {
        assert!(path.starts_with(&data), "{} was written", path.display());
        let is_log = path.extension().is_some_and(|kind| kind == "log");
        let log = if is_log { std::fs::read_to_string(&path).unwrap() } else { String::new() };
        assert!(!log.contains("panicked"), "{}: {log}", path.display());
    }
    for entry in std::fs::read_dir(data.join("files")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        assert!(name.starts_with("file-") && name.ends_with(".jsonl") && name.len() == 35, "{name}");
    }
    let log = service.log();
    assert!(!log.contains("panicked"), "{log}");
}
