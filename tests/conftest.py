"""Settings that every test shares."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # for `builders`: pytest's importlib mode adds nothing

settings.register_profile("dev", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=500)  # pytest --hypothesis-profile thorough
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Else pytest shows hundreds of empty lines under every failure.
logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
# Remarks on the tiny configs (special tokens beyond the vocabulary) are no news.
logging.getLogger("transformers").setLevel(logging.ERROR)

#: Warnings of third parties that nothing here causes; all others are errors (pyproject.toml).
THIRD_PARTY = [
    # Inductor imports torch.utils.mkldnn, which uses what torch itself deprecates.
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning",
    # Dynamo makes an instance of BLOOM's GeLUFunction.
    r"ignore:<class 'torch\.autograd\.function\.Function'> should not be instantiated:DeprecationWarning",
    # transformers asks in Wav2Vec2's forward whether torch.distributed is there, and keeps the answer.
    r"ignore:Dynamo detected a call to a `functools\.lru_cache`:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """What one test compiles, another does not find."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
