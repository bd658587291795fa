"""
A sweep over the quantiser's d, S and K (section 4.2): any number of workers, on one machine or many, share a folder
and each takes the next configuration that is neither done nor with another worker.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path

from diffusers_pq.evaluation.tables import read_results
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import trained_unlike, unlike
from diffusers_pq.training.pqgan import PQGANOptions


logger = logging.getLogger(__name__)

_EVALUATIONS = "evaluations.json"
_RENEWALS = 10  # of a claim, within the time that makes it stale


@dataclass(frozen=True)
class Configuration:
    """
    Args:
        latent_channels (`int`): d.
        num_subspaces (`int`): S.
        codebook_size (`int`): K.
    """

    latent_channels: int
    num_subspaces: int
    codebook_size: int

    def __str__(self) -> str:
        return f"d{self.latent_channels}-s{self.num_subspaces}-k{self.codebook_size}"


def grid(
    latent_channels: Iterable[int], num_subspaces: Iterable[str], codebook_sizes: Iterable[int]
) -> list[Configuration]:
    """
    All combinations, each once.

    Args:
        latent_channels: Values of d.
        num_subspaces: Values of S, such as `"1"`, `"d/8"` and `"d"`. Shares of d below 1 (d/8 of d = 4) are left out.
        codebook_sizes: Values of K.

    Raises:
        ValueError: if a value of S is malformed or does not divide a d.
    """
    found = {}
    for channels, text, size in product(latent_channels, num_subspaces, codebook_sizes):
        subspaces = _parse_subspaces(text, channels)
        if subspaces >= 1:
            found[Configuration(channels, _check_divides(subspaces, text, channels), size)] = None
    return list(found)


def _parse_subspaces(text: str, channels: int) -> Fraction:
    first, _, divisor = text.partition("/")
    try:
        return Fraction(channels if first == "d" else int(first), int(divisor or 1))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'`num_subspaces` must be numbers, "d" or such as "d/8", but has {text!r}.') from None


def _check_divides(subspaces: Fraction, text: str, channels: int) -> int:
    if subspaces.denominator > 1 or channels % subspaces.numerator:
        raise ValueError(
            f"`num_subspaces` {text} is not a divisor of `latent_channels` {channels}: leave one of them out."
        )
    return subspaces.numerator


class ClaimLostError(RuntimeError):
    """Another worker has taken over, since the claim was not renewed in time."""


class Claim:
    """
    A worker's right to a folder, held by at most one at a time, also on a network file system.

    It is a file `claim-<n>` that the worker touches again and again. The next worker takes over by the file n + 1: it
    can be created only once, and no file is ever removed, so that of several workers one gets it.

    Args:
        path (`Path`): The file; [`Claim.take`] makes it.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def take(cls, folder: Path, timeout: float) -> "Claim | None":
        """The claim on a folder, or `None` if another worker has renewed one within `timeout` seconds."""
        folder.mkdir(parents=True, exist_ok=True)
        newest = cls._newest(folder)
        if newest is not None and _file_time(folder) - newest.stat().st_mtime < timeout:
            return None
        path = folder / f"claim-{0 if newest is None else cls._number(newest) + 1}"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        except FileExistsError:
            return None
        return cls(path)

    @classmethod
    def _newest(cls, folder: Path) -> Path | None:
        return max(folder.glob("claim-*"), key=cls._number, default=None)

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.name.removeprefix("claim-"))

    def renew(self):
        """
        Raises:
            ClaimLostError: if another worker has taken over.
        """
        if self._newest(self.path.parent) != self.path:
            raise ClaimLostError(f"Another worker has taken over {self.path.parent}.")
        os.utime(self.path)

    def release(self):
        """Let others take over at once."""
        os.utime(self.path, (0, 0))


def _file_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of the folder, which may be a server's."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return os.stat(file.name).st_mtime


