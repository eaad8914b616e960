//! What the service refuses, and that it does so in the shape that clients read.

use std::process::Command;

use serde_json::json;

use crate::client::Service;
use crate::routes::routes;

const TOKEN: &str = "test-token-of-every-scope";

#[test]
fn a_token_is_kept_nowhere() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start_with(data.path(), &[], Some(TOKEN));
    service.training_file();
    for entry in std::fs::read_dir(data.path()).unwrap() {
        let path = entry.unwrap().path();
        let holds = |needle: &str| {
            std::fs::read(&path).is_ok_and(|bytes| bytes.windows(needle.len()).any(|part| part == needle.as_bytes()))
        };
        assert!(!holds(TOKEN), "{} holds a token", path.display());
    }
    // What does not exist is told so only to those who may look.
    service.get("/v1/none").error(404);
    service.token = None;
    service.get("/v1/none").error(401);
}

#[test]
fn pages_of_other_origins_are_refused_whatever_the_method() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start_with(data.path(), &["--allowed-host", "trainer.lan"], None);
    let documented: Vec<(String, String)> = routes().into_iter().map(|route| (route.method, route.path)).collect();
    for (method, path) in documented.into_iter().chain([("OPTIONS".to_owned(), "/v1/files".to_owned())]) {
        for header in [
            ("Origin", "http://evil.example"),
            ("Origin", "null"),
            ("Host", "evil.example"),
            ("Host", "127.0.0.1.evil.example:8080"),
            ("Sec-Fetch-Site", "cross-site"),
        ] {
            let answer = service.request(&method, &path, &[header, ("Content-Type", "application/json")], b"{}");
            answer.error(403);
        }
    }
    let same = format!("http://{}", service.address);
    assert_eq!(service.request("GET", "/v1/models", &[("Origin", &same)], b"").status, 200);
    for host in ["localhost:1", "trainer.lan", "[::1]:80", "127.0.0.1"] {
        assert_eq!(service.request("GET", "/v1/models", &[("Host", host)], b"").status, 200, "{host}");
    }
}

#[test]
fn others_are_served_only_with_a_token() {
    let data = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_patrickstar"))
        .args(["serve", "--listen", "0.0.0.0:0", "--data"])
        .arg(data.path())
        .env_remove("PATRICKSTAR_TOKEN")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("--token-file"), "{message}");
}

#[test]
fn two_services_do_not_share_a_directory() {
    let data = tempfile::tempdir().unwrap();
    let _first = Service::start(data.path());
    let second = Command::new(env!("CARGO_BIN_EXE_patrickstar"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(data.path())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&second.stderr).contains("another service uses"));
}

#[test]
fn bad_requests_are_told_what_is_wrong() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start_with(data.path(), &["--max-upload", "100KB", "--max-waiting", "1"], None);
    let json_type = ("Content-Type", "application/json");
    let jobs = "/v1/fine_tuning/jobs";
    service.request("POST", jobs, &[json_type], b"{").error(400);
    service.request("POST", jobs, &[json_type], &[b'['; 100_000]).error(400);
    service.request("POST", jobs, &[("Content-Type", "text/plain")], b"{}").error(400);
    service.request("POST", jobs, &[json_type], &vec![b' '; 2 << 20]).error(413);
    assert!(service.post(jobs, &json!({ "model": "gpt-tiny" })).error(400).contains("training_file"));
    let absent = json!({ "model": "gpt-tiny", "training_file": "file-000000000000000000000000" });
    assert!(service.post(jobs, &absent).error(400).contains("upload it"));
    for path in ["/v1/files/..%2f..%2fstore.sqlite/content", "/v1/files/../../etc/passwd", "/v1/fine_tuning/jobs/x"] {
        service.get(path).error(404);
    }
    service.upload("a.jsonl", "assistants", b"{}").error(400);
    service.upload("a.jsonl", "fine-tune", b"").error(400);
    service.upload("a.jsonl", "fine-tune", &[b'a'; 200_000]).error(413);
    service.request("POST", "/v1/files", &[("Content-Type", "multipart/form-data")], b"x").error(400);
    service
        .request("POST", "/v1/files", &[("Content-Type", "multipart/form-data; boundary=b")], b"--b\r\nxx")
        .error(400);
    service.request("POST", "/v1/files", &[json_type], b"{}").error(400);
    let before = std::fs::read_dir(data.path().join("files")).unwrap().count();
    assert_eq!(before, 0, "refused uploads leave nothing behind");

    let file = service.upload("../../../evil.jsonl", "fine-tune", b"{\"text\": \"a\"}\n").ok();
    assert!(!data.path().join("../../../evil.jsonl").exists());
    let stored: Vec<_> = std::fs::read_dir(data.path().join("files")).unwrap().flatten().collect();
    assert_eq!(stored[0].file_name().to_str().unwrap(), format!("{}.jsonl", file["id"].as_str().unwrap()));
    assert_eq!(
        service.get(&format!("/v1/files/{}/content", file["id"].as_str().unwrap())).body,
        b"{\"text\": \"a\"}\n"
    );

    let file = service.training_file();
    let running = service.job(&file, &json!({ "train.steps": 1_000_000 }));
    service.until_status(&running, "running");
    service.job(&file, &json!({}));
    let full = service.post(jobs, &json!({ "model": "gpt-tiny", "training_file": file }));
    assert!(full.head.to_lowercase().contains("retry-after: "), "{}", full.head);
    full.error(429);
}
