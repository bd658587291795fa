"""What all training scripts do around their steps: devices, resuming, logs, checkpoints, the Hub, and dry runs."""

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import datasets
import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from ..files import write_json
from ..flags import as_flag, trained_unlike
from ..hub.run_card import write_run_card
from ..measuring import describe_machine, measure_peak_bytes, measure_seconds
from .checkpoints import checkpoint_step, find_checkpoint, load_checkpoint, read_record, save_checkpoint
from .norms import with_single_group_norms
from .options import DataOptions, OptimisationOptions, RunOptions, TrainingOptions
from .output_folder import SETTINGS, OutputFolder
from .uploads import BestModel, HubUploads


logger = logging.getLogger(__name__)

# Memory of usual cards in GB, and what of it a training can use: CUDA itself and gaps between tensors take the rest.
_CARDS = (24, 40, 80)
_USABLE = 0.92
_DRY_RUN_STEPS = 3  # whose median time is taken
_MOST_HELD_BACK = 256
# What makes up most of diffusers' autoencoders and UNets.
_REPEATED_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
_MOST_SHAPES = 128
_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
# Flags that together make the pictures of a step, and the number of steps, which are compared instead.
_MAKE_OTHERS = ("total_batch_size", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
# Of an optimiser's parameter groups: what flags say. The rest is state.
_GIVEN = ("initial_lr", "betas", "weight_decay")


def create_accelerator(
    optim: OptimisationOptions, run: RunOptions, kwargs_handlers: list | None = None
) -> Accelerator:
    """The accelerator of a run; also seeds all random generators and sets up logs."""
    _check_trackers(run.report_to)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every request of the Hub's client
    accelerator = Accelerator(
        # Epochs follow each other without a gap, and so does accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            optim.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # Schedulers take one step at each optimisation step, not one per process. No loader is prepared.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        mixed_precision=optim.mixed_precision,
        kwargs_handlers=kwargs_handlers,
        log_with=None if run.report_to == "none" else run.report_to.split(","),
        project_config=ProjectConfiguration(run.output_dir, str(Path(run.output_dir, run.logging_dir))),
    )
    optim.share_out_batch(accelerator.num_processes)
    # All batches have one size, so that cuDNN need find its fastest convolutions only once.
    torch.backends.cudnn.benchmark = True
    if optim.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.state.deepspeed_plugin is not None:  # which cannot see the batch size of a loader of our own
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = optim.train_batch_size
        precision = accelerator.mixed_precision
        if precision in _AUTOCAST:
            # DeepSpeed would otherwise cast the weights and refuse autocast, and latents are float32.
            config[precision] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": _AUTOCAST[precision]}
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    set_seed(optim.seed)
    return accelerator


def _check_trackers(report_to: str):
    """accelerate leaves out a tracker whose package is missing, without a word."""
    if report_to in ("none", "all"):
        return
    for name in report_to.split(","):
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted({*LOGGER_TYPE_TO_CLASS, "all", "none"}))
            raise ValueError(f"--report_to {name} is not known; known are {known}.")
        if name not in {tracker.value for tracker in get_available_trackers()}:
            raise ValueError(f"--report_to {name}: {name} is not installed. `pip install {name}`, or report to none.")


def build_lr_scheduler(optim: OptimisationOptions, optimizer: torch.optim.Optimizer):
    """`--lr_scheduler` over the whole run, after `--lr_warmup_steps`, for [`Accelerator.prepare`]."""
    # diffusers' "constant" passes over the warm-up without a word; its sibling without one is the same.
    name = "constant_with_warmup" if optim.lr_scheduler == "constant" else optim.lr_scheduler
    return get_scheduler(
        name, optimizer, num_warmup_steps=optim.lr_warmup_steps, num_training_steps=optim.max_train_steps
    )


class Trainer(Protocol):
    """
    What a run has to know of what it trains.

    Attributes:
        schedules (`list[tuple]`): Prepared optimisers, each with its scheduler.
        ema (`EMAModel`, *optional*): Registered for checkpoints.
    """

    schedules: list[tuple]
    ema: EMAModel | None


