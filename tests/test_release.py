"""Weights that a rewritten model does not read can go, or be mapped from files; nothing else reads what is gone."""

import copy
import gc
import io
import logging
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, Broken, config, ffn, inputs
from torch import nn

import tardis_fx
from tardis_fx import Plan
from tardis_fx.errors import PlanMismatchError, ReleasedWeightError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.partial_linear import PartialLinear

D, HIDDEN = 16, 64


def _planned(model: nn.Module, **changes: Any) -> Plan:
    settings = {"budget": 0.6, "prefill": "rewritten", "fold_bits": 8, "row_bits": 8} | changes
    return tardis_fx.calibrate(model, [inputs(512, D)], config=config(**settings))


def _fast(model: nn.Module, plan: Plan, **options: Any) -> Any:
    given: dict[str, Any] = {"plan": plan, "inner": "eager", "strict": True} | options
    return torch.compile(model, backend="tardis", options=given)


@torch.no_grad()
def test_a_model_without_its_matrices_gives_what_it_gave_and_holds_a_number_in_their_place() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert tardis_fx.release(model, plan, x) == 4 * 2 * D * HIDDEN
    assert all(p.untyped_storage().nbytes() == 4 for p in matrices)
    torch.compiler.reset()
    assert torch.equal(_fast(model, plan)(x), before)
    assert all(p.isnan().all() for p in matrices)
    assert tardis_fx.release(model, plan, x) == 0


@torch.no_grad()
def test_a_model_that_was_compiled_before_goes_on() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = _planned(model)
    fast = _fast(model, plan)
    before = fast(x)
    tardis_fx.release(model, plan, x)
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_what_is_stored_falls_by_what_was_released() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    freed = tardis_fx.release(model, plan, x)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - freed


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_whose_matrices_are_stored_the_other_way_is_stored_as_the_plan_says(bits: int) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        matrix.data = matrix.T.contiguous().T
    plan = _planned(model, row_bits=bits)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == plan.sites[0].stored_bytes
    copies = 0 if bits == 16 else 2  # rows of 16 bits are read from the weights, and W2 lies as they need it
    assert tardis_fx.release(model, plan, x) == copies * 4 * D * HIDDEN


@torch.no_grad()
def test_a_released_ffn_never_runs_as_it_was() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    tardis_fx.release(model, plan, x)
    with pytest.raises(PlanMismatchError, match="released: compile with prefill='rewritten'"):
        _fast(model, plan, prefill="original")(x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    torch.compiler.reset()
    with pytest.raises(tardis_fx.TardisError):
        _fast(model, plan)(x)


@torch.no_grad()
def test_rows_of_the_original_weights_keep_them_once(caplog: pytest.LogCaptureFixture) -> None:
    """W2 and its transposed copy are one: prefill takes the original FFN, and corrections gather its rows."""
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan, before = _planned(model, row_bits=16), model(x)
    fast = _fast(model, plan)(x)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    caplog.clear()
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - 4 * D * HIDDEN
    assert not caplog.text
    up, down = (p for p in model.parameters() if p.dim() == 2)
    weights = SiteWeights(up, model[0].bias, down, model[2].bias)  # type: ignore[index,arg-type]
    assert PartialLinear().constants(plan.rewritten[0], weights)["columns"].data_ptr() == down.data_ptr()
    torch.compiler.reset()
    torch.testing.assert_close(_fast(model, plan, prefill="original")(x), before)
    torch.testing.assert_close(_fast(model, plan)(x), fast)
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        assert tardis_fx.release(model, plan, x) == 0
    assert "keeps its weights" in caplog.text
    down.mul_(2)
    with pytest.raises(tardis_fx.TardisError):
        _fast(model, plan)(x)


@torch.no_grad()
def test_a_matrix_that_something_else_reads_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.head = ffn(D, HIDDEN), nn.Linear(D, HIDDEN)
            self.head.weight = self.ffn.up.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.ffn(x))  # type: ignore[no-any-return]

    model, x = Tied().eval().requires_grad_(False), inputs(32, D)
    plan = _planned(model)
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert not model.head.weight.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = ffn(D, HIDDEN).to(dtype), inputs(32, D).to(dtype)
    plan = tardis_fx.calibrate(model, [inputs(512, D).to(dtype)], config=config(budget=0.6))
    before = model(x)
    assert tardis_fx.release(model, plan, x, folder=tmp_path) == dtype.itemsize * 2 * D * HIDDEN
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == dtype.itemsize * 2 * D * HIDDEN
    assert torch.equal(model(x), before)
    assert torch.equal(_fast(model, plan, prefill="original")(x), before)
    assert (_fast(model, plan, prefill="rewritten")(x) - before).norm() < 0.3 * before.norm()


