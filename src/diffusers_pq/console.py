"""What the console command and the scripts show: progress on terminals alone, and an expected error in one line."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


# If set, expected errors show their traceback too.
_TRACEBACK = "DIFFUSERS_PQ_TRACEBACK"

# What bad input, a missing file or package, a broken connection or an overflow raises; and likewise of libraries, as
# far as they have been imported.
_EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError)
_EXPECTED_OF = {
    "datasets.exceptions": "DatasetsError",
    "httpx": "HTTPError",  # of the Hub's client, whose later versions have the next
    "httpx2": "HTTPError",
    "huggingface_hub.errors": "StrictDataclassError",
    "pickle": "PickleError",
    "safetensors": "SafetensorError",
    "subprocess": "SubprocessError",
    "wandb.errors": "Error",
    "yaml": "YAMLError",
    "zipfile": "BadZipFile",
}
# Torch tells these from programming errors by their texts alone.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
_NO_DEVICE = ("NVIDIA driver", "CUDA-capable device", "not compiled with CUDA", "invalid device ordinal")
_ADVICE = "Try smaller pictures or batches, another device or, in training, `--gradient_checkpointing`."

# A launcher ends all processes of a run soon after one of them has failed.
_SECONDS_OF_GRACE = 5.0


@contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Ends a script as [`report`] says when an error is raised within, and quietly with status 130 on Ctrl+C; its
    progress bars are those of [`progress_on_terminals`].
    """
    try:
        with progress_on_terminals():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(report(error, Path(sys.argv[0]).name))


@contextmanager
def progress_on_terminals() -> Iterator[None]:
    """
    Within it, all progress bars, those of other libraries too, are hidden unless stderr is a terminal: a log file
    would get a line of each of their states.
    """
    if sys.stderr.isatty():
        yield
        return
    show = tqdm.__init__

    def hide(self, *args, **options):
        show(self, *args, **options | {"disable": True})

    tqdm.__init__ = hide
    try:
        yield
    finally:
        tqdm.__init__ = show


def report(error: Exception, program: str) -> int:
    """
    Print one line on stderr for an error that bad input, the machine or the network can cause. Of the processes of a
    distributed run the main one does so; another only if the main one has not failed too.

    Args:
        error (`Exception`): Raised again if it is a fault of the program, or the environment variable
            `DIFFUSERS_PQ_TRACEBACK` is set.
        program (`str`): Stands before the line.

    Returns:
        `int`: 1, the exit status.
    """
    line = explain(error)
    if line is None or os.environ.get(_TRACEBACK):
        raise error
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(_SECONDS_OF_GRACE)
        program = f"{program} (process {rank})"
    tqdm.write(f"{program}: {line}", file=sys.stderr)  # on a line of its own, also beside an unfinished progress bar
    sys.stderr.flush()
    return 1


def explain(error: Exception) -> str | None:
    text = str(error)
    if "DataLoader worker process" in text:  # what torch raises in the main process quotes the worker's traceback
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2] or text
    text = " ".join(text.split())  # the messages of other libraries can run over several lines
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return f"out of memory. {_ADVICE}" + (f" ({text})" if text else "")
    if any(sign in text for sign in _NO_DEVICE):
        return text
    others = (getattr(sys.modules.get(module), name, ()) for module, name in _EXPECTED_OF.items())
    return (text or type(error).__name__) if isinstance(error, (*_EXPECTED, *others)) else None
