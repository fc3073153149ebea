"""Calibration leaves nothing behind."""

import gc
import weakref

from builders.ffns import config, ffn, inputs

import tardis_fx
from tardis_fx.observation.observe import BatchObservation


def test_an_observation_and_what_it_measured_end_with_the_calibration() -> None:
    model = ffn(16, 64)
    observation = BatchObservation(model, [inputs(64, 16)], progress=False)
    known = weakref.ref(observation)
    del observation
    gc.collect()
    assert known() is None


def test_a_model_ends_after_it_was_calibrated() -> None:
    model = ffn(16, 64)
    tardis_fx.calibrate(model, [inputs(64, 16)], config=config(budget=0.6))
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
