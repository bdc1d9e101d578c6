"""Certificates for tests, made on the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """A certificate authority that keeps its files in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._ca.cert_pem.bytes())

    def issue(self, stem: str, *names: str) -> tuple[Path, Path]:
        """Write a certificate for names and its key as STEM.crt and STEM.key, over what was there."""
        issued = self._ca.issue_cert(*names)
        cert, key = self._folder / f"{stem}.crt", self._folder / f"{stem}.key"
        # Renamed into place, as Kubernetes does with a mounted Secret.
        for file, content in ((cert, issued.cert_chain_pems[0]), (key, issued.private_key_pem)):
            new = file.with_suffix(".new")
            new.write_bytes(content.bytes())
            new.rename(file)
        return cert, key

    def trust_instead(self, file: Path) -> None:
        """Write this authority's certificate over another one's file."""
        new = file.with_suffix(".new")
        new.write_bytes(self._ca.cert_pem.bytes())
        new.rename(file)
