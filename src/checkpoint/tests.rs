use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use patrickstar_actors::types::{Kind, Precision, Step};
use safetensors::Dtype;

use super::*;

/// Fails operation `n` and all that follow, as a power cut does; a write that fails is torn in half.
struct FaultFs(Arc<AtomicI64>, io::ErrorKind);
struct FaultFile(Box<dyn WriteFile>, Arc<AtomicI64>, io::ErrorKind);

fn spend(left: &AtomicI64, kind: io::ErrorKind) -> io::Result<()> {
    if left.fetch_sub(1, Ordering::SeqCst) <= 0 { Err(kind.into()) } else { Ok(()) }
}

impl WriteFile for FaultFile {
    fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        let outcome = spend(&self.1, self.2);
        if outcome.is_err() && self.1.load(Ordering::SeqCst) == -1 {
            self.0.write_all(&data[..data.len() / 2])?;
        }
        outcome?;
        self.0.write_all(data)
    }
    fn sync(&mut self) -> io::Result<()> {
        spend(&self.1, self.2)?;
        self.0.sync()
    }
}

impl FileSystem for FaultFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        spend(&self.0, self.1)?;
        RealFs.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn WriteFile>> {
        spend(&self.0, self.1)?;
        Ok(Box::new(FaultFile(RealFs.create(path)?, Arc::clone(&self.0), self.1)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        spend(&self.0, self.1)?;
        RealFs.rename(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        spend(&self.0, self.1)?;
        RealFs.sync_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        spend(&self.0, self.1)?;
        RealFs.remove_dir(path)
    }
}

fn meta(step: u64) -> CheckpointMeta {
    CheckpointMeta {
        step: Step(step),
        parameters: 24,
        config_toml: String::new(),
        data_position: serde_json::json!({"epoch": 1}),
        rng_seed: 3,
        precision: Precision::Fp32,
        tokenizer: "bytes".into(),
        model: serde_json::Value::Null,
        loss_scale: None,
        loss_history_tail: vec![(1, 2.5)],
    }
}

/// Two groups: rows 0..4 and 4..6 of one tensor of four columns.
fn save(fs: Arc<dyn FileSystem>, root: &Path, step: u64) -> Result<std::path::PathBuf, CheckpointError> {
    let data: Vec<u8> = (0..96u8).map(|byte| byte.wrapping_add(step as u8)).collect();
    let mut writer = CheckpointWriter::begin(fs, root, Step(step))?;
    for (group, rows) in [(0, 0..4), (1, 4..6)] {
        let entry = Entry {
            tensor: "a.weight",
            kind: Kind::Momentum,
            row_start: rows.start,
            rows: rows.len(),
            columns: 4,
            dtype: Dtype::F32,
            data: &data[rows.start * 16..rows.end * 16],
        };
        writer.write_group(group, &[entry])?;
    }
    writer.finish(meta(step))
}

fn check(checkpoint: &Checkpoint, step: u64) {
    assert_eq!(checkpoint.meta(), &meta(step));
    for (start, rows) in [(0, 6), (3, 2), (5, 1), (1, 3)] {
        let mut out = vec![0; rows * 16];
        checkpoint.read_rows("a.weight", Kind::Momentum, start, rows, &mut out).unwrap();
        let expected: Vec<u8> =
            (start * 16..(start + rows) * 16).map(|byte| (byte as u8).wrapping_add(step as u8)).collect();
        assert_eq!(out, expected, "rows {start}..{}", start + rows);
    }
}

#[test]
fn what_is_written_is_read_under_any_tiling() {
    let root = tempfile::tempdir().unwrap();
    let path = save(Arc::new(RealFs), root.path(), 7).unwrap();
    check(&open(&path).unwrap(), 7);
    check(&latest(root.path()).unwrap().0, 7);
    let error = open(&path).unwrap().read_rows("a.weight", Kind::Variance, 0, 1, &mut [0; 16]).unwrap_err();
    assert!(error.to_string().contains("no variance of `a.weight`"));
}

#[test]
fn a_fault_at_any_operation_leaves_the_old_or_the_new_checkpoint() {
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        for second in [2, 1] {
            let mut operations = 0;
            loop {
                let root = tempfile::tempdir().unwrap();
                save(Arc::new(RealFs), root.path(), 1).unwrap();
                let fs = FaultFs(Arc::new(AtomicI64::new(operations)), kind);
                let outcome = save(Arc::new(fs), root.path(), second);
                let (checkpoint, _) = latest(root.path()).unwrap();
                let step = checkpoint.meta().step.0;
                assert!(step == 1 || step == second, "operation {operations}");
                check(&checkpoint, step);
                save(Arc::new(RealFs), root.path(), 3).unwrap();
                check(&latest(root.path()).unwrap().0, 3);
                if outcome.is_ok() {
                    break;
                }
                operations += 1;
            }
            assert!(operations > 15, "every operation was failed once: {operations}");
        }
    }
}

#[test]
fn damage_of_any_file_falls_back_to_the_previous_checkpoint_with_a_warning() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("group-00001.safetensors", |path| std::fs::write(path, b"").unwrap()),
        ("group-00000.safetensors", |path| {
            let mut data = std::fs::read(path).unwrap();
            let last = data.len() - 1;
            data[last] ^= 1;
            std::fs::write(path, data).unwrap();
        }),
        ("group-00000.safetensors", |path| std::fs::remove_file(path).unwrap()),
        ("manifest.json", |path| {
            let data = std::fs::read(path).unwrap();
            std::fs::write(path, &data[..data.len() / 2]).unwrap();
        }),
        ("manifest.json", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (file, damage) in damages {
        let root = tempfile::tempdir().unwrap();
        save(Arc::new(RealFs), root.path(), 1).unwrap();
        damage(&save(Arc::new(RealFs), root.path(), 2).unwrap().join(file));
        let (checkpoint, warnings) = latest(root.path()).unwrap();
        check(&checkpoint, 1);
        assert!(warnings.len() == 1 && warnings[0].contains(file), "{warnings:?}");
    }
    assert!(latest(tempfile::tempdir().unwrap().path()).err().unwrap().is_not_found());
}

#[test]
fn pruning_keeps_the_newest() {
    let root = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        save(Arc::new(RealFs), root.path(), step).unwrap();
    }
    prune(root.path(), 0).unwrap();
    prune(root.path(), 2).unwrap();
    let mut left: Vec<_> = std::fs::read_dir(root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["LATEST", "step-000004", "step-000005"]);
}

/// Regression: a crash while the replaced directory is removed left it behind, and the next save of that step failed.
#[test]
fn a_replaced_checkpoint_left_by_a_crash_does_not_stop_the_next_save() {
    let root = tempfile::tempdir().unwrap();
    let path = save(Arc::new(RealFs), root.path(), 7).unwrap();
    let aside = path.with_extension("old");
    std::fs::create_dir(&aside).unwrap();
    std::fs::write(aside.join("group-00001.safetensors"), "half").unwrap();
    save(Arc::new(RealFs), root.path(), 7).unwrap();
    check(&latest(root.path()).unwrap().0, 7);
    assert!(!aside.exists());
}
