"""A cascade on one machine: its file, its processes and their supervisor, and the download of models."""
