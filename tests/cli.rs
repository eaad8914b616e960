//! The command as a user runs it: results, exit codes, and one line for every mistake.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn patrickstar(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_patrickstar")).args(args).output().expect("the binary runs")
}

/// A configuration that trains in about a second, on a device too small for the whole model.
fn tiny(directory: &Path, extra: &str) -> PathBuf {
    let text = directory.join("text.txt");
    std::fs::write(&text, "the quick brown fox jumps over the lazy dog. ".repeat(400)).unwrap();
    let path = directory.join("tiny.toml");
    let config = format!(
        "[model]\nhidden = 32\nlayers = 2\nheads = 2\ncontext = 32\n[memory]\ndevice = \"3MB\"\nchunk = \"32KiB\"\n\
         [train]\nsteps = 8\nbatch = 4\nmicro_batches = 2\nseq_len = 32\nlr = 3e-3\noutput = \"{}\"\nsample_tokens = 8\n\
         [data]\npath = \"{}\"\n[telemetry]\ntensorboard = true\ntrace_steps = 2\nreport = true\n{extra}",
        directory.join("run").display(),
        text.display()
    );
    std::fs::write(&path, config).unwrap();
    path
}

fn last_json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line)
        .unwrap_or_else(|error| panic!("{error}: `{line}`\n{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn training_leaves_what_it_promises() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    let output = patrickstar(&["train", config.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = last_json(&output);
    for key in ["steps", "loss_first", "loss_last", "params", "chunk_moves", "stall_ratio", "tokens_per_second"] {
        assert!(summary[key].is_number(), "{key}: {summary}");
    }
    assert_eq!(summary["steps"], 8);
    assert!(summary["chunk_moves"].as_u64() > Some(0), "nothing travelled: {summary}");
    assert!(summary["loss_last"].as_f64() < summary["loss_first"].as_f64());
    assert!(summary["device_peak_bytes"].as_u64() <= summary["device_budget_bytes"].as_u64(), "{summary}");
    let run = directory.path().join("run");
    let trace: Value = serde_json::from_slice(&std::fs::read(run.join("trace.json")).unwrap()).unwrap();
    nothing_overlaps_in_part(trace["traceEvents"].as_array().unwrap());
    assert!(std::fs::read_to_string(run.join("report.html")).unwrap().contains("\"snapshots\""));
    assert!(run.join("checkpoints/step-000008/manifest.json").is_file());
    let events = std::fs::read_dir(&run)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("events.out.tfevents"));
    assert_eq!(events.count(), 1);

    let text = patrickstar(&["generate", run.to_str().unwrap(), "--prompt", "the ", "--tokens", "12", "--json"]);
    assert!(text.status.success(), "{}", String::from_utf8_lossy(&text.stderr));
    assert!(last_json(&text)["text"].as_str().unwrap().starts_with("the "));
}

/// What viewers expect of the events of one line: they follow each other, or one is within the other.
fn nothing_overlaps_in_part(events: &[Value]) {
    let number = |event: &Value, key: &str| event[key].as_f64().unwrap();
    let mut spans: Vec<(u64, f64, f64)> = events
        .iter()
        .filter(|event| event["ph"] == "X")
        .map(|event| {
            let start = number(event, "ts");
            (event["tid"].as_u64().unwrap(), start, start + number(event, "dur"))
        })
        .collect();
    assert!(spans.len() > 20);
    spans.sort_by(|a, b| a.partial_cmp(b).unwrap());
    for pair in spans.windows(2) {
        let [(line, _, end), (next_line, next_start, next_end)] = [pair[0], pair[1]];
        assert!(line != next_line || next_start >= end || next_end <= end, "{pair:?}");
    }
    let lines: std::collections::BTreeSet<u64> = spans.iter().map(|span| span.0).collect();
    assert!(lines.len() >= 6, "compute, copies both ways, reduction, and both sides of the optimizer: {lines:?}");
}

#[test]
fn plan_says_whether_it_fits_by_its_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    let config = config.to_str().unwrap();
    let fits = patrickstar(&["plan", config, "--json"]);
    assert_eq!(fits.status.code(), Some(0));
    assert_eq!(last_json(&fits)["fits"], true);
    let known = patrickstar(&["plan", config, "--json", "--compute", "2", "--link", "3", "--host", "4"]);
    let plan = last_json(&known);
    let ratio = |part: &str, amount: f64| plan["bound"][part].as_f64().unwrap() / amount;
    let number = |key: &str| plan[key].as_f64().unwrap();
    let moved = number("host_to_device").max(number("device_to_host"));
    // Two layers of width 32 are computed again but for their last product, on 4 x 32 tokens.
    let again = 2.0 * 2.0 * 128.0 * 32.0 * (8.0 * 32.0 + 32.0);
    for (part, expected) in [
        ("compute_s", (number("flops") + again) / 2e12),
        ("link_s", moved / 3e9),
        ("host_s", number("optimizer_bytes") / 4e9),
    ] {
        assert!((ratio(part, expected) - 1.0).abs() < 1e-9, "{part}: {plan}");
    }
    let device = &plan["tiers"][0];
    let by_kind: u64 = device["peak_by_kind"].as_array().unwrap().iter().map(|kind| kind[1].as_u64().unwrap()).sum();
    assert!(by_kind > 0 && device["chunk_peak"] == by_kind, "{device}");
    assert_eq!(patrickstar(&["plan", config, "--link", "0"]).status.code(), Some(2), "a link has some speed");
    for change in ["memory.device=64KiB", "memory.host=64KiB"] {
        let output = patrickstar(&["plan", config, "--json", "--set", change]);
        assert_eq!(output.status.code(), Some(3), "{change}");
        assert!(last_json(&output)["problems"][0].as_str().unwrap().contains("set memory."), "{change}");
        assert_eq!(
            patrickstar(&["train", config, "--set", change]).status.code(),
            Some(3),
            "train checks too: {change}"
        );
    }
}

