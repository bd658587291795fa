"""Exported graphs: `torch.export` and ONNX files of whatever quantises run where this package is not installed."""

import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import tiny_config
from torch.export import Dim

from diffusers_pq import PQModel


SIZES = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
METHODS = {
    "encode_codes": lambda model, x: model.encode_codes(x),
    "decode_codes": lambda model, codes: model.decode_codes(codes, return_dict=False)[0],
    "decode": lambda model, latents: model.decode(latents, return_dict=False)[0],
    "forward": lambda model, x: model(x, return_dict=False)[0],
}
VARIANTS = {
    "pq": {},
    "vq": {"num_subspaces": 1},
    "sq": {"num_subspaces": 8},
    "cosine": {"codebook_distance": "cosine"},
}


class Method(nn.Module):
    """A method of a model as a module's `forward`, which is what can be exported."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.method = model, METHODS[name]

    def forward(self, x):
        return self.method(self.model, x)


def exportable(name, images, **config):
    torch.manual_seed(0)
    model = PQModel(**tiny_config(**config)).eval().requires_grad_(False)
    given = {"decode_codes": model.encode_codes, "decode": lambda x: model.encode(x).latents}
    return Method(model, name), given.get(name, lambda x: x)(images)


def operations(program):
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    return {str(node.target) for graph in graphs for node in graph.nodes}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("encode_codes", "pq"), ("decode_codes", "pq"), ("encode_codes", "vq"), ("forward", "sq"), ("decode", "cosine")],
)
def test_an_exported_program_has_standard_operations_only(name, variant, images):
    module, given = exportable(name, images, **VARIANTS[variant])
    program = torch.export.export(module, (given,))
    assert not [operation for operation in operations(program) if "diffusers_pq" in operation]
    torch.testing.assert_close(program.module()(given), module(given))


def test_an_exported_program_takes_other_sizes_and_loads_without_this_package(images, tmp_path):
    module, x = exportable("encode_codes", images)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=(SIZES,)), tmp_path / "codes.pt2")
    x = torch.cat([x, x], dim=3)[:1, :, :24]
    torch.save((x, module(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['diffusers_pq'] = None; "
        "program = torch.export.load('codes.pt2').module(); x, codes = torch.load('expected.pt'); "
        "assert torch.equal(program(x), codes)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(("name", "dynamo"), [("encode_codes", True), ("decode", True), ("encode_codes", False)])
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_does_the_same_at_other_sizes(name, dynamo, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, given = exportable(name, images)
    path = tmp_path / "model.onnx"
    if dynamo:
        options = {"dynamic_shapes": (SIZES,), "external_data": False, "verbose": False}
    else:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    torch.onnx.export(module, (given,), path, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path)
    other = given[:1, :, :, :4].contiguous() if name == "decode" else given[:1, :, :, :16].contiguous()
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(other), atol=1e-4, rtol=1e-4)
