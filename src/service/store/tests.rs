//! The database alone: what it keeps, and in which order it gives it back.

use serde_json::{Map, json};

use super::*;

fn open(directory: &Path) -> Store {
    Store::open(&directory.join("store.sqlite")).unwrap()
}

fn new_job(file: &FileId, priority: i32) -> NewJob {
    NewJob {
        model: "gpt-tiny".into(),
        training_file: file.clone(),
        validation_file: None,
        suffix: None,
        seed: 7,
        metadata: Map::from_iter([("team".to_owned(), json!(if priority > 0 { "a" } else { "b" }))]),
        hyperparameters: json!({ "n_epochs": "auto" }),
        epochs: Some(1),
        config: json!({}),
        device: "cpu".into(),
        priority,
    }
}

fn saved(step: u64, losses: Option<Losses>) -> SavedCheckpoint {
    SavedCheckpoint { step, directory: "d".into(), losses }
}

fn queued(store: &mut Store, file: &FileId, priority: i32) -> JobId {
    let job = store.create_job(&new_job(file, priority), 100).unwrap().unwrap();
    assert!(store.queue_validated(&job.id, &json!({ "train": {} })).unwrap());
    job.id
}

#[test]
fn what_was_answered_is_there_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let file = FileId::random().unwrap();
    store.add_file(&file, "a.jsonl", Purpose::FineTune, 3).unwrap();
    let job = queued(&mut store, &file, 0);
    let report = Report {
        events: vec![NewEvent::metrics(1, "Step 1".into(), json!({ "train_loss": 0.1f64 + 0.2 }))],
        progress: Some(StepsDone { step: 1, tokens: 64, estimated_finish: Some(UnixTime(99)) }),
        checkpoints: vec![saved(1, Some(Losses { train_loss: Some(1.5), valid_loss: Some(1.75) }))],
    };
    store.store_report(&job, &report).unwrap();
    // A copy of the files as they lie there is what a kill at this instant leaves: nothing was closed.
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let reopened = open(copy.path());
    assert_eq!(reopened.file(&file).unwrap().unwrap().name, "a.jsonl");
    let row = reopened.job(&job).unwrap().unwrap();
    assert_eq!((row.status, row.step, row.trained_tokens), (Status::Queued, 1, 64));
    let newest = reopened.events(&job, None, 1).unwrap();
    assert!(newest.has_more);
    assert_eq!(newest.rows[0].data["train_loss"].as_f64(), Some(0.1 + 0.2));
    let checkpoint = &reopened.checkpoints(&job, None, 10).unwrap().rows[0];
    assert_eq!((checkpoint.step, checkpoint.losses.valid_loss), (1, Some(1.75)));
    let check: String = reopened.connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(check, "ok");
}

#[test]
fn a_step_that_is_repeated_is_stored_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let file = FileId::random().unwrap();
    let job = queued(&mut store, &file, 0);
    let before = store.events(&job, None, 100).unwrap().rows.len();
    for steps in [1..=4, 3..=6] {
        let events = steps.clone().map(|step| NewEvent::metrics(step, format!("Step {step}"), json!({}))).collect();
        let progress = Some(StepsDone { step: *steps.end() - 1, tokens: 0, estimated_finish: None });
        store.store_report(&job, &Report { events, progress, checkpoints: vec![saved(4, None)] }).unwrap();
    }
    let steps: Vec<_> =
        store.events_since(&job, Seq(0), 100).unwrap().into_iter().filter_map(|event| event.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    assert_eq!(store.events(&job, None, 100).unwrap().rows.len(), before + 6);
    assert_eq!(store.checkpoints(&job, None, 10).unwrap().rows.len(), 1);
}

