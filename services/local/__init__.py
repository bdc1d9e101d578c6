"""A cascade on one machine: its file, the supervisor of its processes, and the download of models."""
