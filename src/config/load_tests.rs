use super::*;

fn sources(file: Option<PathBuf>, env: &[(&str, &str)], set: &[&str]) -> Sources {
    let env = env.iter().map(|(var, value)| (var.to_string(), value.to_string())).collect();
    Sources { base: None, file, env, set: set.iter().map(|pair| pair.to_string()).collect() }
}

fn message(env: &[(&str, &str)], set: &[&str]) -> String {
    let text = sources(None, env, set).load().unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn later_layers_win_and_every_value_knows_its_origin() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, "[train]\nsteps = 2\nbatch = 4\nlr = 1\n[memory]\ndevice = \"24GB\"\n").unwrap();
    let env = [("PATRICKSTAR_TRAIN__BATCH", "16"), ("PATRICKSTAR_TRAIN__SEED", "5"), ("PATRICKSTAR_LOG", "x")];
    let loaded = sources(Some(path.clone()), &env, &["train.seed=7", "data.path=10"]).load().unwrap();
    let (config, origins) = (loaded.config, loaded.origins);
    assert_eq!((config.train.steps, config.train.batch, config.train.seed), (2, 16, 7));
    assert_eq!(config.memory.device.0, 24_000_000_000);
    assert_eq!(config.data.path, Path::new("10"));
    assert_eq!(origins.of("train.steps"), Origin::File { path, line: 2 });
    assert_eq!(origins.of("train.batch"), Origin::Env { var: "PATRICKSTAR_TRAIN__BATCH".into() });
    assert_eq!(origins.of("train.seed"), Origin::Flag);
    assert_eq!(origins.of("train.beta1"), Origin::Default);
}

#[test]
fn unknown_keys_name_the_nearest() {
    for (key, nearest) in [("train.stepz", "train.steps"), ("memory.devise", "memory.device"), ("mailbx", "mailbox")] {
        let text = message(&[], &[&format!("{key}=1")]);
        assert!(text.contains(&format!("`{key}`")) && text.contains(nearest), "{text}");
    }
    let text = message(&[("PATRICKSTAR_TRAIN__STEPZ", "1")], &[]);
    assert!(text.contains("PATRICKSTAR_TRAIN__STEPZ") && text.contains("train.steps"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    std::fs::write(&path, "\n[trian]\nsteps = 1\n").unwrap();
    let text = sources(Some(path), &[], &[]).load().unwrap_err().to_string();
    assert!(text.contains("bad.toml:3") && text.contains("`train.steps`"), "{text}");
}

#[test]
fn type_errors_name_key_origin_found_and_expected() {
    for (pair, found, expected) in [
        ("train.steps=ten", "string \"ten\"", "an integer"),
        ("train.steps=-1", "integer -1", "0 or more"),
        ("train.lr=true", "boolean true", "a number"),
        ("model.tied=1", "integer 1", "true or false"),
        ("memory.device=12 parsecs", "12 parsecs", "24GB"),
        ("actors.eviction.policy=best", "best", "one of opt, lru, static"),
        ("model.precision=fp8", "fp8", "one of fp32, bf16"),
        ("train=1", "integer 1", "a table"),
    ] {
        let text = message(&[], &[pair]);
        let key = pair.split('=').next().unwrap();
        assert!(text.contains(&format!("`{key}` (--set)")), "{text}");
        assert!(text.contains(found) && text.contains(expected), "{text}");
    }
    assert!(message(&[], &["train.steps"]).contains("table.key=value"));
}

#[test]
fn invalid_values_say_what_to_do() {
    for (pairs, key) in [
        (&["train.batch=8", "train.micro_batches=3"][..], "train.micro_batches"),
        (&["model.heads=7"], "model.heads"),
        (&["model.preset=3b"], "model.preset"),
        (&["model.dropout=1"], "model.dropout"),
        (&["memory.chunk=5000"], "memory.chunk"),
        (&["memory.device=1MiB", "memory.chunk=2MiB"], "memory.chunk"),
        (&["memory.device=0"], "memory.device"),
        (&["memory.chunk_share=1"], "memory.chunk_share"),
        (&["memory.disk_path=x"], "memory.disk_path"),
        (&["train.seq_len=2048"], "train.seq_len"),
        (&["train.lr=nan"], "train.lr"),
        (&["train.min_lr=1"], "train.min_lr"),
        (&["train.beta2=1.0"], "train.beta2"),
        (&["train.clip_norm=-1"], "train.clip_norm"),
        (&["checkpoint.keep=0"], "checkpoint.keep"),
        (&["actors.monitor.headroom=1"], "actors.monitor.headroom"),
    ] {
        let text = message(&[], pairs);
        assert!(text.starts_with(&format!("`{key}`")) && text.contains(": "), "{text}");
    }
}

#[test]
fn the_default_file_has_every_key_and_only_defaults() {
    let path = repository("config/default.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let loaded = sources(Some(path), &[], &[]).load().unwrap();
    assert_eq!(loaded.config, Config::default());
    for info in Config::keys() {
        assert!(!info.doc.is_empty(), "{} has no doc", info.key);
        assert!(text.contains(&format!("# {}\n", info.doc)), "the doc of {} differs", info.key);
        let set = loaded.origins.of(&info.key) != Origin::Default;
        assert_eq!(set, !info.default.is_null(), "{}", info.key);
    }
}

#[test]
fn every_preset_file_is_valid() {
    for entry in std::fs::read_dir(repository("config")).unwrap() {
        let path = entry.unwrap().path();
        sources(Some(path.clone()), &[], &[]).load().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
