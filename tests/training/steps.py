"""Five real training steps of a tiny PQModel, for comparisons of precisions and of ways to compute."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_config
from diffusers.optimization import get_scheduler

from diffusers_pq import PatchDiscriminator, PQModel
from diffusers_pq.training.optimizers import build_optimizer
from diffusers_pq.training.options import OptimisationOptions
from diffusers_pq.training.pqgan import AutoencoderLoss, AutoencoderTrainer, LossWeights, ReconstructionModel
from diffusers_pq.training.run import prepare_model


STEPS = 5


def five_steps(device, **flags):
    """
    Args:
        device (`str`): `"cpu"` or `"cuda"`.
        flags: Of [`OptimisationOptions`].

    Returns:
        `dict`: `pixel_loss` and `discriminator_loss` of each step, `[5]`; the trained `decoder` weights of the last
        layer; and the `steps` that were left out, of both optimisers.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    optim = OptimisationOptions(**flags)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=optim.mixed_precision or "no")
    torch.manual_seed(0)
    autoencoder = PQModel(**tiny_config())
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(accelerator.device) * 2 - 1
    prepare_model(optim, autoencoder, dynamic=False)
    prepared = []
    for module in (ReconstructionModel(autoencoder).train(), PatchDiscriminator()):
        optimizer = build_optimizer(optim, module.parameters(), 2e-4)
        prepared.append(accelerator.prepare(module, optimizer, get_scheduler("constant", optimizer)))
    losses = AutoencoderLoss(LossWeights(perceptual=0.0), None, prepared[1][0], accelerator)
    trainer = AutoencoderTrainer(accelerator, *prepared[0], losses, *prepared[1])
    logs = [trainer.step(images) for _ in range(STEPS)]
    AcceleratorState._reset_state(reset_partial_state=True)
    found = {name: torch.stack([log[name].float() for log in logs]) for name in ("pixel_loss", "discriminator_loss")}
    found["decoder"] = trainer.autoencoder.decoder.conv_out.weight.detach().float()
    return {name: value.cpu() for name, value in found.items()} | {"skipped": trainer.skipped_steps}


def assert_steps_agree(found, expected, pixel_bound, discriminator_bound):
    """No step left out, and losses within relative bounds: the discriminator's multiplies small differences."""
    assert found["skipped"] == 0
    for name, bound in (("pixel_loss", pixel_bound), ("discriminator_loss", discriminator_bound)):
        difference = float(((found[name] - expected[name]) / expected[name]).abs().max())
        assert difference <= bound, f"{name} differs by {difference:.2g}: {found[name]} from {expected[name]}"
