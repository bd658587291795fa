"""Product quantisation by one Triton kernel, as operators for autograd, torch.compile and CUDA graphs."""

import importlib.util
from pathlib import Path

import torch


# Sub-vectors of more dimensions do not fit a thread's registers; for them a matrix product is faster.
_MAX_DIMENSION = 16
# The single file of `standalone_code` comes without the kernel.
_HAS_KERNEL = (
    importlib.util.find_spec("triton") is not None and Path(__file__).with_name("quantization_kernel.py").is_file()
)


def is_fusable(latents: torch.Tensor, codebooks: torch.Tensor) -> bool:
    """Whether the kernel runs on this device and for these shapes and dtypes; it needs no compilation to wait for."""
    return (
        latents.is_cuda
        and _HAS_KERNEL
        and codebooks.shape[-1] <= _MAX_DIMENSION
        and latents.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and codebooks.dtype == torch.float32
    )


@torch.library.custom_op("diffusers_pq::find_codes", mutates_args=())
def find_codes(latents: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Codes `[B, S, P]` of `latents` `[B, d, P]`: of equally near entries of `codebooks` `[S, K, d/S]` the first."""
    from . import quantization_kernel

    return quantization_kernel.run(latents, codebooks.contiguous(), loss_scale=None)[1]


@find_codes.register_fake
def _(latents: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    return latents.new_empty((latents.shape[0], codebooks.shape[0], latents.shape[2]), dtype=torch.long)


@torch.library.custom_op("diffusers_pq::quantize", mutates_args=())
def quantize(
    latents: torch.Tensor, codebooks: torch.Tensor, commitment_beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        latents (`torch.Tensor` of shape `(B, d, P)`): See [`is_fusable`].
        codebooks (`torch.Tensor` of shape `(S, K, d/S)`): float32.
        commitment_beta (`float`): beta of Eq. 1.

    Returns:
        Quantised latents like `latents`, with the straight-through gradient; codes `[B, S, P]`; the loss of Eq. 1,
        float32. Where a sub-vector is not finite, its quantised latents and the loss are NaN.
    """
    from . import quantization_kernel

    scale = (1 + commitment_beta) / max(latents.numel(), 1)
    quantized, codes, losses = quantization_kernel.run(latents, codebooks.contiguous(), scale)
    return quantized, codes, losses.sum()


@quantize.register_fake
def _(latents: torch.Tensor, codebooks: torch.Tensor, commitment_beta: float):
    codes = latents.new_empty((latents.shape[0], codebooks.shape[0], latents.shape[2]), dtype=torch.long)
    return torch.empty_like(latents), codes, latents.new_empty((), dtype=torch.float32)


def _keep_for_backward(ctx, inputs, output):
    latents, codebooks, ctx.commitment_beta = inputs
    ctx.save_for_backward(latents, codebooks, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_quantized, _, grad_loss):
    latents, codebooks, codes = ctx.saved_tensors
    subspaces, size, dimension = codebooks.shape
    rows = codes + torch.arange(subspaces, device=codes.device).view(-1, 1) * size
    entries = codebooks.flatten(0, 1)[rows].movedim(3, 2).flatten(1, 2)
    pull = (latents.float() - entries) * (grad_loss * (2 / max(latents.numel(), 1)))
    grad_latents = (grad_quantized.float() + pull).to(latents.dtype) if ctx.needs_input_grad[0] else None
    grad_codebooks = None
    if ctx.needs_input_grad[1]:
        per_row = (-ctx.commitment_beta * pull).unflatten(1, (subspaces, dimension)).movedim(2, 3)
        # The backward of an embedding sums what belongs together, in a fixed order: `index_add_` has none on a GPU.
        grad_codebooks = torch.ops.aten.embedding_dense_backward(
            per_row.reshape(-1, dimension), rows.flatten(), subspaces * size, -1, False
        ).view_as(codebooks)
    return grad_latents, grad_codebooks, None


quantize.register_autograd(_backward, setup_context=_keep_for_backward)
