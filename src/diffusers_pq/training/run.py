"""What all training scripts do around their steps: devices, resuming, logs, checkpoints, the Hub, and dry runs."""

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator
from accelerate.utils import (
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

from ..data.pictures import load_images
from ..hub.cards import build_card, hub_id, save_card
from ..measuring import describe_machine, measure_peak_bytes, measure_seconds
from .checkpoints import checkpoint_step, find_checkpoint, save_checkpoint
from .uploads import BestModel, HubUploads


logger = logging.getLogger(__name__)

_DRY_RUN_STEPS = 3  # whose median time is taken


def create_accelerator(args: argparse.Namespace, kwargs_handlers: list | None = None) -> Accelerator:
    """The accelerator of a run with the flags of `options.py`; also seeds all random generators and sets up logs."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every request of the Hub's client
    accelerator = Accelerator(
        # Epochs follow each other without a gap, and so does accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        kwargs_handlers=kwargs_handlers,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.state.deepspeed_plugin is not None:  # which cannot see the batch size of a loader of our own
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    set_seed(args.seed)
    return accelerator


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_processes: int):
    """`--lr_scheduler` over the whole run, after `--lr_warmup_steps`, for [`Accelerator.prepare`]."""
    # diffusers' "constant" passes over the warm-up without a word; its sibling without one is the same.
    name = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
    # The schedulers of accelerate take one step per process at each optimisation step.
    warm_up, steps = args.lr_warmup_steps * num_processes, args.max_train_steps * num_processes
    return get_scheduler(name, optimizer, num_warmup_steps=warm_up, num_training_steps=steps)


class TrainingRun:
    """
    The state of a run beside its models: the step it is at, and what it writes where.

    Args:
        args (`argparse.Namespace`): With the flags of `add_run_arguments`.
        accelerator (`Accelerator`)
        best (`BestModel`, *optional*): Keeps the best model of the validations.

    Attributes:
        step (`int`): Optimisation steps taken, those before a resumed checkpoint included.
        checkpoint (`Path`, *optional*): The one to resume from.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, best: BestModel | None = None):
        self.args = args
        self.accelerator = accelerator
        self.best = best
        self.checkpoint = _decide(accelerator, lambda: find_checkpoint(args.output_dir, args.resume_from_checkpoint))
        self.step = 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        self.uploads = None
        self._scores = None

    def start(self, ema: EMAModel | None = None):
        """Load the checkpoint, once everything is prepared, and open the logs."""
        # Noise and timesteps differ between the processes; a checkpoint holds the state of each.
        set_seed(self.args.seed, device_specific=True)
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
            logger.info("Resumed from %s", self.checkpoint)
        if ema is not None:
            ema.to(self.accelerator.device)  # a resumed average comes on the CPU
        self._progress = tqdm(
            total=self.args.max_train_steps, initial=self.step, disable=not self.accelerator.is_local_main_process
        )
        if not self.accelerator.is_main_process:
            return
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        settings = json.dumps(_settings(self.args), indent=2) + "\n"
        Path(self.args.output_dir, "training_config.json").write_text(settings)
        self.accelerator.init_trackers("diffusers_pq")
        if self.args.push_to_hub:
            repo_id = self.args.hub_model_id or Path(self.args.output_dir).name
            self.uploads = HubUploads(repo_id, self.args.output_dir, self.args.hub_token)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.args.max_train_steps

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
        save_checkpoint(self.accelerator, self.args.output_dir, self.step, self.args.checkpoints_total_limit)

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
        """Let a model whose score is the best yet be saved, and start its upload; to be called by all processes."""
        is_main = self.accelerator.is_main_process
        if self.best.offer(save, scores, self.step, is_main) and self.uploads is not None:
            write_card(self.best.folder, self.args, self.step, self._scores)
            self.uploads.start(self.best.folder, f"step {self.step}, the best yet")

    def finish(self, save: Callable[[Path], object]):
        """
        Write the trained model, and upload it. To be called by all processes.

        Args:
            save: Writes the model into the folder it is given; called by all processes.
        """
        self.accelerator.wait_for_everyone()
        folder = Path(self.args.output_dir)
        save(folder)
        if self.accelerator.is_main_process:
            write_card(folder, self.args, self.step, self._scores)
            if self.uploads is not None and not self.uploads.upload(folder, f"step {self.step}"):
                logger.warning("Repeat it with `diffusers-pq push %s %s`.", folder, self.uploads.repo_id)
        self.accelerator.end_training()


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


def build_ema(args: argparse.Namespace, accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> EMAModel:
    """The averages of `--ema_decay`, on the accelerator's device; to be registered for its checkpoints."""
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True)
    ema.to(accelerator.device)
    return ema


def complete_step(learn: Callable[[], dict | None]) -> dict[str, torch.Tensor]:
    """Learn from batches until an optimisation step is complete; `learn` takes one and returns the step's logs."""
    while True:
        logs = learn()
        if logs is not None:
            return logs


