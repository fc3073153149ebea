"""What a user can choose when a plan is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from tardis_fx.errors import ConfigError

Prefill = Literal["original", "rewritten"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a plan is fitted.

    Attributes:
        budget: fraction of the FFN weight bytes touched per decoded token, in the model's own dtype, with predictor
            and expected corrections; 0.2 is the paper's 80% reduction.
        method: name of a rewrite registered under the entry-point group ``tardis_fx.passes``.
        prefill: ``"original"`` sends steps of more than 8 tokens through the original subgraph, exact;
            ``"rewritten"`` sends every token through fold and correction (encoders, and every measurement of quality).
        predictor_bits: 2, 3, 4 or 8 bits a weight in the predictor.
        sequential: fit the sites in order, each on the inputs that the rewritten sites before it give.
        progress: show progress bars.

    Raises:
        ConfigError: a value is out of its range.
    """

    budget: float = 0.2
    method: str = "partial_linear"
    prefill: Prefill = "original"
    predictor_bits: int = 2
    sequential: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Validates every field."""
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not math.isfinite(self.budget):
            raise ConfigError(f"budget must be a number, not {self.budget!r}")
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"budget must lie in (0, 1], the fraction of the FFN weight bytes touched, not {self.budget}"
            )
        if not isinstance(self.method, str) or not self.method:
            raise ConfigError(f"method must be the name of a rewrite, not {self.method!r}")
        _one_of("prefill", self.prefill, ("original", "rewritten"))
        _one_of("predictor_bits", self.predictor_bits, (2, 3, 4, 8))
        for name in ("sequential", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``torch.compile(..., backend="tardis", options={...})`` understands.

    Attributes:
        plan: a :class:`tardis_fx.Plan` or the path of its file.
        prefill: overrides the plan's.
        strict: raise where a site of the graph is not rewritten, instead of warning.
        inner: the backend that compiles the rewritten graph.
        mode: Inductor's, as in ``torch.compile(mode=...)``, which does not take a mode beside options.
    """

    plan: Any
    prefill: Prefill | None = None
    strict: bool = False
    inner: str = "inductor"
    mode: str | None = None

    @classmethod
    def parse(cls, options: dict[str, Any] | None) -> Options:
        """Reads the dict given to ``torch.compile``.

        Raises:
            ConfigError: an option is unknown or out of its range, or there is no plan.
        """
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(
                f"unknown option {', '.join(map(repr, unknown))}: backend 'tardis' knows {', '.join(known)}"
            )
        if given.get("plan") is None:
            raise ConfigError("no plan: pass options={'plan': plan}, from tardis_fx.calibrate or the path of its file")
        if given.get("prefill") is not None:
            _one_of("prefill", given["prefill"], ("original", "rewritten"))
        if not isinstance(given.get("strict", False), bool):
            raise ConfigError(f"strict must be True or False, not {given['strict']!r}")
        if not isinstance(given.get("inner", ""), str):
            raise ConfigError(f"inner must be the name of a torch.compile backend, not {given['inner']!r}")
        if not isinstance(given.get("mode") or "", str):
            raise ConfigError(f"mode must be the name of a mode of Inductor, not {given['mode']!r}")
        return cls(**given)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
