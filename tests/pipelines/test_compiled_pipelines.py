"""Denoisers that are compiled stay so over all steps of the pipelines: no graph breaks, and no compiling again."""

import pytest
import test_pipeline_latent_diffusion_pq
import test_pipeline_masked_pq
import torch
from conftest import tiny_config
from test_pipelines import FAMILIES
from tiny_pipelines import LENGTH

from diffusers_pq import PQModel


def of_prompts(family):
    torch.manual_seed(0)
    pipeline = family[0](**FAMILIES[family](PQModel(**tiny_config()).eval(), 8))
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a red apple", "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}
    given |= {"max_sequence_length": LENGTH} if hasattr(pipeline, "transformer") else {}
    return pipeline, lambda steps: pipeline(**given, num_inference_steps=steps)


def of_classes(kind):
    pipeline = test_pipeline_latent_diffusion_pq.make(kind)
    return pipeline, lambda steps: test_pipeline_latent_diffusion_pq.generate(pipeline, num_inference_steps=steps)


def of_codes(_):
    pipeline = test_pipeline_masked_pq.make()
    return pipeline, lambda steps: test_pipeline_masked_pq.paint(pipeline, num_inference_steps=steps)


# The text-to-image pipeline of each family: their siblings have the same denoisers and the same loop.
CASES = {family[0].__name__: (of_prompts, family) for family in FAMILIES}
CASES |= {f"LatentDiffusionPQPipeline, {kind}": (of_classes, kind) for kind in ("unet", "transformer")}
CASES |= {"MaskedPQPipeline": (of_codes, None)}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("case", CASES)
def test_no_step_breaks_the_graph_or_compiles_again(case):
    make, argument = CASES[case]
    pipeline, generate = make(argument)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    denoiser.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        generate(4)
    assert graphs() == 1


def test_compiled_blocks_are_those_of_the_first_step():
    pipeline, generate = of_prompts(next(iter(FAMILIES)))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    pipeline.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    generate(1)
    after_one_step = graphs()
    generate(4)
    assert after_one_step > 0 and graphs() == after_one_step
