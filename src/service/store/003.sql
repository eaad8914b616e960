-- Text that a job is not trained on, and the loss on it.
ALTER TABLE jobs ADD COLUMN validation_file TEXT;
ALTER TABLE checkpoints ADD COLUMN valid_loss REAL;