class TrainingRun:
    """
    The state of a run beside its models: the step it is at, and what it writes where. Unless it is a dry run, no other
    run can write into its folder until [`finish`].

    Args:
        options ([`TrainingOptions`])
        accelerator (`Accelerator`)
        best (`BestModel`): Keeps the best model of the validations.

    Attributes:
        step (`int`): Optimisation steps taken, those before a resumed checkpoint included.
        checkpoint (`Path`, *optional*): The one to resume from.

    Raises:
        ValueError: if the folder is another run's, or the checkpoint does not go with the options.
    """

    def __init__(self, options: TrainingOptions, accelerator: Accelerator, best: BestModel):
        self.options = options
        self.accelerator = accelerator
        self.best = best
        self.folder = OutputFolder(options.run.output_dir)
        self.checkpoint, self._earlier = _decide(accelerator, self._find_checkpoint)
        self.step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.uploads = None
        self._scores = self._earlier.get("scores")
        self._changes = self._earlier.get("changes", [])

    def _find_checkpoint(self) -> tuple[Path | None, dict]:
        """The checkpoint and its record, once the folder is this run's."""
        run = self.options.run
        if not run.dry_run:
            self.folder.lock()
            if run.resume_from_checkpoint is None and not run.overwrite_output_dir:
                self.folder.check_unused()
        checkpoint = find_checkpoint(run.output_dir, run.resume_from_checkpoint)
        if checkpoint is None:
            return None, {}
        earlier = read_record(checkpoint)
        if not earlier:
            logger.warning("%s does not tell its settings: nobody can say if these are the same.", checkpoint)
            return checkpoint, {}
        self.options.check_resuming(earlier["settings"])
        now = self.options.optim.pictures_per_step(self.accelerator.num_processes)
        if now != earlier["pictures_per_step"]:
            raise ValueError(
                f"--train_batch_size {self.options.optim.train_batch_size}: with {self.accelerator.num_processes} "
                f"processes that makes {now} pictures a step, but {checkpoint} was written with "
                f"{earlier['pictures_per_step']}, which a resumed run has to keep: give --total_batch_size "
                f"{earlier['pictures_per_step']} instead."
            )
        return checkpoint, earlier

    def start(self, trainer: Trainer):
        """
        Load the checkpoint, once everything is prepared, and open the logs. What flags say of optimisers and averages
        holds from here on, whatever the checkpoint says.

        Raises:
            ValueError: if the checkpoint is of other models, or of more steps than are to be trained.
        """
        # Noise and timesteps differ between the processes; a checkpoint holds the state of each.
        set_seed(self.options.optim.seed, device_specific=True)
        if self.checkpoint is not None:
            self._load_checkpoint(trainer)
        if trainer.ema is not None:
            trainer.ema.to(self.accelerator.device)  # a resumed average comes on the CPU
        self.best.best = _decide(self.accelerator, self._make_room)
        self._progress = tqdm(
            total=self.options.optim.max_train_steps,
            initial=self.step,
            disable=not self.accelerator.is_local_main_process,
        )
        if not self.accelerator.is_main_process:
            return
        folder = self.folder.path
        write_json(folder / SETTINGS, self.options.settings())
        self.accelerator.init_trackers(self.options.run.tracker_project_name)
        if self.options.run.push_to_hub:
            repo_id = self.options.run.hub_model_id or folder.name
            self.uploads = HubUploads(repo_id, str(folder), self.options.run.hub_token)

    def _load_checkpoint(self, trainer):
        last = self.options.optim.max_train_steps
        if self.step > last:
            raise ValueError(
                f"--max_train_steps {last}: {self.checkpoint} is of a later step. Give at least {self.step}."
            )
        decay = trainer.ema and trainer.ema.decay
        given = [_given(*schedule) for schedule in trainer.schedules]
        load_checkpoint(self.accelerator, self.checkpoint)
        for schedule, own in zip(trainer.schedules, given):
            _give(*schedule, *own)
        if trainer.ema is not None:
            trainer.ema.decay = decay
        logger.info("Resumed from %s", self.checkpoint)
        if self.is_finished:
            logger.info("It was the last: all %d steps have been trained.", last)

    def _make_room(self) -> float | None:
        """Leave nothing of another run in the folder; returns the best score of this one."""
        changed = {}
        if self._earlier:
            found, now = self._earlier["settings"], self.options.settings()
            changed = trained_unlike(type(self.options), found, now, between_machines=False, own=_MAKE_OTHERS)
        if changed:
            before = {name: before for name, (before, _) in changed.items()}
            self._changes = [*self._changes, {"until_step": self.step, "settings": before}]
            listed = "; ".join(
                f"{as_flag(name, now)}, before {as_flag(name, old)}" for name, (old, now) in changed.items()
            )
            logger.warning("Goes on with other flags: %s", listed)
        goes_on = self.options.run.resume_from_checkpoint == "latest" and not any(map(self._alters_course, changed))
        self.folder.make_room(self.checkpoint, keep_best=goes_on)
        return self.best.restore()

    def _alters_course(self, name: str) -> bool:
        """Whether the steps after a checkpoint are others if this flag is."""
        if name == "max_train_steps":
            return not self.options.optim.lr_scheduler.startswith("constant")
        return self.options.flags()[name].metadata["differs"] == "never"

    @property
    def is_finished(self) -> bool:
        return self.step >= self.options.optim.max_train_steps

    def advance(self):
        """Count an optimisation step."""
        self.step += 1
        self._progress.update()

    def is_due(self, interval: int) -> bool:
        """Whether something that is done every `interval` steps is to be done now."""
        return self.step % interval == 0

    def log(self, logs: dict[str, float | torch.Tensor], shown: tuple[str, ...] = ("loss",)):
        """Log numbers, those in `shown` also beside the progress bar. Waits for the device."""
        logs = {name: float(value) for name, value in logs.items()}
        self._progress.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})
        self.accelerator.log(logs, step=self.step)

    def save_checkpoint(self):
        """To be called by all processes."""
        run = self.options.run
        record = {
            "settings": self.options.settings(),
            "pictures_per_step": self.options.optim.pictures_per_step(self.accelerator.num_processes),
            "scores": self._scores,
            "changes": self._changes,
        }
        save_checkpoint(self.accelerator, run.output_dir, self.step, run.checkpoints_total_limit, record)

    def log_scores(self, scores: dict[str, float]):
        """Log what a validation found, for the card too."""
        self._scores = {"step": self.step} | scores
        self.accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=self.step)
        if self.accelerator.is_main_process:
            logger.info("step %d: %s", self.step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def log_images(self, images: torch.Tensor, images_per_row: int):
        """Log a grid of uint8 pictures `[N, 3, H, W]`."""
        if not self.accelerator.is_main_process:
            return
        grid = make_grid(images, nrow=images_per_row).permute(1, 2, 0)[None].cpu().numpy()
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation/pictures": grid}, step=self.step, **options)

    def keep_if_best(self, save: Callable[[Path], object], scores: dict[str, float]):
        """
        Let a model whose score is the best yet be saved with its card, and start its upload; to be called by all
        processes.
        """
        is_main = self.accelerator.is_main_process
        if not self.best.offer(save, scores, self.step, is_main) or not is_main:
            return
        write_run_card(self.best.folder, self.options.settings(), self.step, self._scores, self._changes)
        if self.uploads is not None:
            self.uploads.start(self.best.folder, f"step {self.step}, the best yet")

    def finish(self, save: Callable[[Path], object]):
        """
        Write the trained model, and upload it. To be called by all processes.

        Args:
            save: Writes the model into the folder it is given; called by all processes.
        """
        self.accelerator.wait_for_everyone()
        folder = self.folder.path
        save(folder)
        if self.accelerator.is_main_process:
            write_run_card(folder, self.options.settings(), self.step, self._scores, self._changes)
            if self.uploads is not None and not self.uploads.upload(folder, f"step {self.step}"):
                logger.warning("Repeat it with `diffusers-pq push %s %s`.", folder, self.uploads.repo_id)
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self.folder.unlock()


def _given(optimizer, lr_scheduler) -> tuple[list[dict], list[float]]:
    """What flags say of an optimiser and its scheduler."""
    groups = [{name: group[name] for name in _GIVEN} for group in optimizer.param_groups]
    return groups, lr_scheduler.scheduler.base_lrs


def _give(optimizer, lr_scheduler, groups, base_lrs):
    """Let that hold again, and the rate of the schedule as it is now for the step that was loaded."""
    scheduler = lr_scheduler.scheduler
    scheduler.base_lrs = base_lrs
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base_lrs, scheduler.lr_lambdas)]
    for group, own, rate in zip(optimizer.param_groups, groups, scheduler._last_lr):
        group.update(own, lr=rate)


