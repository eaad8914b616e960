CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL
);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    finished_at INTEGER,
    model TEXT NOT NULL,
    training_file TEXT NOT NULL,
    suffix TEXT,
    seed INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    hyperparameters TEXT NOT NULL,
    epochs INTEGER,
    validated INTEGER NOT NULL DEFAULT 0,
    config TEXT NOT NULL,
    device TEXT NOT NULL,
    priority INTEGER NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    trained_tokens INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0,
    not_before INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    fine_tuned_model TEXT,
    result_file TEXT
);
CREATE INDEX jobs_by_status ON jobs (status, priority DESC, seq);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    -- Set for the metrics of a step. A run that was resumed repeats steps with the same bits: they are stored once.
    step INTEGER,
    data TEXT NOT NULL,
    UNIQUE (job, step)
);
CREATE INDEX events_by_job ON events (job, seq);
CREATE TABLE checkpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    step INTEGER NOT NULL,
    directory TEXT NOT NULL,
    train_loss REAL,
    -- Training keeps the newest few. A removed one still tells where a page begins.
    removed INTEGER NOT NULL DEFAULT 0,
    UNIQUE (job, step)
);