def load_split(
    args: argparse.Namespace, split: str, *columns: str
) -> datasets.Dataset | datasets.IterableDataset | None:
    """A split with the pictures and further columns; see [`load_images`]."""
    source = args.dataset_name, args.train_data_dir, args.image_column, split
    return load_images(*source, args.dataset_config_name, args.cache_dir, args.streaming, other_columns=columns)


def load_train_split(args: argparse.Namespace, *columns: str) -> datasets.Dataset | datasets.IterableDataset:
    """[`load_split`] of what is trained on; a `ValueError` if there is none."""
    images = load_split(args, "train", *columns)
    if images is None:
        raise ValueError("The dataset has no `train` split.")
    return images


def prepare_model(args: argparse.Namespace, model: nn.Module, compiled: tuple[nn.Module, ...] = ()) -> nn.Module:
    """
    A diffusers model in training mode, with what the flags on memory and speed ask for; `--compile` is for the parts
    in `compiled`, or for the whole model.
    """
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        for module in compiled or (model,):
            module.compile()
    return model.train()


def share_out(rows: list[dict], accelerator: Accelerator) -> tuple[list[dict], int]:
    """
    This process's rows, and how many of them count. Processes get equally many, so that they make the same number of
    forward passes, which sharded models need; what fills up stands at the end and is not to be counted.
    """
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    missing = math.ceil(len(rows) / accelerator.num_processes) - len(mine)
    return mine + rows[:1] * missing, len(mine)


# In the template, beside what removing it means.
_GENERATED = "<!-- Written by the training script"


def write_card(folder: Path, args: argparse.Namespace, step: int, scores: dict[str, float] | None):
    """
    A model card with the settings and results of the run, unless there is one that somebody has edited.

    Args:
        folder (`Path`): With the trained model.
        args (`argparse.Namespace`): Of the run.
        step (`int`): After which the model was saved.
        scores (`dict`, *optional*): Of the last validation, with its `step`.
    """
    path = folder / "README.md"
    if path.is_file() and _GENERATED not in path.read_text(encoding="utf-8"):
        return
    dataset = args.dataset_name or args.train_data_dir
    names = ("pretrained_model_name_or_path", "backbone_name_or_path", "vae_name_or_path")
    metadata = {
        "base_model": [base for name in names if (base := hub_id(getattr(args, name, None)))] or None,
        "datasets": [args.dataset_name] if hub_id(args.dataset_name) else None,
        "tags": ["diffusers", "diffusers_pq", "diffusers-training"],
    }
    facts = {"dataset_type": hub_id(dataset) or "imagefolder", "dataset_name": Path(dataset).name}
    validation = {"dataset": facts, "scores": {"this model": scores}}
    validation["note"] = f"On {args.num_validation_images} pictures of the validation split, or as many as it has."
    settings = {name: value for name, value in _settings(args).items() if value is not None}
    card = build_card(
        folder,
        Path(args.hub_model_id or args.output_dir).name,
        args.hub_model_id if args.push_to_hub and args.hub_model_id else str(folder),
        metadata,
        validation if scores is not None else None,
        is_generated=True,
        summary=f"Trained with `diffusers_pq` on {dataset}.",
        training=f"{step} of {args.max_train_steps} steps, with these settings:",
        recipes={"Settings": yaml.safe_dump(settings, sort_keys=False).strip()},
        base=getattr(args, "pretrained_model_name_or_path", None),
    )
    save_card(card, folder)


def dry_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    take_step: Callable[[], object],
):
    """
    Print what a run would do and need; its steps are real, but nothing is written.

    Args:
        args (`argparse.Namespace`): Printed as a recipe.
        accelerator (`Accelerator`)
        models (`dict[str, nn.Module]`): Whose parameters are counted, by name.
        optimizers (`list`): Whose state is part of the memory that is always held.
        take_step: One optimisation step.
    """
    device = str(accelerator.device)
    take_step()  # compiles, and allocates the optimisers' state
    peak = measure_peak_bytes(take_step, device)
    seconds = measure_seconds(take_step, _DRY_RUN_STEPS, device, warm_up=0)
    if not accelerator.is_main_process:
        return
    held = _held_bytes(models.values(), optimizers)
    hours = seconds * args.max_train_steps / 3600
    given = {name: value for name, value in _settings(args).items() if value is not None}
    print(yaml.safe_dump(given, sort_keys=False))
    for name, model in models.items():
        print(f"{name}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters")
    print(f"memory: {held / 2**30:.2f} GiB weights and optimiser states + {peak / 2**30:.2f} GiB within a step")
    print(f"time: {seconds:.3g} s a step, {hours:.3g} hours for {args.max_train_steps} steps")
    print(f"measured on {accelerator.num_processes} x {describe_machine(device)}")


def _settings(args: argparse.Namespace) -> dict:
    """All flags but the token, as JSON values."""
    settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return json.loads(json.dumps(settings, default=str))


def _held_bytes(models, optimizers) -> int:
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
