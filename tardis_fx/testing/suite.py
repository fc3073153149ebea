"""Checks a rewrite against every law, and reports broken laws with the smallest failing example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tardis_fx.passes.registry import rewrite_named
from tardis_fx.testing.laws import LAWS
from tardis_fx.testing.strategies import Specimen, sites

NEVER_TAKEN = "the rewrite took none of the drawn sites"


@dataclass(frozen=True)
class Verdict:
    """The result of checking one law.

    Attributes:
        law: in words.
        failure: description of the failure, or None; also set if the rewrite took none of the drawn sites.
        example: the smallest failing example, or None.
    """

    law: str
    failure: str | None = None
    example: Specimen | None = None

    @property
    def passed(self) -> bool:
        """Whether the law held for every example."""
        return self.failure is None

    def __str__(self) -> str:
        return self.law if self.passed else f"{self.law}: {self.failure}, with {self.example}"


def examine(
    method: str, *, examples: int = 10, laws: Sequence[Callable[[str, Specimen], None]] = LAWS
) -> list[Verdict]:
    """Checks a registered rewrite against laws.

    Args:
        method: its name in the entry-point group.
        examples: number for each law; the same ones every time.
        laws: the laws to check.

    Raises:
        ConfigError: no such rewrite is registered.
    """
    rewrite_named(method)
    return [_verdict(method, law, examples) for law in laws]


def _verdict(method: str, law: Callable[[str, Specimen], None], examples: int) -> Verdict:
    failing: list[Specimen] = []  # Hypothesis ends with the smallest

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(sites())
    def check(specimen: Specimen) -> None:
        try:
            law(method, specimen)
        except Exception:
            failing.append(specimen)
            raise

    words = law.__name__.replace("_", " ")
    try:
        check()
    except Unsatisfiable:
        return Verdict(words, NEVER_TAKEN)
    except Exception as error:
        return Verdict(words, f"{type(error).__name__}: {error}", failing[-1] if failing else None)
    return Verdict(words)
