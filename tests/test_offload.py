"""Calibration one FFN after the other: less memory, the same plan."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.ffns import Block, batches, config, ffn
from builders.offload import HIDDEN, SITES, D
from torch import nn

from tardis_fx import CheckpointError, ConfigError, Plan, calibrate
from tardis_fx.guarded_fold.guards import Interval
from tardis_fx.testing.assertions import contents


def model(sites: int = 3) -> nn.Module:
    return nn.Sequential(*(Block(ffn(seed=i)) for i in range(sites))).eval()


def planned(given: nn.Module, *, offload: bool = True, checkpoint: Path | None = None, **changed: Any) -> Plan:
    return calibrate(given, batches(), config=config(**changed), checkpoint=checkpoint, offload=offload)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_statistics_of_all_sites_together_are_never_in_memory(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "builders.offload", str(tmp_path)]
    told = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, text=True)
    highest = json.loads(told.stdout)
    histogram, moments, regression, predictor = 6 * Interval.bins * HIDDEN * 8, 8 * D**2, 8 * 4 * D**2, 4 * HIDDEN * D
    most = 3 / 4 * SITES * (histogram + moments + regression + predictor)  # other needs come and go in both
    assert highest["offload"] < most < highest["together"], (highest, most)
    assert contents(Plan.load(tmp_path / "offload")) == contents(Plan.load(tmp_path / "together"))


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "partial_linear"},
        {"fold_bits": None, "row_bits": None},
        {"method": "paper", "budget": 0.9},
        {"method": {"0.*": "drop_bias+low_rank", "1.*": None, "*": "wanda"}},
    ],
    ids=str,
)
def test_the_plan_is_that_of_equal_shares(chosen: dict[str, Any]) -> None:
    given = model()
    together = planned(given, offload=False, allocation="per_site", **chosen)
    assert contents(planned(given, **chosen)) == contents(together)


@pytest.mark.parametrize(
    "chosen",
    [
        {"sequential": True},
        {"target_error": 0.3},
        {"method": "linear_replace"},
        {"method": "share_ffn"},
        {"method": "linear_replace+int8_ffn"},
        {"method": {"0.*": "wanda", "*": "drop_ffn"}},
    ],
    ids=str,
)
def test_what_needs_all_ffns_at_once_is_refused_before_the_model_runs(chosen: dict[str, Any]) -> None:
    given, ran = model(), list[int]()
    given.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match="offload"):
        planned(given, **chosen)
    assert not ran


def test_an_interrupted_calibration_goes_on_at_its_ffn(tmp_path: Path) -> None:
    given = model(2)
    whole = planned(given, checkpoint=tmp_path)
    runs = sorted(tmp_path.iterdir())
    assert len(runs) == 2 * 3
    written = [run.stat().st_mtime_ns for run in runs]
    for run in runs[4:]:
        run.unlink()
    assert contents(planned(given, checkpoint=tmp_path)) == contents(whole)
    assert [run.stat().st_mtime_ns for run in runs[:4]] == written[:4]
    assert sorted(tmp_path.iterdir()) == runs
    with pytest.raises(CheckpointError):
        planned(given, offload=False, checkpoint=tmp_path, allocation="per_site")
