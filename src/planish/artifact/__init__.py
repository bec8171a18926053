"""The artifact: a directory that runs with its runtime alone, written whole or not at all, and checked by hash before it is used."""

from __future__ import annotations

from planish.artifact.contents import Artifact, open_artifact
from planish.artifact.deployed import Deployed, load
from planish.artifact.manifest import Entry, Manifest
from planish.artifact.writing import beside, check_output, default_folder, study_folder, write

__all__ = [
    "Artifact",
    "Deployed",
    "Entry",
    "Manifest",
    "beside",
    "check_output",
    "default_folder",
    "load",
    "open_artifact",
    "study_folder",
    "write",
]
