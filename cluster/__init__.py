"""Ray lives here: the data pipeline, the trainer and its workers."""

import os

# Ray reads it when it is imported, so it stands before all that do. A run ends its own pipelines, and starts
# more processes than Ray expects of it: neither is worth an alarming line on the terminal.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    r"killed by `ray\.kill`|worker processes have been started on node",
)
