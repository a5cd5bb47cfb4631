"""The file of a record: JSON, with a checksum over everything in it.

    {"format": "cortexstream-parity-2",
     "sha256": of the compact JSON of "record", its keys sorted,
     "record": {"origin": {...}, "fingerprint": {...}, "vocab_size": ..., "trials": [{...}, ...]}}

An edited, cut or mixed-up file is refused: a comparison with it would mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cortexstream.errors import InvalidRequestError
from cortexstream.files import write_whole
from cortexstream.parity.bounds import BOUNDS
from cortexstream.parity.fingerprint import Fingerprint
from cortexstream.parity.trial import Trial

FORMAT = "cortexstream-parity-2"
AGAIN = "make it again with --record"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where trials were made."""

    backend: str
    device: str  # in words
    dtype: str
    versions: dict[str, str]
    notes: tuple[str, ...]  # fallbacks in force

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Origin:
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError for anything else."""
        backend, device, dtype = (str(values[name]) for name in ("backend", "device", "dtype"))
        if dtype not in BOUNDS:
            raise ValueError(f"dtype {dtype!r} has no bounds")
        versions = {str(name): str(version) for name, version in values["versions"].items()}
        return cls(backend, device, dtype, versions, tuple(str(note) for note in values["notes"]))


@dataclass(frozen=True, slots=True)
class Record:
    """What one machine computed."""

    origin: Origin
    fingerprint: Fingerprint
    vocab_size: int
    trials: tuple[Trial, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "origin": self.origin.as_json(),
            "fingerprint": self.fingerprint.as_json(),
            "vocab_size": self.vocab_size,
            "trials": [trial.as_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError for anything else."""
        trials = tuple(Trial.from_json(trial) for trial in values["trials"])
        if not trials:
            raise ValueError("there is no trial")
        vocab_size = int(values["vocab_size"])
        largest = max(max(trial.token_ids + trial.tokens) for trial in trials)
        if largest >= vocab_size:
            raise ValueError(f"token {largest} is not in a vocabulary of {vocab_size}")
        origin, fingerprint = Origin.from_json(values["origin"]), Fingerprint.from_json(values["fingerprint"])
        return cls(origin, fingerprint, vocab_size, trials)


def save(path: Path, record: Record) -> int:
    """Write a file, whole or not at all; returns its bytes. Raises InvalidRequestError if the system refuses."""
    content = record.as_json()
    data = _compact({"format": FORMAT, "sha256": _checksum(content), "record": content})
    write_whole("record", path, data)
    return len(data)


def load(path: Path) -> Record:
    """Read a file. Raises InvalidRequestError, with what is wrong and what to do, for one that is no record, of
    another format, or damaged."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise InvalidRequestError("check", f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("check", f"{path} is damaged, or is no parity record: {error}; {AGAIN}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or not found.startswith("cortexstream-parity-"):
        raise InvalidRequestError("check", f"{path} is no parity record; {AGAIN}")
    if found != FORMAT:
        raise InvalidRequestError(
            "check", f"{path} has the format {found}; this version reads {FORMAT}: {AGAIN} of this version"
        )
    if content.get("sha256") != _checksum(content.get("record")):
        raise InvalidRequestError("check", f"{path} was changed after it was written: its checksum is wrong; {AGAIN}")
    try:
        return Record.from_json(content["record"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError("check", f"{path} holds what no record can: {error}; {AGAIN}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _checksum(record: Any) -> str:
    return hashlib.sha256(_compact(record)).hexdigest()
