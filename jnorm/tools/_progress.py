"""A progress bar, for those who ask for one."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(shown: bool, what: str, total: int | None = None, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives a function that says how many more are done. It goes to the standard error, where no output is mixed with it.

    Args:
      shown: False for none.
      what: is done.
      total: of how many; None: not known.
      of_bytes: they are bytes, and not batches or the like.
    """
    if not shown:
        yield lambda number: None
        return
    try:
        from rich import console, progress
    except ImportError as e:
        raise ImportError('progress=True needs rich, which the extra has: python -m pip install "jnorm[examples]".') from e
    number = progress.DownloadColumn() if of_bytes else progress.MofNCompleteColumn()
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), number, *times)
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)
