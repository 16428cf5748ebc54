"""Records in a file, one line of JSON per record, which stays readable whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError, LowRankError
from .record import SpectrumRecord


class JsonLines:
    """Appends every record to a file, which is open only while a line is written.

    Args:
        path: the file, new or existing; a last line that was not finished, since its process died, is cut off first.

    Raises:
        LowRankError: if the folder does not exist, or the path is a folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise LowRankError(f"SpectrumMonitor: got file={str(path)!r}, expected a file in an existing folder.")
        self._checked = False

    def __call__(self, record: SpectrumRecord) -> None:
        """Appends a record."""
        if not self._checked:
            self._cut_unfinished_line()
            self._checked = True
        with self.path.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")

    def _cut_unfinished_line(self) -> None:
        if self.path.exists():
            with self.path.open("r+b") as file:
                text = file.read()
                file.truncate(text.rfind(b"\n") + 1)


def read_spectra(path: str | os.PathLike[str]) -> list[SpectrumRecord]:
    """Reads the records that a :class:`SpectrumMonitor` wrote to its ``file``.

    A last line that was not finished, since its process died or is still writing, is left out.

    Args:
        path: the file.

    Raises:
        CheckpointError: if there is no such file, or another line is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    records = []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last line break stands nothing, or an unfinished line
    for number, line in enumerate(lines, 1):
        try:
            records.append(SpectrumRecord.from_json(line.decode()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: line {number} is no record of a SpectrumMonitor: {error!r}") from None
    return records