@torch.no_grad()
def test_mapping_twice_and_in_two_models_keeps_both_whole_and_apart(tmp_path: Path) -> None:
    model, twin, x = ffn(D, HIDDEN), ffn(D, HIDDEN), inputs(32, D)
    plan, before = _planned(model), model(x)
    old = weakref.ref(model[0].weight.untyped_storage())  # type: ignore[index,operator,union-attr]
    for each in (model, model, twin):
        tardis_fx.release(each, plan, x, folder=tmp_path)
    gc.collect()
    assert old() is None  # or nothing was freed
    assert torch.equal(model(x), before)
    model[0].weight.mul_(2)  # type: ignore[index,operator,union-attr]
    assert torch.equal(twin(x), before)


@torch.no_grad()
def test_layers_of_equal_weights_are_all_released() -> None:
    model = nn.Sequential(ffn(D, HIDDEN), ffn(D, HIDDEN)).eval().requires_grad_(False)
    plan = _planned(model)
    assert tardis_fx.release(model, plan, inputs(4, D)) == 2 * 4 * 2 * D * HIDDEN


@torch.no_grad()
@pytest.mark.parametrize("options", [{"on_change": "refit"}, {"on_change": "original"}, {"plan": None}])
def test_what_is_released_is_not_observed_and_not_run(options: dict[str, Any]) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    tardis_fx.release(model, plan, x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    given: dict[str, Any] = {"plan": plan, "inner": "eager", "prefill": "rewritten"} | options
    with pytest.raises(PlanMismatchError, match="which were released"):
        torch.compile(model, backend="tardis", options=given)(x)


def test_a_plan_of_another_model_releases_nothing() -> None:
    plan = _planned(ffn(D, HIDDEN, seed=3))
    model = ffn(D, HIDDEN)
    with pytest.raises(PlanMismatchError, match="nothing to release"):
        tardis_fx.release(model, plan, inputs(4, D))


# ---- What is gone is neither saved nor read


def _released(**changes: Any) -> tuple[nn.Module, Plan, torch.Tensor]:
    model, x = nn.Sequential(ffn(D, HIDDEN)).eval(), inputs(32, D)
    plan = _planned(model, **changes)
    tardis_fx.release(model, plan, x)
    return model, plan, x


#: What writes, copies or reads a whole model.
def _eager(model: nn.Module) -> Any:
    """Compiled, which PyTorch declares to be a function."""
    return torch.compile(model, backend="eager")


USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "state_dict of a part": lambda model, _: model[0][2].state_dict(),  # type: ignore[index,operator,union-attr]
    "torch.save of its state": lambda model, path: torch.save(model.state_dict(), path),
    "torch.save of the model": lambda model, _: torch.save(model, io.BytesIO()),
    "torch.save of parameters": lambda model, _: torch.save(dict(model.named_parameters()), io.BytesIO()),
    "pickle": lambda model, _: pickle.dumps(model),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "eager call": lambda model, _: model(inputs(3, D)),
    "eager call of a part": lambda model, _: model[0][0](inputs(3, D)),  # type: ignore[index,operator,union-attr]
    "state_dict after a cast": lambda model, _: model.half().state_dict(),
    "eager call after a cast": lambda model, _: model.double()(inputs(3, D).double()),
    "state_dict of the compiled model": lambda model, _: _eager(model).state_dict(),
}


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
def test_what_would_write_or_read_released_weights_names_them(use: str, tmp_path: Path) -> None:
    model, _, _ = _released()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(b"as it was")
    with pytest.raises(ReleasedWeightError, match=r"0\.[02]\.weight: released by tardis_fx\.release"):
        USES[use](model, checkpoint)
    assert checkpoint.read_bytes() == b"as it was"