#[test]
fn only_a_new_checkpoint_forgives_deaths() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let job = queued(&mut store, &FileId::random().unwrap(), 0);
    let metrics = NewEvent::metrics(5, "Step 5".into(), json!({ "train_loss": 2.5, "valid_loss": 3.5 }));
    let report = |step| Report { checkpoints: vec![saved(step, None)], ..Report::default() };
    store.store_report(&job, &Report { events: vec![metrics], ..Report::default() }).unwrap();
    let mut restarts = Vec::new();
    for step in [5, 5, 6] {
        store.note_restart(&job, 3, UnixTime(0), &NewEvent::warn("died".into())).unwrap();
        store.store_report(&job, &report(step)).unwrap();
        restarts.push(store.job(&job).unwrap().unwrap().restarts);
    }
    assert_eq!(restarts, [0, 3, 0]);
    let losses: Vec<_> = store.checkpoints(&job, None, 9).unwrap().rows.iter().map(|row| row.losses).collect();
    assert_eq!(losses, [Losses::default(), Losses { train_loss: Some(2.5), valid_loss: Some(3.5) }]);
}

#[test]
fn the_queue_goes_by_priority_and_then_by_age() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let file = FileId::random().unwrap();
    let jobs: Vec<JobId> = [0, 5, 0, 5].map(|priority| queued(&mut store, &file, priority)).into();
    let running = queued(&mut store, &file, -1);
    store.change_status(&running, Status::Running, &NewEvent::info("started".into())).unwrap().unwrap();
    let order: Vec<JobId> = store.runnable_jobs().unwrap().into_iter().map(|(job, _)| job.id).collect();
    assert_eq!(order, [&running, &jobs[1], &jobs[3], &jobs[0], &jobs[2]].map(Clone::clone));
    assert!(store.file_in_use(&file).unwrap());
    assert!(store.create_job(&new_job(&file, 0), 4).unwrap().is_none(), "the queue is full");
}

#[test]
fn a_job_that_has_ended_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let job = queued(&mut store, &FileId::random().unwrap(), 0);
    let event = NewEvent::info("x".into());
    assert!(store.change_status(&job, Status::Running, &event).unwrap().is_some());
    assert!(store.change_status(&job, Status::Cancelled, &event).unwrap().unwrap().finished_at.is_some());
    for next in Status::ALL {
        assert!(store.change_status(&job, next, &event).unwrap().is_none(), "{next}");
    }
    assert!(!store.finish_job(&job, "m", None).unwrap());
    assert!(!store.fail_job(&job, &Failure { code: "c".into(), message: "m".into() }).unwrap());
    assert!(!store.queue_validated(&job, &json!({})).unwrap());
}

#[test]
fn pages_follow_each_other_without_gap_or_overlap() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let file = FileId::random().unwrap();
    let jobs: Vec<JobId> = (0..5).map(|index| queued(&mut store, &file, index % 2)).collect();
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = store.jobs(after.as_ref(), 2, &MetadataFilter::Any).unwrap();
        seen.extend(page.rows.iter().map(|job| job.id.clone()));
        after = seen.last().cloned();
        if !page.has_more {
            break;
        }
    }
    seen.reverse();
    assert_eq!(seen, jobs);
    let team = MetadataFilter::Pairs(vec![("team".into(), "a".into())]);
    assert_eq!(store.jobs(None, 20, &team).unwrap().rows.len(), 2);
    assert!(store.jobs(None, 20, &MetadataFilter::Absent).unwrap().rows.is_empty());
    let unknown = JobId::random().unwrap();
    assert!(store.jobs(Some(&unknown), 2, &MetadataFilter::Any).unwrap_err().to_string().contains("to list after"));
}

#[test]
fn a_newer_database_is_refused_and_names_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    open(directory.path()).connection.execute("INSERT INTO migrations VALUES (99, 0)", []).unwrap();
    let error = Store::open(&directory.path().join("store.sqlite")).err().unwrap().to_string();
    assert!(error.contains("version 99"), "{error}");
    for bad in ["", "file-", "file-../../etc/passwd", "ftjob-000000000000000000000000", "file-00000000000000000000000G"]
    {
        assert!(bad.parse::<FileId>().is_err(), "{bad}");
    }
    let id = FileId::random().unwrap();
    assert_eq!(id.as_str().parse::<FileId>().unwrap(), id);
}
