"""What each training on labelled pictures must leave behind, whatever it trains."""

import json

import torch
from safetensors.torch import load_file


FLAGS = ("--checkpointing_steps", 1, "--use_ema", "--random_flip", "--validation_steps", 1)
FLAGS += ("--validation_labels", "red", "--streaming", "--shuffle_buffer", 4)


def weights(folder, part):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def check_whole_run(train, workspace, pipeline_class, part, call, *extra):
    """
    Train on a stream, and once more from the first checkpoint, to the same weights.

    Args:
        train: Runs the script with flags, of which the first two are the workspace and the name of the output folder.
        workspace (`Path`): With `names.txt`, the three classes' names.
        pipeline_class, part: Class of the pipeline, and name of the model in it.
        call (`str`): How the card's example calls the pipeline.
        extra: Flags.

    Returns:
        The trained pipeline.
    """
    flags = (*FLAGS, "--class_names_file", workspace / "names.txt", *extra)
    whole = workspace / "whole"
    train(workspace, "whole", *flags)
    pipeline = pipeline_class.from_pretrained(whole)
    pictures = pipeline(class_labels=["red", 0], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (2, 32, 32, 3)
    assert json.loads((whole / "best" / "validation.json").read_text())["loss"] > 0
    assert pipeline_class.from_pretrained(whole / "best").labels["red"] == [2]
    card = (whole / "README.md").read_text()
    assert f"pipeline({call}, " in card and "32 x 32 pixels" in card
    result = train(workspace, "resumed", *flags, "--resume_from_checkpoint", whole / "checkpoint-1")
    assert f"Resumed from {whole / 'checkpoint-1'}" in result.stdout
    expected = weights(whole, part)
    assert all(torch.equal(value, expected[name]) for name, value in weights(workspace / "resumed", part).items())
    return pipeline
