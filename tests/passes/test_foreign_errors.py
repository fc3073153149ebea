"""What a rewrite of somebody else's raises becomes an error that names it, with its cause."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from builders.ffns import batches, config, ffn, inputs
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from tardis_fx import Config, Plan, RewriteError, TardisError, calibrate
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes import Rewrite, registry
from tardis_fx.plan import Planned, SitePlan

STEPS = ["refuse", "fit", "constants", "forward"]


class Nothing:
    """Observes nothing."""

    def update(self, x: Tensor) -> None:
        pass


class Dropping(Rewrite):
    """Gives zeros, and raises what it is told to where it is told to."""

    name = "own"
    raising: tuple[str, BaseException] | None = None

    def _at(self, step: str) -> None:
        if self.raising is not None and self.raising[0] == step:
            raise self.raising[1]

    def refuse(self, site: Site) -> str | None:
        self._at("refuse")
        return None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        self._at("fit")
        yield Run("nothing", lambda _: self._nothing(), sites, lambda *_: self._at("finish"))
        return [SitePlan.from_site(site.site, site.parameters, method="own") for site in sites]

    def _nothing(self) -> Nothing:
        self._at("make")
        return Nothing()

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        self._at("constants")
        return {"zero": torch.zeros(())}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        self._at("forward")
        return x * constants["zero"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Loaded(EntryPoint):
        def load(self) -> Any:
            return Dropping

    monkeypatch.setattr(registry, "entry_points", lambda group: [Loaded("own", "own:Dropping", group)])
    monkeypatch.setattr(Dropping, "raising", None)
    registry.rewrite_named.cache_clear()
    yield
    registry.rewrite_named.cache_clear()


def _run(model: nn.Module, step: str, error: BaseException) -> None:
    """Calibrates, or compiles with a plan that was made before, with a rewrite that raises in a step."""
    plan = Plan(calibrate(model, batches(), config=config(method="own")).sites, config())
    Dropping.raising = (step, error)
    if step not in ("constants", "forward"):
        calibrate(model, batches(), config=config(method="own"))
    options: dict[str, Any] = {"plan": plan, "inner": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="tardis", options=options)(inputs(4, 16))


@pytest.mark.parametrize("step", [*STEPS, "make", "finish"])
def test_an_exception_in_a_rewrite_names_it_and_is_the_cause(step: str) -> None:
    cause, named = ValueError("seven is odd"), "fit" if step in ("make", "finish") else step
    with pytest.raises(TardisError, match=f"rewrite 'own': {named} of 0 raised ValueError: seven is odd") as raised:
        _run(nn.Sequential(ffn()).eval(), step, cause)
    assert "backend=" not in str(raised.value)
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, RewriteError):  # a plan's check says that the plan is unusable
        error = error.__cause__
    assert error is not None
    assert error.__cause__ is cause


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError()], ids=type)
def test_interrupts_and_exhausted_memory_stay_what_they_are(step: str, error: BaseException) -> None:
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - of the backend, Dynamo wraps the latter two
        _run(nn.Sequential(ffn()).eval(), step, error)
    assert not isinstance(raised.value, RewriteError)


@pytest.mark.parametrize("error", [Unsupported("no", "no"), ConstraintViolationError()], ids=type)
def test_what_dynamo_raises_for_itself_passes(error: Exception) -> None:
    Dropping.raising = ("refuse", error)
    with pytest.raises(type(error)):
        registry.rewrite_named("own").refuse(None)  # type: ignore[arg-type]


class Failing(nn.Module):
    """A model that fails at its third call."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.calls = ffn(), 0

    def forward(self, x: Tensor) -> Tensor:
        self._count()
        return self.ffn(x)  # type: ignore[no-any-return]

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _count(self) -> None:
        self.calls += 1
        if self.calls == 3:
            raise IndexError("index out of range in self")


def test_a_model_that_fails_while_it_is_observed_is_not_the_rewrites_fault() -> None:
    registry.rewrite_named.cache_clear()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        calibrate(Failing().eval(), batches(), config=config(method="own"))
    assert not isinstance(raised.value, RewriteError)
