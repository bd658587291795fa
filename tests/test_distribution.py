"""Two processes on a CPU see the gradients of one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from diffusers_pq import PQModel
from diffusers_pq.training.autoencoders import ReconstructionModel
from diffusers_pq.training.trainer import AutoencoderLoss, LossWeights


def gradients(accelerator):
    """Of the loss on this process's share of four pictures."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    share = images.chunk(accelerator.num_processes)[accelerator.process_index]
    torch.manual_seed(0)
    model = accelerator.prepare(ReconstructionModel(PQModel(**tiny_config())).train())
    loss = AutoencoderLoss(LossWeights(perceptual=0, discriminator=0), None, None, accelerator)
    value, _ = loss.generator(model, share, model(share))
    accelerator.backward(value)
    return {name: parameter.grad for name, parameter in accelerator.unwrap_model(model).named_parameters()}


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "two.safetensors"
    subprocess.run([*launch, __file__, str(output)], env=environment, check=True, capture_output=True, timeout=300)
    shared = load_file(output)
    assert shared.pop("processes") == 2
    alone = gradients(Accelerator(cpu=True))
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(gradient.any() for gradient in alone.values())


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = gradients(accelerator)
    if accelerator.is_main_process:
        save_file(found | {"processes": torch.tensor(accelerator.num_processes)}, sys.argv[1])
    accelerator.end_training()
