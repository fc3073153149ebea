"""Progress of a measurement that takes minutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Gives a function that shows a finished step: as a bar on a terminal, and as a line where output is redirected."""
    if not console.is_terminal:
        yield lambda step: console.print(step, markup=False, highlight=False)
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda step: progress.update(task, description=step, advance=1)
