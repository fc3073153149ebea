"""What a fuzzer draws: cases made of bytes, so that any part of a case is a case, too.

A case is a list of blocks. Whoever builds something of it reads every choice as one byte, and zero where a block has
ended: deleting blocks and bytes, which is how :func:`minimise` works, never makes a case invalid.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

from tardis_fx.errors import ConfigError

T = TypeVar("T")

Blocks = tuple[bytes, ...]
"""A case: the first block says what everything rests on, every other one is a step."""

#: Choices that a drawn block holds; what reads more gets zeros.
_CHOICES = 24


class Choices:
    """The choices of a block, in the order in which they are made; the first option should be the simplest."""

    def __init__(self, block: bytes) -> None:
        self._bytes = iter(block)

    def below(self, count: int) -> int:
        """A number from 0 on."""
        return next(self._bytes, 0) % count

    def pick(self, options: Sequence[T]) -> T:
        """One of a few."""
        return options[self.below(len(options))]

    def once_in(self, count: int) -> bool:
        """True in one of so many cases."""
        return self.below(count) == count - 1


@dataclass(frozen=True)
class Failure:
    """A case with what went wrong.

    Attributes:
        kind: which fuzzer it is a case of: "program" or "weights".
        route: how it was run.
        blocks: the case.
        fault: in a few words, what sort of failure it is; minimising keeps it.
        message: all that is known of it.
        code: the case as a person reads it.
    """

    kind: str
    route: str
    blocks: Blocks
    fault: str
    message: str
    code: str = ""

    def __str__(self) -> str:
        """All but the bytes."""
        return f"{self.kind} by {self.route}: {self.fault}: {self.message}\n{self.code}"

    def save(self, folder: Path) -> Path:
        """Writes a file that :meth:`load` reads, named by its content."""
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"blocks": [block.hex() for block in self.blocks]}
        path = folder / f"{self.kind}-{self.route}-{hash_of(self.blocks)}.json"
        path.write_text(json.dumps(content, indent=1))
        return path

    @classmethod
    def load(cls, path: Path) -> "Failure":
        """Reads a saved case.

        Raises:
            ConfigError: the file is missing or holds none.
        """
        try:
            content = json.loads(path.read_text())
            return cls(**content | {"blocks": tuple(map(bytes.fromhex, content["blocks"]))})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is no saved case of the fuzzer: {type(error).__name__}: {error}") from error


class Judged(NamedTuple):
    """What became of a case.

    Attributes:
        verdict: what it was found to be; "failed" or "crashed" where something is wrong.
        failure: what is.
    """

    verdict: str
    failure: Failure | None = None


def hash_of(blocks: Blocks) -> str:
    """A short name of a case."""
    return hashlib.sha256(b"/".join(blocks)).hexdigest()[:10]


def drawn(seed: int, number: int, *, most: int) -> Blocks:
    """The case of this number: a first block and up to ``most`` steps."""
    random = Random(f"{seed} {number}")
    return tuple(random.randbytes(_CHOICES) for _ in range(1 + random.randint(1, most)))


def minimise(failure: Failure, attempt: Callable[[Blocks], Failure | None], *, tries: int = 600) -> Failure:
    """A smaller case with the same fault.

    Args:
        failure: the case as it was drawn.
        attempt: runs a case; what is wrong with it, or None.
        tries: runs at the most.
    """
    smallest = failure

    def better(blocks: Blocks) -> bool:
        nonlocal smallest, tries
        if tries <= 0 or blocks == smallest.blocks:
            return False
        tries -= 1
        found = attempt(blocks)
        if found is None or found.fault != failure.fault:
            return False
        smallest = replace(found, blocks=blocks)
        return True

    size = None
    while tries > 0 and size != (size := sum(1 + len(block) for block in smallest.blocks)):
        for width in (8, 4, 2, 1):
            start = len(smallest.blocks) - width
            while start >= 1:  # the first block stays
                better(smallest.blocks[:start] + smallest.blocks[start + width :])
                start -= width
        for number in range(len(smallest.blocks)):
            _shorten(number, lambda: smallest.blocks, better)
    return smallest


def _shorten(number: int, current: Callable[[], Blocks], better: Callable[[Blocks], bool]) -> None:
    """Cuts a block's end off and puts simpler choices in the place of what is left."""

    def attempt(block: bytes) -> bool:
        blocks = current()
        return better((*blocks[:number], block.rstrip(b"\0"), *blocks[number + 1 :]))

    for length in (0, 2, 4, 8, 12, 16):
        if length < len(current()[number]) and attempt(current()[number][:length]):
            break
    for at in reversed(range(len(current()[number]))):
        block = current()[number]
        if at < len(block) and block[at]:
            attempt(block[:at] + b"\0" + block[at + 1 :])
