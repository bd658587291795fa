try:
    from diffusers_pq import StableDiffusionPQPipeline  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "diffusers_pq":
        raise
    raise ImportError(
        "StableDiffusionPQPipeline needs the Python package `diffusers_pq`, which is not installed: install it."
    ) from error
