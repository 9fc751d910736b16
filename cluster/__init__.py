"""Ray lives here: the data pipeline, the trainer and its workers."""
