"""The one place where diffusers is told about this package.

diffusers only loads (and, from the Hub, only downloads) components whose library is a key of
`diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES`, and only then writes the short name
`["diffusers_pq", "PQModel"]` into `model_index.json`. That module imports torch and transformers, so registration
waits until somebody imports it: `import diffusers_pq` alone stays light.

The modules of the models are registered as well: our pipelines look the classes up there (see
`diffusers_pq.pipelines.pq_mixin`). So are the pipelines, in the tables by which `AutoPipelineForImage2Image.from_pipe`
and its like find siblings.
"""

import importlib.abc
import importlib.util
import sys


_LOADING_UTILS = "diffusers.pipelines.pipeline_loading_utils"
_METHODS = ["save_pretrained", "from_pretrained"]
_AUTO_PIPELINE = "diffusers.pipelines.auto_pipeline"
# Text-to-image, image-to-image, inpainting.
_FAMILIES = {
    "stable-diffusion-pq": (
        "StableDiffusionPQPipeline",
        "StableDiffusionPQImg2ImgPipeline",
        "StableDiffusionPQInpaintPipeline",
    ),
    "stable-diffusion-xl-pq": (
        "StableDiffusionXLPQPipeline",
        "StableDiffusionXLPQImg2ImgPipeline",
        "StableDiffusionXLPQInpaintPipeline",
    ),
    "stable-diffusion-3-pq": ("StableDiffusion3PQPipeline", "StableDiffusion3PQImg2ImgPipeline"),
}


def _register(loading_utils):
    if not isinstance(getattr(loading_utils, "LOADABLE_CLASSES", None), dict):
        from ._versions import SUPPORTED

        raise ImportError(
            f"diffusers_pq cannot register with this diffusers: `{_LOADING_UTILS}.LOADABLE_CLASSES` is missing. "
            f"Install diffusers{SUPPORTED['diffusers']}."
        )
    loading_utils.LOADABLE_CLASSES["diffusers_pq"] = {"ModelMixin": _METHODS, "DiffusionPipeline": _METHODS}
    for module in ("autoencoder_pq", "masked_transformer", "product_quantization"):
        loading_utils.LOADABLE_CLASSES[f"diffusers_pq.models.{module}"] = {"ModelMixin": _METHODS}


def _register_families(auto_pipeline):
    import diffusers_pq

    tables = (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    )
    for family, names in _FAMILIES.items():
        for table, name in zip(tables, names):
            table[family] = getattr(diffusers_pq, name)


_REGISTER = {_LOADING_UTILS: _register, _AUTO_PIPELINE: _register_families}


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, name, loader):
        self.name, self.loader = name, loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _REGISTER[self.name](module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _RegisteringLoader(name, spec.loader)
        return spec


def register_with_diffusers():
    """Make diffusers accept `diffusers_pq` as a component library, now or as soon as its loading code is imported.

    Raises:
        ImportError: if diffusers has lost its table of loadable classes; the message names the supported versions.
    """
    for name, register in _REGISTER.items():
        module = sys.modules.get(name)
        if module is not None:
            register(module)
        else:
            sys.meta_path.insert(0, _Finder(name))
