-- When a running job will have done its steps, as its worker estimates.
ALTER TABLE jobs ADD COLUMN estimated_finish INTEGER;
