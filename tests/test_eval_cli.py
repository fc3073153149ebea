"""The command ``tardis eval``."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.checkpoints import save_checkpoint
from builders.models import gpt2, tokens
from torch import nn
from typer.testing import CliRunner

from tardis_fx import Config, ConfigError, Plan, PlanFileError, PlanMismatchError, TardisError, calibrate
from tardis_fx.cli import evaluate
from tardis_fx.cli.main import app
from tardis_fx.demo.model import cut
from tardis_fx.errors import CalibrationError, DemoError
from tardis_fx.measure.quality import DenseReference, rewrite_every_token

TEXT = tokens(1000, seed=1)


def model(layers: int = 2) -> Any:
    return gpt2(layers).bfloat16()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, a tokenizer, a text, and a plan of other text."""
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, model(), TEXT)
    batches = list(tokens(16, 64).split(8))
    calibrate(model(), batches, config=Config(method="wanda", bits=9.6, progress=False)).save(path / "plan")
    return path


def told(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def rows_of(output: str) -> dict[str, dict[str, str]]:
    """The cells of the table by row and heading."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if "|" in line]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_table_tells_the_quality_and_the_bytes_of_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Plan] = []

    def noted(dense: nn.Module, plan: Plan) -> Any:
        compiled.append(plan)
        return rewrite_every_token(dense, plan)

    monkeypatch.setattr(evaluate, "rewrite_every_token", noted)
    output = told(folder, folder / "plan", folder / "text.txt", "--windows", 9)
    rows, plan = rows_of(output), Plan.load(folder / "plan")
    assert len(compiled) == 1
    reference = DenseReference(model(), cut(TEXT, 9, 64))
    quality = reference.quality(rewrite_every_token(model(), plan))
    assert rows["dense"] | {"perplexity": ""} == {
        "": "dense", "perplexity": "", "rise": "+0.00%", "next token as dense": "100.0%", "KL to dense, nats": "0.0000",
        "bits per FFN weight": "16", "FFN bytes per token": "100.0%",
    }  # fmt: skip
    assert rows["dense"]["perplexity"] == f"{reference.dense.perplexity:.3f}"
    assert rows["plan"] == {
        "": "plan", "perplexity": f"{quality.perplexity:.3f}", "rise": f"{quality.rise:+.2%}",
        "next token as dense": f"{quality.agreement:.1%}", "KL to dense, nats": f"{quality.kl:.4f}",
        "bits per FFN weight": f"{plan.touched_bits:.3g}", "FFN bytes per token": f"{plan.touched_fraction:.1%}",
    }  # fmt: skip
    assert float(rows["plan"]["bits per FFN weight"]) == pytest.approx(9.6, rel=0.05)
    assert re.search(r"576 tokens of .*text\.txt in 9 windows", output)


def test_a_plan_that_keeps_everything_is_the_dense_model(folder: Path, tmp_path: Path) -> None:
    whole = Config(method="low_rank", budget=1.0, progress=False)
    calibrate(model().float(), [tokens(4, 64)], config=whole).save(tmp_path / "plan")
    rows = rows_of(told(folder, tmp_path / "plan", folder / "text.txt", "--windows", 2, "--dtype", "float32"))
    dense, plan = ({name: cell for name, cell in rows[row].items() if name not in ("", "rise")} for row in rows)
    assert dense == plan  # the rise may be -0.00%
    assert rows["plan"]["bits per FFN weight"] == "32"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"model": "nowhere"}, DemoError),
        ({"plan": "nowhere"}, PlanFileError),
        ({"text": "nowhere"}, CalibrationError),
        ({"more": ("--windows", "0")}, ConfigError),
        ({"more": ("--dtype", "float32")}, PlanMismatchError),
        ({"more": ("--device", "cuda")}, ConfigError),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_a_typed_error(changed: dict[str, Any], error: type[TardisError], folder: Path) -> None:
    if "cuda" in changed.get("more", ()) and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    chosen: dict[str, Any] = {
        "model": folder,
        "plan": folder / "plan",
        "text": folder / "text.txt",
        "more": (),
    } | changed
    with pytest.raises(error):
        told(chosen["model"], chosen["plan"], chosen["text"], *chosen["more"])
