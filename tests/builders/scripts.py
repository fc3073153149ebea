"""Scripts of the repository as modules: benchmarks and examples are in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_script(path: str) -> ModuleType:
    """Runs a script whose path is relative to the repository, but not its main function."""
    file = Path(__file__).parents[2] / path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # where Python finds the modules next to a script
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
