"""Makes Dynamo trace code again, if that is safe."""

import sys
import threading
from types import CodeType, FrameType

from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import convert_frame
from torch._dynamo.symbolic_convert import InstructionTranslator

from tardis_fx.errors import ConfigError

#: Threads that have called graphs whose code may be forgotten.
CALLERS: set[int] = set()


class Retrace:
    """Makes Dynamo discard everything that it compiled for the code that it is now compiling."""

    def __init__(self) -> None:
        """Records the code; called while Dynamo compiles.

        Raises:
            ConfigError: Dynamo is not compiling.
        """
        try:
            self._code: CodeType = InstructionTranslator.current_tx().output.root_tx.f_code
        except AttributeError:
            raise ConfigError("without a plan, the backend must be called by torch.compile") from None

    def __call__(self) -> bool:
        """Discards the code and returns True, unless another thread may be about to run or compile it.

        Dynamo keeps compiled code in a structure that it frees with the code. A thread that looks up a graph in it, or
        that waits to compile one, has a pointer to it.
        """
        with convert_frame.compile_lock:
            frames = sys._current_frames()
            del frames[threading.get_ident()]
            if CALLERS & frames.keys() or any(map(_compiles, frames.values())):
                return False
            reset_code(self._code)
            return True


def _compiles(frame: FrameType | None) -> bool:
    """Whether a thread compiles, or waits to compile."""
    while frame is not None:
        if frame.f_code.co_filename == convert_frame.__file__:
            return True
        frame = frame.f_back
    return False
