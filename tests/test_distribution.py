"""Two processes on a CPU see the gradients of one process with twice the batch."""

import torch
from accelerate import Accelerator, debug_launcher
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from diffusers_pq import PQModel
from diffusers_pq.training.autoencoders import ReconstructionModel
from diffusers_pq.training.trainer import AutoencoderLoss, LossWeights


def gradients(batch, accelerator):
    torch.manual_seed(0)
    model = accelerator.prepare(ReconstructionModel(PQModel(**tiny_config())).train())
    loss = AutoencoderLoss(LossWeights(perceptual=0, discriminator=0), None, None, accelerator)
    value, _ = loss.generator(model, batch, model(batch))
    accelerator.backward(value)
    return {name: parameter.grad for name, parameter in accelerator.unwrap_model(model).named_parameters()}


def save_gradients_of_one_process(images, path):
    accelerator = Accelerator(cpu=True)
    share = images.chunk(accelerator.num_processes)[accelerator.process_index]
    found = gradients(share, accelerator)
    if accelerator.is_main_process:
        save_file(found | {"processes": torch.tensor(accelerator.num_processes)}, path)


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(tmp_path):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    debug_launcher(save_gradients_of_one_process, (images, str(tmp_path / "two.safetensors")), num_processes=2)
    shared = load_file(tmp_path / "two.safetensors")
    assert shared.pop("processes") == 2
    alone = gradients(images, Accelerator(cpu=True))
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(gradient.any() for gradient in alone.values())
