"""A process that has this environment's packages, but not `diffusers_pq`."""

import json
import os
import subprocess
import sys


# Without `site`, whose .pth files lead to the sources of what is installed for development; and isolated, so that
# neither the working directory nor PYTHONPATH is searched.
_FLAGS = ["-I", "-S"]
_PRELUDE = """
import importlib.util
import sys

sys.path += {packages!r}
assert importlib.util.find_spec("diffusers_pq") is None, "must not be importable here"
"""


def run_alone(code: str, **environment: str) -> object:
    """Run code there; what it prints last, if anything, is read as JSON."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"} | environment
    command = [sys.executable, *_FLAGS, "-c", _PRELUDE.format(packages=packages) + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None
