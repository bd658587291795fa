"""Triton kernel of product quantisation: nearest entry, lookup and squared error in one pass over the latents."""

import torch
import triton
import triton.language as tl


# Pixels of one subspace that a program compares with its codebook, one or two in each thread's registers.
_PIXELS = 128


@triton.jit
def _quantize_kernel(
    latents,
    codebooks,
    quantized,
    codes,
    losses,
    loss_scale,
    subspaces,
    size,
    pixels,
    batch_stride,
    channel_stride,
    pixel_stride,
    DIMENSION: tl.constexpr,
    PIXELS: tl.constexpr,
    CODES_ONLY: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(pixels, PIXELS)
    row = (program // blocks).to(tl.int64)  # of batch and subspace
    subspace = row % subspaces
    pixel = (program % blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    first = row // subspaces * batch_stride + subspace * DIMENSION * channel_stride + pixel * pixel_stride
    entries = codebooks + subspace * size * DIMENSION

    vector = ()
    for i in tl.static_range(DIMENSION):
        vector = vector + (tl.load(latents + first + i * channel_stride, mask=inside, other=0.0).to(tl.float32),)

    # Differences, not products: those lose what is small to what is far from the origin.
    smallest = tl.full((PIXELS,), float("inf"), tl.float32)
    nearest = tl.zeros((PIXELS,), tl.int32)
    for k in range(size):
        distance = tl.zeros((PIXELS,), tl.float32)
        for i in tl.static_range(DIMENSION):
            difference = vector[i] - tl.load(entries + k * DIMENSION + i)
            distance += difference * difference
        closer = distance < smallest
        smallest = tl.where(closer, distance, smallest)
        nearest = tl.where(closer, k, nearest)

    tl.store(codes + row * pixels + pixel, nearest.to(tl.int64), mask=inside)
    if not CODES_ONLY:
        # Nothing was smaller than infinity: a latent is not finite, and neither is what comes of it.
        invalid = tl.where(smallest < float("inf"), 0.0, float("nan"))
        for i in tl.static_range(DIMENSION):
            entry = tl.load(entries + nearest.to(tl.int64) * DIMENSION + i) + invalid
            tl.store(quantized + first + i * channel_stride, entry.to(quantized.dtype.element_ty), mask=inside)
        tl.store(losses + program, tl.sum(tl.where(inside, smallest + invalid, 0.0), 0) * loss_scale)


def run(latents: torch.Tensor, codebooks: torch.Tensor, loss_scale: float | None) -> tuple[torch.Tensor, ...]:
    """
    Args:
        latents (`torch.Tensor` of shape `(B, d, P)`): Any strides, any float dtype up to float32.
        codebooks (`torch.Tensor` of shape `(S, K, d/S)`): Contiguous, float32.
        loss_scale (`float`, *optional*): What squared errors are multiplied with; `None` to write codes alone.

    Returns:
        Entries with shape, strides and dtype of `latents`, codes `[B, S, P]`, and the loss, in one part a program.
    """
    batch_size, _, pixels = latents.shape
    subspaces, size, dimension = codebooks.shape
    codes_only = loss_scale is None
    quantized = latents if codes_only else torch.empty_like(latents)
    codes = latents.new_empty((batch_size, subspaces, pixels), dtype=torch.long)
    programs = batch_size * subspaces * triton.cdiv(pixels, _PIXELS)
    losses = latents.new_empty(programs, dtype=torch.float32)
    if not programs:
        return quantized, codes, losses
    with torch.cuda.device_of(latents):  # Triton launches on the current device
        _quantize_kernel[(programs,)](
            latents,
            codebooks,
            quantized,
            codes,
            losses,
            loss_scale or 0.0,
            subspaces,
            size,
            pixels,
            *latents.stride(),
            DIMENSION=dimension,
            PIXELS=_PIXELS,
            CODES_ONLY=codes_only,
            num_warps=4,
        )
    return quantized, codes, losses