def _decide(accelerator: Accelerator, function: Callable):
    """What a function returns on the main process, or raises there, on all."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    value, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return value


def whole_module(accelerator: Accelerator, prepared: nn.Module, name: str) -> nn.Module:
    """
    A part of a prepared model with all its weights: the part itself or, where FSDP has sharded it, a copy. To be
    called by all processes; of a sharded model only the main process gets the weights.

    Args:
        accelerator (`Accelerator`)
        prepared (`nn.Module`): What `accelerator.prepare` returned.
        name (`str`): Of the part, an attribute of the model.
    """
    part = getattr(accelerator.unwrap_model(prepared), name)
    if accelerator.distributed_type != DistributedType.FSDP:
        return part
    state = accelerator.get_state_dict(prepared)
    is_diffusers = isinstance(part, ConfigMixin)
    copy = type(part).from_config(part.config) if is_diffusers else type(part)(part.config)
    if accelerator.is_main_process:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        copy.load_state_dict(own)
    return copy


class FiniteSteps:
    """
    Clips gradients and leaves out the steps whose gradient is not finite.

    Args:
        accelerator (`Accelerator`)
        max_norm (`float`, *optional*): Gradients are clipped to this norm; `None` does not clip.
        limit (`int`): So many steps left out in a row end the run.

    Attributes:
        skipped (`int`): Steps left out so far.
        in_a_row (`int`): Of these, those since the last good step.
    """

    def __init__(self, accelerator: Accelerator, max_norm: float | None = None, limit: int = 10):
        self.accelerator = accelerator
        self.max_norm = math.inf if max_norm is None else max_norm
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]):
        """
        Step and clear the gradients; while gradients are being accumulated, do nothing.

        Raises:
            FloatingPointError: at the `limit`-th step in a row without a finite gradient.
        """
        if not self.accelerator.sync_gradients:
            return
        # The same on all processes, since the gradients are; so all of them leave the step out.
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        finite = norm is None or math.isfinite(norm)  # DeepSpeed looks after that itself, and gives none
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        # Under fp16 the scaler leaves the step out itself, and must see it to lower its scale.
        if finite or self.accelerator.scaler is not None:
            optimizer.step()
        optimizer.zero_grad()
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"The gradient was not finite for {self.in_a_row} steps in a row. The last checkpoint is from before; "
                "resume from it with a lower learning rate, `--max_grad_norm` or `--mixed_precision bf16`."
            )


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hold the averaged weights in the parameters for a while; without an average, do nothing."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def count_steps(
    optim: OptimisationOptions,
    rows: datasets.Dataset | datasets.IterableDataset,
    pictures_per_batch: int,
    accelerator: Accelerator,
):
    """
    Set `max_train_steps` to those of `--num_train_epochs`, where that is given.

    Raises:
        ValueError: if the rows are a stream, whose length is unknown.
    """
    if optim.num_train_epochs is None:
        return
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError("--num_train_epochs: a stream does not say how long it is; give --max_train_steps.")
    pictures_per_step = pictures_per_batch * optim.gradient_accumulation_steps * accelerator.num_processes
    optim.max_train_steps = math.ceil(optim.num_train_epochs * len(rows) / pictures_per_step)


def build_ema(optim: OptimisationOptions, accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> EMAModel:
    """The averages of `--ema_decay`, on the accelerator's device; to be registered for its checkpoints."""
    ema = EMAModel(parameters, decay=optim.ema_decay, use_ema_warmup=True)
    ema.to(accelerator.device)
    return ema