@torch.no_grad()
def test_a_released_model_is_not_saved_over_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = models.gpt2()
    plan = tardis_fx.calibrate(model, [models.tokens(4, 32)], config=config(fold_bits=8, row_bits=8, budget=0.7))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    before = weights.read_bytes()
    assert tardis_fx.release(model, plan, models.tokens(1, 4)) > 0
    for save in (lambda: model.save_pretrained(tmp_path), lambda: save_model(model, str(weights))):
        with pytest.raises(ReleasedWeightError, match=r"h\.0\.mlp\.c_fc\.weight"):
            save()
    assert weights.read_bytes() == before


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_loading_the_original_weights_makes_the_model_whole(assign: bool) -> None:
    model, x = nn.Sequential(ffn(D, HIDDEN)).eval(), inputs(32, D)
    plan, before, state = _planned(model), model(x), copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert tardis_fx.release(model, plan, x) > 0
        part = {name: value for name, value in state.items() if name.startswith("0.0.")}
        model.load_state_dict(part, strict=False)
        with pytest.raises(ReleasedWeightError, match=r"0\.2\.weight"):
            model.state_dict()
        model.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(model(x), before)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert all(map(torch.equal, twin.state_dict().values(), state.values()))
        assert torch.equal(twin(x), before)
        torch.compiler.reset()
        assert torch.equal(_fast(model, plan, prefill="original")(x), before)


@torch.no_grad()
def test_weights_that_take_the_place_of_released_ones_are_used() -> None:
    model, _, x = _released()
    for linear in (model[0][0], model[0][2]):  # type: ignore[index,operator,union-attr]
        linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    assert model(x).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