#[test]
fn activations_keep_their_buffers_where_a_gpu_has_room_for_the_whole_model() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    let plan = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let head = ["plan", config.to_str().unwrap(), "--json", "--compute", "1", "--link", "1", "--host", "1"];
        // Without a global norm, and deep enough that an access is a small part of the model.
        let head = [&head[..], &["--set", "train.clip_norm=0", "--set", "model.layers=16"]].concat();
        last_json(&patrickstar(&[&head[..], &sets].concat()))
    };
    let buffers = |plan: &Value| plan["buffers"].as_u64().unwrap();
    let number = |plan: &Value, key: &str| plan["tiers"][0][key].as_u64().unwrap();
    let roomy = plan(&["compute.device=cuda", "memory.device=1GiB"]);
    assert_eq!(buffers(&roomy), number(&roomy, "non_model"), "{roomy}");
    assert!(buffers(&roomy) > 0);
    assert_eq!(roomy["split"]["resident"].as_u64().unwrap() * 4, roomy["chunks"].as_u64().unwrap(), "the whole model");
    // Where the model has room and they have not, and with a number of bytes nobody asks whether they have.
    let chunks = roomy["chunks"].as_u64().unwrap() * roomy["chunk"].as_u64().unwrap();
    let full = format!("memory.device={}", chunks + buffers(&roomy) * 3 / 2);
    let [tight, without] =
        [&[][..], &["memory.buffers=0"]].map(|set| plan(&[&["compute.device=cuda", &full], set].concat()));
    assert!((1..=number(&tight, "non_model") / 10).contains(&buffers(&tight)), "{tight}");
    assert_eq!(number(&tight, "non_model"), number(&without, "non_model"), "they keep what was set aside anyway");
    assert_eq!(buffers(&plan(&["compute.device=cuda", &full, "memory.buffers=4096"])), 4096);
    assert_eq!(buffers(&plan(&["compute.device=cuda", "memory.device=1GiB", "memory.buffers=0"])), 0);
    assert_eq!(buffers(&plan(&["memory.device=1GiB"])), 0, "the host's allocator keeps what it likes");
}