def complete_step(learn: Callable[[], dict | None]) -> dict[str, torch.Tensor]:
    """Learn from batches until an optimisation step is complete; `learn` takes one and returns the step's logs."""
    while True:
        logs = learn()
        if logs is not None:
            return logs


def load_split(data: DataOptions, split: str, *columns: str) -> datasets.Dataset | datasets.IterableDataset | None:
    """A split with the pictures and further columns; see [`~diffusers_pq.data.pictures.PictureSource.load`]."""
    return data.source.load(split, *columns)


def load_train_split(data: DataOptions, *columns: str) -> datasets.Dataset | datasets.IterableDataset:
    """
    [`load_split`] of what is trained on, but for what is held back for the validation; a `ValueError` if there is
    none.
    """
    rows, held_back = _load_train_split(data, *columns)
    if rows is None:
        raise ValueError("The dataset has no `train` split.")
    if held_back:
        rows = rows.select(sorted(set(range(len(rows))) - set(held_back)))
    return first_samples(rows, data.max_train_samples)


def load_validation_split(data: DataOptions, *columns: str) -> datasets.Dataset | datasets.IterableDataset | None:
    """
    [`load_split`] of what is validated on: the `validation` split, or else a share of the pictures that is held back
    from the training. `None`, and a warning, if there is neither.
    """
    images = load_split(data, "validation", *columns)
    if images is not None:
        return images
    rows, held_back = _load_train_split(data, *columns)
    if not held_back:
        logger.warning("The dataset has no `validation` split, and none is held back of it: no validation.")
        return None
    logger.info("No `validation` split: %d of %d pictures are held back for it.", len(held_back), len(rows))
    return rows.select(held_back)