class Owner(nn.Module):
    """An FFN that holds its matrices itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.up = nn.Parameter(torch.randn(HIDDEN, D, generator=g) / D**0.5)
        self.down = nn.Parameter(torch.randn(D, HIDDEN, generator=g) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(nn.functional.linear(x, self.up))
        return nn.functional.linear(hidden, self.down)


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_code_does_not_see_what_guards_released_weights(fullgraph: bool) -> None:
    """As the model itself, and as twelve blocks of one graph, more than Dynamo would compile anew."""
    model = Owner(0).eval() if fullgraph else Broken([Owner(seed) for seed in range(12)])
    x = inputs(32, D)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    tardis_fx.release(model, plan, x)
    torch.compiler.reset()
    options: dict[str, Any] = {"plan": plan, "inner": "eager", "strict": True}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert torch.equal(torch.compile(model, backend="tardis", options=options, fullgraph=fullgraph)(x), before)
    with pytest.raises(ReleasedWeightError, match=r"up, (blocks\.0\.)?down: released"):
        model(x)


# ---- Blocks that share a graph or weights


@torch.no_grad()
def test_every_block_of_a_shared_graph_is_released() -> None:
    model, x = Broken([Block(ffn(D, HIDDEN, seed=i), D) for i in range(4)]), inputs(32, D)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 4 * 4 * 2 * D * HIDDEN
    assert all(p.isnan().all() for p in model.parameters() if p.dim() == 2)
    torch.compiler.reset()
    assert torch.equal(_fast(model, plan)(x), before)


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True])
def test_an_ffn_of_two_blocks_is_released_once(broken: bool) -> None:
    shared = ffn(D, HIDDEN)
    blocks: list[nn.Module] = [Block(shared, D), Block(shared, D), Block(ffn(D, HIDDEN, seed=1), D)]
    model, x = Broken(blocks) if broken else nn.Sequential(*blocks).eval(), inputs(32, D)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 2 * 4 * 2 * D * HIDDEN
    torch.compiler.reset()
    assert torch.equal(_fast(model, plan)(x), before)


@torch.no_grad()
def test_a_matrix_of_two_ffns_stays(caplog: pytest.LogCaptureFixture) -> None:
    first, second = ffn(D, HIDDEN), ffn(D, HIDDEN, seed=1)
    second[0] = first[0]
    model, x = nn.Sequential(first, second).eval(), inputs(32, D)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 2 * 4 * D * HIDDEN
    assert "keeps weights that something else holds or reads" in caplog.text
    assert first.up.weight.isfinite().all()
    torch.compiler.reset()
    assert torch.equal(_fast(model, plan)(x), before)


@torch.no_grad()
def test_a_matrix_that_another_graph_reads_stays() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn(D, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.ffn(x)
            torch._dynamo.graph_break()
            return x * self.ffn.up.weight.square().mean()  # type: ignore[no-any-return]

    model, x = Reads().eval(), inputs(32, D)
    plan = _planned(model)
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert model.ffn.up.weight.isfinite().all()


# ---- Files and memory


@torch.no_grad()
@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b + b[:4], lambda b: bytes(len(b)), lambda _: b""])
def test_a_file_that_does_not_hold_the_matrix_is_written_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan, before = _planned(model), model(x)
    tardis_fx.release(copy.deepcopy(model), plan, x, folder=tmp_path)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for file, content in contents.items():
        file.unlink()  # the model above has mapped it
        file.write_bytes(damage(content))
    tardis_fx.release(model, plan, x, folder=tmp_path)
    assert torch.equal(model(x), before)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == contents


_MEMORY = """
import logging, sys, torch
from builders.ffns import config, inputs
import tardis_fx
from tardis_fx.resident import resident_bytes

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
how, path = sys.argv[1:]
model = torch.nn.Sequential(torch.nn.Linear(512, 20_000), torch.nn.ReLU(), torch.nn.Linear(20_000, 512)).eval()
plan = tardis_fx.calibrate(model, [inputs(64, 512)], config=config(method="drop_ffn", budget=0.5))
if how == "mapped":
    torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, mmap=True), assign=True)
held = [parameter.detach() for parameter in model.parameters()] if how == "held" else []
tardis_fx.explain(model, plan, inputs(8, 512))  # loads what a capture needs, which would count against release
before = resident_bytes(torch.device("cpu"))
print("freed", tardis_fx.release(model, plan, inputs(8, 512), folder=path if how == "folder" else None))
print("measured", before - resident_bytes(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is measured there")
@pytest.mark.parametrize("how", ["gone", "folder", "held", "mapped"])
def test_what_the_process_gave_back_is_measured(how: str, tmp_path: Path) -> None:
    path, tests = tmp_path / "file", Path(__file__).parent
    told = subprocess.run(
        [sys.executable, "-c", _MEMORY, how, str(path)],
        capture_output=True,
        text=True,
        check=True,
        # glibc would keep freed blocks of half a matrix for later, some of the time, if it did not map each
        env=os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "MALLOC_MMAP_THRESHOLD_": "1000000"},
    ).stdout
    freed, measured = (int(re.findall(rf"^{what} (-?\d+)$", told, re.MULTILINE)[0]) for what in ("freed", "measured"))
    size = 2 * 4 * 512 * 20_000
    assert freed == (0 if how == "mapped" else size)
    (logged,) = (int(number.replace(",", "")) for number in re.findall("as measured: (-?[0-9,]+) bytes", told))
    if how in ("gone", "folder"):
        assert 0.9 * size < logged < 1.1 * size
        assert measured > size / 2, "from outside"
    assert ("something else holds them" in told) == (how == "held")
    assert (f"were mapped from {path}" in told) == (how == "mapped")