#[test]
fn mistakes_are_one_line_that_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    let config = config.to_str().unwrap();
    let binary = directory.path().join("binary.txt");
    std::fs::write(&binary, b"abc\xff\xfe").unwrap();
    let empty = directory.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let line = directory.path().join("line.jsonl");
    std::fs::write(&line, "{\"txt\": 1}").unwrap();
    let huge = directory.path().join("huge.jsonl");
    std::fs::write(&huge, format!("{{\"text\": \"{}\"}}", "x".repeat(65 << 20))).unwrap();
    let hf = directory.path().join("hf");
    std::fs::create_dir(&hf).unwrap();
    std::fs::write(
        hf.join("config.json"),
        r#"{"model_type":"gpt2","vocab_size":256,"n_positions":32,"n_embd":32,"n_layer":1,"n_head":2}"#,
    )
    .unwrap();
    std::fs::write(hf.join("model.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let set = |key: &str, path: &Path| format!("{key}={}", path.display());
    let cases = [
        ("train.stepz=3".to_owned(), "train.steps"),
        ("train.steps=many".to_owned(), "train.steps"),
        ("model.heads=3".to_owned(), "heads"),
        ("memory.chunk=1000".to_owned(), "4096"),
        (set("data.path", &binary), "UTF-8"),
        (set("data.path", &empty), "no text"),
        (set("data.path", &line), "line 1"),
        (set("data.path", &huge), "split the document"),
        (set("data.path", Path::new("/nowhere/at/all")), "data.path"),
        (set("data.tokenizer", &binary), "tokenizer"),
        (set("model.path", &hf), "fetch it again"),
        (set("train.output", &file.join("below")), "file"),
        ("train.seq_len=10000".to_owned(), "seq_len"),
    ];
    for (change, expected) in cases {
        let output = patrickstar(&["train", config, "--set", &change]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(output.status.code(), Some(1), "{change}: {stderr}");
        assert!(errors.len() == 1 && errors[0].contains(expected), "{change}: {stderr}");
        assert!(!stderr.contains("panicked"), "{change}: {stderr}");
    }
}

/// No text needs line breaks: a line is not held in memory.
#[test]
fn a_text_of_one_huge_line_trains() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    std::fs::write(directory.path().join("text.txt"), "all in a line ".repeat(5 << 20)).unwrap();
    let output = patrickstar(&["train", config.to_str().unwrap(), "--set", "train.steps=2", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(last_json(&output)["steps"], 2);
}

/// Runs `train` in a shell that first ran `prepare`, and returns its exit code and its one error.
#[cfg(target_os = "linux")]
fn train_after(prepare: &str, config: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let script = format!("{prepare}; exec \"$@\"");
    let output = Command::new("bash")
        .args(["-c", &script, "bash", env!("CARGO_BIN_EXE_patrickstar"), "train"])
        .arg(config)
        .args(arguments)
        .output()
        .expect("bash runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && !stderr.contains("panicked"), "{stderr}");
    (output.status.code(), errors[0].to_owned())
}

/// A limit on the size of files stands for a disk that takes no more: every write past it fails.
#[test]
#[cfg(target_os = "linux")]
fn a_disk_that_takes_no_more_leaves_the_last_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    assert!(patrickstar(&["train", config.to_str().unwrap()]).status.success());
    let limit = "trap '' XFSZ; ulimit -f 16";
    let steps = ["--resume", "--set", "train.steps=12", "--set", "telemetry.tensorboard=false"];
    let (code, error) = train_after(limit, &config, &steps);
    assert_eq!(code, Some(1));
    assert!(error.contains("step-000012.tmp"), "{error}");
    let resumed = patrickstar(&["train", config.to_str().unwrap(), "--resume", "--set", "train.steps=10", "--json"]);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(last_json(&resumed)["steps"], 10, "step 8 is still there to go on from");
}

#[test]
#[cfg(target_os = "linux")]
fn a_directory_without_permission_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    // Refused to everybody, the superuser included.
    let (code, error) = train_after(":", &config, &["--set", "train.output=/sys/kernel/run"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("/sys/kernel/run") && error.contains("permi"), "{error}");
}

#[test]
fn an_interrupt_finishes_the_step_saves_and_exits_with_zero() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "");
    let child = Command::new(env!("CARGO_BIN_EXE_patrickstar"))
        .args([
            "train",
            config.to_str().unwrap(),
            "--json",
            "--set",
            "train.steps=1000000",
            "--set",
            "train.log_every=1",
        ])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(800));
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let summary = last_json(&output);
    assert_eq!(summary["interrupted"], true);
    let manifest = Path::new(summary["checkpoint"].as_str().unwrap()).join("manifest.json");
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    assert_eq!(manifest["meta"]["step"], summary["steps"]);
}

#[test]
fn the_library_and_the_runtime_keep_their_distance() {
    let actors = Path::new(env!("CARGO_MANIFEST_DIR")).join("actors");
    let manifest = std::fs::read_to_string(actors.join("Cargo.toml")).unwrap();
    for foreign in ["candle", "actix-web", "clap"] {
        assert!(!manifest.contains(foreign), "patrickstar-actors knows no {foreign}");
    }
    for pure in ["chunk", "schedule"] {
        for entry in std::fs::read_dir(actors.join("src").join(pure)).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            for impure in ["std::thread", "std::fs", "tokio", "actix", "flume", "Mutex"] {
                assert!(!text.contains(impure), "{} names {impure}", path.display());
            }
        }
    }
}

#[test]
fn a_run_that_fails_says_from_where_it_goes_on_and_does_with_the_same_bits() {
    let directory = tempfile::tempdir().unwrap();
    let config = tiny(directory.path(), "[checkpoint]\nevery = 2\n");
    let train = |extra: &[&str], drill: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_patrickstar"));
        command.args(["train", config.to_str().unwrap(), "--json"]).args(extra);
        drill.map(|drill| command.env("PATRICKSTAR_DRILL", drill));
        command.output().expect("the binary runs")
    };
    let broken = train(&[], Some("host@6"));
    assert_eq!(broken.status.code(), Some(1));
    let said = String::from_utf8_lossy(&broken.stderr);
    let line = said.lines().find(|line| line.contains("step 6")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("host tier") && line.contains("step-000004") && line.contains("--resume"), "{line}");
    let resumed = train(&["--resume"], None);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let whole = train(&["--set", &format!("train.output={}", directory.path().join("whole").display())], None);
    assert_eq!(last_json(&resumed)["loss_last"], last_json(&whole)["loss_last"]);
    assert_eq!(last_json(&resumed)["steps"], 8);
    // Nothing to go on from: it says so.
    let early = train(
        &["--set", "checkpoint.every=0", "--set", &format!("train.output={}", directory.path().join("none").display())],
        Some("host@2"),
    );
    assert!(String::from_utf8_lossy(&early.stderr).contains("there is no checkpoint yet"));
}
