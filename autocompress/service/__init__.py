"""Jobs that outlive a terminal: the store (SQLite) and the worker that runs what is queued."""
