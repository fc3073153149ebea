"""Settings that every test shares."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Busy waiting in two test processes on two cores makes both ten times as slow. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from builders.ffns import FFN

    from tardis_fx import Plan

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # for `builders`: pytest's importlib mode adds nothing

# Types and shapes in these modules' annotations are checked at every call.
importlib.import_module("builders.typechecker")  # jaxtyping imports the first of these names alone
CHECKED = (
    "bench.codes",
    "bench.folds",
    "bench.large",
    "bench.model",
    "bench.plans",
    "bench.shapes",
    "bench.timings",
    "compare",
    "demo",
    # Decoding and the benchmark of one FFN compile copies of their functions' code.
    *(
        f"measure.{name}"
        for name in ("flops", "machine", "plots", "progress", "quality", "tables", "timing", "weight_only")
    ),
    "digest",
    "graph.activations",
    "graph.recognition",
    "healing",
    "live",
    # Capture compiles copies of its functions' code; batches and observe take users' wrong input.
    *(f"observation.{name}" for name in ("checkpoint", "merging", "ranks", "run", "site")),
    "guarded_fold",
    # Calls are traced with proxies of tensors.
    *(f"partial_linear.{name}" for name in ("candidates", "choice", "coding", "influence", "precision")),
    # Other rewrites' forward pass is traced with proxies of tensors.
    *(
        f"passes.{name}"
        for name in (
            "base",
            "bilinear",
            "layout",
            "linear_replace",
            "magnitude",
            "paper",
            "ria",
            "sparsegpt",
            "static",
            "wanda",
            "whole",
        )
    ),
    "planning",
    "quantisation",
    "resident",
    *(
        f"runtime.{name}"
        for name in ("coded", "coded_arguments", "coded_linear", "coded_reference", "rotation", "tables")
    ),
    "runtime.cpu.coded_layout",
    "runtime.cpu.op",
    "runtime.fingerprint",
    "runtime.packing",
    "runtime.prepared",
    "runtime.reference",
    "runtime.tables",
    "serving.forms",
    "serving.op",
    "serving.shards",
    "statistics",
    "target_kl",
    "testing.assertions",
    "testing.laws",
    "testing.observation",
    "testing.strategies",
)
install_import_hook([f"tardis_fx.{room}" for room in CHECKED], "builders.typechecker.typechecker")

# Of Hypothesis's plain profile: where it sees a CI it would draw the same examples in every run.
_plain = settings.get_profile("default")
settings.register_profile("dev", _plain, deadline=None, max_examples=20, print_blob=True)
settings.register_profile("thorough", _plain, deadline=None, max_examples=500, print_blob=True)
settings.load_profile("dev")

importlib.import_module("builders.compilations").lighten()
# Remarks on the tiny configs (special tokens beyond the vocabulary) are no news.
logging.getLogger("transformers").setLevel(logging.ERROR)

#: Warnings of third parties that nothing here causes and no user needs to read.
THIRD_PARTY = [
    # Inductor imports torch.utils.mkldnn, which uses what torch itself deprecates.
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning",
    # Dynamo makes an instance of BLOOM's GeLUFunction.
    r"ignore:<class 'torch\.autograd\.function\.Function'> should not be instantiated:DeprecationWarning",
    # transformers asks in Wav2Vec2's forward whether torch.distributed is there, and keeps the answer.
    r"ignore:Dynamo detected a call to a `functools\.lru_cache`:UserWarning",
    # Beartype checks one item of a list, which it draws.
    r"ignore:Do not use the `random` module inside strategies:hypothesis.errors.HypothesisDeprecationWarning",
]


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads the seed
def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", line)
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(random.getrandbits(32))


def pytest_sessionstart(session: pytest.Session) -> None:
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(f"examples drawn with --hypothesis-seed={session.config.getoption('--hypothesis-seed')}")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """What one test compiles, another does not find."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def rewritten_everywhere() -> Iterator[None]:
    """No site stays original because it is faster here, and nothing is timed."""
    from tardis_fx.passes.selection import Selection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "__call__", lambda _, candidates, values: [True] * len(candidates))
        yield


@pytest.fixture(scope="module")
def original() -> FFN:
    from builders.ffns import ffn

    return ffn()


@pytest.fixture(scope="module")
def plan(original: FFN) -> Plan:
    from builders.ffns import planned

    return planned(original)


@pytest.fixture
def model(original: FFN) -> FFN:
    """A copy: the same weights elsewhere in memory."""
    return copy.deepcopy(original)