def first_samples(
    rows: datasets.Dataset | datasets.IterableDataset, limit: int | None
) -> datasets.Dataset | datasets.IterableDataset:
    """`--max_train_samples` of the rows: a random choice, always the same; of a stream the first."""
    if isinstance(rows, datasets.IterableDataset):
        return rows if limit is None else rows.take(limit)
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(sorted(random.Random(0).sample(range(len(rows)), limit)))


def _load_train_split(data, *columns):
    """The rows of the `train` split, and the numbers of those that are held back, the same in every run."""
    rows = load_split(data, "train", *columns)
    if rows is None:
        return None, []
    # Neither a stream, whose length is unknown, nor cached codes, among which the pictures would have to be found.
    is_whole = not (data.streaming or getattr(data, "latents_dir", None)) and len(rows) > 1
    if not is_whole or data.validation_share == 0 or load_split(data, "validation") is not None:
        return rows, []
    count = min(_MOST_HELD_BACK, math.ceil(data.validation_share * len(rows)))
    return rows, sorted(random.Random(0).sample(range(len(rows)), count))


def prepare_model(optim: OptimisationOptions, model: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """
    A diffusers model in training mode, with what the flags on memory and speed ask for. `dynamic` is that of
    `torch.compile`: `False` is faster where all batches have one shape.
    """
    with_single_group_norms(model)
    if optim.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if optim.channels_last:
        model.to(memory_format=torch.channels_last)
    if optim.compile:
        compile_blocks(model, dynamic=dynamic)
    return model.train()


def compile_blocks(model: nn.Module, **options) -> list[nn.Module]:
    """
    Compile the blocks that a model repeats, in place, and those that are alike once: on an H200 the graph of a whole
    autoencoder with its gradients took more than a minute.

    Args:
        model (`nn.Module`): Of diffusers or of this package.
        options: For `torch.compile`.

    Returns:
        `list[nn.Module]`: What was compiled: the blocks or, if there are none, the model.
    """
    names = {*_REPEATED_BLOCKS, *(getattr(model, "_repeated_blocks", None) or ())}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    # Each shape counts as another compilation of the same code, of which torch allows few.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for module in blocks or [model]:
        module.compile(**options)
    return blocks or [model]


def share_out(rows: list[dict], accelerator: Accelerator) -> tuple[list[dict], int]:
    """
    This process's rows, and how many of them count. Processes get equally many, so that they make the same number of
    forward passes, which sharded models need; what fills up stands at the end and is not to be counted.
    """
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    missing = math.ceil(len(rows) / accelerator.num_processes) - len(mine)
    return mine + rows[:1] * missing, len(mine)


def dry_run(
    options: TrainingOptions,
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    take_step: Callable[[], object],
):
    """
    Print what a run would do and need; its steps are real, but nothing is written.

    Args:
        options ([`TrainingOptions`]): Printed as a recipe.
        accelerator (`Accelerator`)
        models (`dict[str, nn.Module]`): Whose parameters are counted, by name.
        optimizers (`list`): Whose state is part of the memory that is always held.
        take_step: One optimisation step.

    Raises:
        MemoryError: if a step does not fit; the message says what is needed at least.
    """
    device = str(accelerator.device)
    learned = [value for optimizer in optimizers for group in optimizer.param_groups for value in group["params"]]
    gradients = sum(value.nbytes for value in learned if value.requires_grad)
    try:
        take_step()  # compiles, and allocates the optimisers' state
        peak = measure_peak_bytes(take_step, device)
        seconds = measure_seconds(take_step, _DRY_RUN_STEPS, device, warm_up=0)
    except torch.OutOfMemoryError as error:
        least = _held_bytes(models.values(), [], accelerator.device) + gradients
        raise MemoryError(f"weights and gradients alone take {least / 2**30:.2f} GiB; {error}") from error
    if not accelerator.is_main_process:
        return
    held = _held_bytes(models.values(), optimizers, accelerator.device)
    steps = options.optim.max_train_steps
    hours = seconds * steps / 3600
    given = {name: value for name, value in options.settings().items() if value is not None}
    print(yaml.safe_dump(given, sort_keys=False))
    for name, model in models.items():
        print(f"{name}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters")
    print(f"memory: {held / 2**30:.2f} GiB weights and optimiser states + {peak / 2**30:.2f} GiB within a step")
    print(fitting_batches(held, gradients, peak, options.optim.train_batch_size))
    print(f"time: {seconds:.3g} s a step, {hours:.3g} hours for {steps} steps")
    print(f"measured on {accelerator.num_processes} x {describe_machine(device)}")


def fitting_batches(held: int, gradients: int, peak: int, batch_size: int) -> str:
    """
    A line on the batches that fit on the `_CARDS`, by what one batch took.

    Args:
        held (`int`): Bytes that are held all the time.
        gradients (`int`): Bytes of the gradients, whatever the batch.
        peak (`int`): Bytes that a step took beyond `held`, its gradients included.
        batch_size (`int`): Of that step.
    """
    each = max(1, (peak - gradients) / batch_size)
    parts = []
    for size in _CARDS:
        count = int((_USABLE * size * 2**30 - held - gradients) / each)
        parts.append(f"{size} GB: {f'batches of up to {count}' if count > 0 else 'too small'}")
    return f"cards, by the batch of {batch_size} that was measured: {', '.join(parts)}"


def _held_bytes(models, optimizers, device) -> int:
    """What waits on another device is not counted."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
