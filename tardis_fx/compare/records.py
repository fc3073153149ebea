"""Stores the results of a comparison by case in a file of JSON lines, from which an interrupted run resumes."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tardis_fx.errors import BenchError

#: Start of every record.
_START = b'{"key": "'


@dataclass(frozen=True)
class Record:
    """The result of one case with one seed.

    Attributes:
        key: hash of everything that determines the figures: model, text and case; see :func:`tardis_fx.digest.digest`.
        case: hash of the case alone.
        subject: name of the model.
        label: of the method.
        budget: requested fraction of the dense bytes, or None.
        seed: of the calibration text.
        reason: why the case is out of reach and was not measured, or None.
        stored: weight bytes kept, as a fraction of those of the dense FFNs.
        touched: weight bytes read per decoded token, likewise; expected by the plan.
        counted: the same, counted on text, or None if the rewrite's bytes do not depend on the text.
        flops: of a prefill in which every token takes the rewritten path, as a fraction of those of the dense FFNs.
        metrics: quality, by name.
        decode: smallest, median and largest ratio of Inductor's time per token to that of this case, or None.
        seconds: taken to fit and to measure.
    """

    key: str
    case: str
    subject: str
    label: str
    budget: float | None
    seed: int
    reason: str | None = None
    stored: float = 1.0
    touched: float = 1.0
    counted: float | None = None
    flops: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)
    decode: list[float] | None = None
    seconds: list[float] = field(default_factory=list)


class Records(dict[str, Record]):
    """The records of a file by key, the last one of each."""

    def __init__(self, path: Path) -> None:
        """Reads existing records; drops an incomplete last line of a run that was killed while writing.

        Raises:
            BenchError: the file cannot be read or written, or holds something other than records.
        """
        super().__init__()
        self._path = path
        try:
            with path.open("a+b") as file:  # creates the file, and checks that it can be written
                file.seek(0)
                *lines, rest = file.read().split(b"\n")
                if not rest.startswith(_START[: len(rest)]):
                    raise BenchError(f"{path} does not hold records of a comparison: name another file")
                for number, line in enumerate(lines, 1):
                    try:
                        record = Record(**json.loads(line))
                    except (ValueError, TypeError) as error:
                        raise BenchError(f"line {number} of {path} is no record of a comparison: {error}") from error
                    self[record.key] = record
                file.truncate(file.tell() - len(rest))
        except OSError as error:
            raise BenchError(f"cannot keep records in {path}: {error}") from error

    def add(self, record: Record) -> None:
        """Appends a record to the file.

        Raises:
            BenchError: the file cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            raise BenchError(f"cannot write to {self._path}: {error}") from error
        self[record.key] = record
