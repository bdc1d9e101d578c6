"""asd.transport.files, for services."""

from asd.transport.files import UnusableFile, WatchedFiles

__all__ = ["UnusableFile", "WatchedFiles"]