@dataclass
class Sweep:
    """
    Trains and evaluates configurations, each in its own folder `<output_dir>/d<d>-s<S>-k<K>`.

    Args:
        output_dir (`Path`): Shared by all workers.
        model_config (`dict`): Config of a [`PQModel`], of which d, S and K are varied.
        train_command (`list[str]`): Starts `train_pqgan.py`, with all flags but those of model, output and resuming.
        evaluation_command (`list[str]`): Starts `evaluate_reconstruction.py`, without flags.
        evaluations (`list[list[str]]`): Its flags, likewise, for one dataset each.
        claim_timeout (`float`): Seconds after which a worker that gives no sign of life is replaced. Ten minutes or
            more on a network file system, whose caches may hide signs of life for a minute.
    """

    output_dir: Path
    model_config: dict
    train_command: list[str]
    evaluation_command: list[str]
    evaluations: list[list[str]]
    claim_timeout: float = 600.0

    def folder(self, configuration: Configuration) -> Path:
        return self.output_dir / str(configuration)

    def is_done(self, configuration: Configuration) -> bool:
        """Whether all evaluations have written their results."""
        return len(read_results(self.folder(configuration) / "evaluation")) >= len(self.evaluations)

    def model_config_of(self, configuration: Configuration) -> dict:
        return self.model_config | asdict(configuration)

    def check_earlier_runs(self, configurations: Sequence[Configuration], train_flags: dict):
        """
        Raises:
            ValueError: if a configuration was trained with another model or other flags, or evaluated otherwise, which
                would make the results incomparable.
        """
        for configuration in configurations:
            folder = self.folder(configuration)
            _check_same(folder / "model_config.json", unlike, self.model_config_of(configuration))
            # Machines may differ: one with more processes takes fewer crops in each.
            _check_same(folder / "training_config.json", partial(trained_unlike, PQGANOptions), train_flags)
            self._check_evaluations(folder / _EVALUATIONS)

    def _check_evaluations(self, path: Path):
        """More evaluations than before may be asked for, but not others."""
        earlier = read_json(path) if path.is_file() else []
        if missing := [" ".join(flags) for flags in earlier if flags not in self.evaluations]:
            raise ValueError(
                f"{path.parent} was evaluated with {'; '.join(missing)}: ask for that too, choose another "
                "`--output_dir`, or remove the folder."
            )

    def run(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """
        Work until all configurations are done, failed here, or with other workers that are alive.

        Returns:
            `list[Configuration]`: those that failed here; what their commands wrote is in their `log.txt`.
        """
        failed = []
        idle_since = time.monotonic()
        while pending := [one for one in configurations if one not in failed and not self.is_done(one)]:
            free = self._claim_first_free(pending)
            if free is not None:
                if not self._run_claimed(*free):
                    failed.append(free[0])
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since <= self.claim_timeout:
                time.sleep(self.claim_timeout / _RENEWALS)
            else:  # whoever died before this worker fell idle has been replaced
                logger.info("With other workers: %s", ", ".join(map(str, pending)))
                break
        return failed

    def _claim_first_free(self, pending: list[Configuration]) -> tuple[Configuration, Claim] | None:
        for configuration in pending:
            claim = Claim.take(self.folder(configuration), self.claim_timeout)
            if claim is None:
                continue
            if not self.is_done(configuration):
                return configuration, claim
            claim.release()
        return None

    def _run_claimed(self, configuration: Configuration, claim: Claim) -> bool:
        """Whether it was done, or taken over by another worker."""
        logger.info("%s: started", configuration)
        try:
            self._train_and_evaluate(configuration, claim)
        except ClaimLostError as error:
            logger.warning(error)
        except subprocess.CalledProcessError as error:
            logger.error("%s failed, see %s: %s", configuration, self.folder(configuration) / "log.txt", error)
            return False
        finally:
            claim.release()
        logger.info("%s: finished", configuration)
        return True

    def _train_and_evaluate(self, configuration: Configuration, claim: Claim):
        folder = self.folder(configuration)
        config = folder / "model_config.json"
        write_json(config, self.model_config_of(configuration))
        train = ["--model_config_name_or_path", config, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
        self._call([*self.train_command, *train], folder / "log.txt", claim)
        write_json(folder / _EVALUATIONS, self.evaluations)
        for flags in self.evaluations:
            evaluate = ["--pretrained_model_name_or_path", folder, "--output_dir", folder / "evaluation"]
            self._call([*self.evaluation_command, *flags, *evaluate], folder / "log.txt", claim)

    def _call(self, command: list, log: Path, claim: Claim):
        """Run a command to its end, the claim renewed meanwhile."""
        command = [str(part) for part in command]
        with log.open("a", encoding="utf-8") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "preexec_fn": _die_with_parent}
            process = subprocess.Popen(command, **options, start_new_session=True)
        try:
            while process.poll() is None:
                claim.renew()
                _wait(process, self.claim_timeout / _RENEWALS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # what a launcher has started, too
                process.wait()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def _wait(process: subprocess.Popen, seconds: float):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def _die_with_parent():
    """On Linux, a worker that is killed takes its training with it, which would else write beside the next worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _check_same(path: Path, compare: Callable[[dict, dict], dict], wanted: dict):
    if not path.is_file():
        return
    found = compare(read_json(path), wanted)
    if found:
        listed = "; ".join(f"{name} {there!r}, now {here!r}" for name, (there, here) in found.items())
        raise ValueError(
            f"{path.parent} was trained with {listed}: use the same flags, choose another `--output_dir`, or remove "
            "the folder."
        )
