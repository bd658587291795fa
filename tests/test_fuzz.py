"""
Damaged input ends in a line: no traceback, no hang, no more than a GiB.

`make fuzz` runs many more cases, with seeds of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FUZZING = Path(__file__).with_name("fuzzing.py")
COUNT = int(os.environ.get("FUZZ_COUNT", 120))
SEED = int(os.environ.get("FUZZ_SEED", 0))


@pytest.mark.parametrize("kind", ["pictures", "compressed", "models", "checkpoints"])
def test_damaged_input_ends_in_a_line(kind):
    command = [sys.executable, str(FUZZING), kind, "--seed", str(SEED), "--count", str(COUNT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60 + COUNT)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
