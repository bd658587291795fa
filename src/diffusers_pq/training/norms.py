"""Normalisation of all channels together, in a way that keeps a GPU busy."""

import torch
import torch.nn as nn


class SingleGroupNorm(nn.GroupNorm):
    """
    A `GroupNorm` of one group, with the same parameters and values.

    torch's kernel gives each group of each picture to one block of the GPU, so that most of its multiprocessors wait.
    Here mean and variance are reductions that are shared out. On a CPU it is the parent.

    Parameters:
        norm (`GroupNorm`): Of one group; the parameters are shared.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(1, norm.num_channels, norm.eps, affine=False)
        self.affine = norm.affine
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `(B, C, ...)` normalised over all but the first dimension; under autocast in float32."""
        return self.by_reductions(x) if x.is_cuda else super().forward(x)

    def by_reductions(self, x: torch.Tensor) -> torch.Tensor:
        """What [`forward`] does on a GPU."""
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            var, mean = torch.var_mean(x, dim=tuple(range(1, x.ndim)), correction=0, keepdim=True)
            normalised = (x - mean) * (var + self.eps).rsqrt()
            if self.affine:
                shape = (1, -1, *(1,) * (x.ndim - 2))
                normalised = normalised * self.weight.float().view(shape) + self.bias.float().view(shape)
        return normalised.to(dtype)


def with_single_group_norms(model: nn.Module) -> nn.Module:
    """The model itself, with its norms of one group replaced by [`SingleGroupNorm`]; its state dict stays the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm and child.num_groups == 1:
                setattr(module, name, SingleGroupNorm(child))
    return model
