"""Product-quantised image latents for diffusers.

The public names are loaded on first use, so that `import diffusers_pq` neither imports torch nor diffusers.
"""

import importlib

from ._registration import register_with_diffusers
from ._versions import check_dependency_versions


__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "PQModel": ".models.autoencoder_pq",
    "PQEncoderOutput": ".models.autoencoder_pq",
    "PQModelOutput": ".models.autoencoder_pq",
    "ProductQuantizer": ".models.quantizer",
    "ProductQuantizerOutput": ".models.quantizer",
    "PQMaskedTransformer": ".models.masked_transformer",
    "PQMaskedTransformerOutput": ".models.masked_transformer",
    "QuantizedAutoencoder": ".models.product_quantization",
    "product_quantize": ".models.product_quantization",
    "PatchDiscriminator": ".models.discriminator",
    "widen_unet": ".models.widening",
    "widen_denoiser": ".models.widening",
    "StableDiffusionPQPipeline": ".pipelines.pipeline_stable_diffusion_pq",
    "StableDiffusionPQImg2ImgPipeline": ".pipelines.pipeline_stable_diffusion_pq_img2img",
    "StableDiffusionPQInpaintPipeline": ".pipelines.pipeline_stable_diffusion_pq_inpaint",
    "StableDiffusionXLPQPipeline": ".pipelines.pipeline_stable_diffusion_xl_pq",
    "StableDiffusionXLPQImg2ImgPipeline": ".pipelines.pipeline_stable_diffusion_xl_pq_img2img",
    "StableDiffusionXLPQInpaintPipeline": ".pipelines.pipeline_stable_diffusion_xl_pq_inpaint",
    "StableDiffusion3PQPipeline": ".pipelines.pipeline_stable_diffusion_3_pq",
    "StableDiffusion3PQImg2ImgPipeline": ".pipelines.pipeline_stable_diffusion_3_pq_img2img",
    "LatentDiffusionPQPipeline": ".pipelines.pipeline_latent_diffusion_pq",
    "MaskedPQPipeline": ".pipelines.pipeline_masked_pq",
    "PQEncodeStep": ".pipelines.modular_blocks_pq",
    "PQDecodeStep": ".pipelines.modular_blocks_pq",
    "StableDiffusionXLPQBlocks": ".pipelines.modular_blocks_pq",
    "StableDiffusion3PQBlocks": ".pipelines.modular_blocks_pq",
    "FluxPQBlocks": ".pipelines.modular_blocks_pq",
    "Flux2PQBlocks": ".pipelines.modular_blocks_pq",
    "Flux2KleinPQBlocks": ".pipelines.modular_blocks_pq",
    "Flux2KleinBasePQBlocks": ".pipelines.modular_blocks_pq",
    "QwenImagePQBlocks": ".pipelines.modular_blocks_pq",
    "ZImagePQBlocks": ".pipelines.modular_blocks_pq",
    # diffusers finds out how to load a component of a third-party library by asking that library for these two.
    "ModelMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
}

__all__ = [*_PUBLIC, "__version__"]

check_dependency_versions()


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


# Last, since it may load names of this package.
register_with_diffusers()
