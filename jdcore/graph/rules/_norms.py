from __future__ import annotations

import torch
from torch import Tensor

from jdcore.graph._site import Layers, NoRule, Site
from jdcore.graph.rules._table import rule
from jdcore.graph.shares import Dense, Share, widened


@rule("NativeLayerNormBackward0", "FusedRmsNormBackward0", layers=True)
def layer_norm(site: Site, operand: int) -> Share:
    """Sums over positions of the gradient, for the weight times the normalized input."""
    shape = site.shapes[operand]
    features = len(shape)
    grads = site.positions(site.grad, 1, features)
    if operand == 2:
        return Dense.summed(grads, shape)
    if operand != 1:
        raise NoRule
    # The results behind the first are what was measured: mean and reciprocal deviation, or for an
    # RMS norm the reciprocal root mean square alone.
    rms = site.name == "FusedRmsNormBackward0"
    names = ("input", "result1") if rms else ("input", "result1", "result2")
    images, *mean, deviation = (site.positions(site.saved(n), 0, features) for n in names)
    images = widened(images)
    # In one piece of memory, as large as what the layers hold.
    rows = (images - mean[0]).mul_(deviation) if mean else images * deviation
    rows = rows.view(-1, *grads.shape[1:])
    one_task = len(rows) == len(grads)
    return Dense.summed(rows.mul_(grads) if one_task else rows * widened(grads), shape)


@rule("NativeGroupNormBackward0", layers=True)
def group_norm(site: Site, operand: int) -> Share:
    """One kernel, for which the samples are further groups."""
    if not site.samples_lead or operand not in (1, 2):
        raise NoRule
    if "rows" not in site.memo:
        site.memo["rows"] = _group_norm_rows(site)
    rows, shape = site.memo["rows"][operand - 1], site.shapes[operand]
    of_sample = rows.shape[2]  # channels, times images
    if of_sample == shape[0]:
        return Dense(rows, shape)
    return Dense.summed(rows.view(len(rows), site.samples, -1, *shape), shape)


def _group_norm_rows(site: Site) -> tuple[Tensor, Tensor]:
    """Rows of weight and bias, shape [K, B, channels of all images of a sample] each."""
    images, mean, deviation = (widened(site.saved(n)) for n in ("input", "result1", "result2"))
    grads = site.grad.to(images.dtype).contiguous()
    # Those of all images. Tasks have the same ones, layers have more.
    channels = images.shape[: images.ndim - grads.ndim + 3].numel()
    # The kernel asks for numbers of entries alone, but takes other orders of them from the images.
    images = images.contiguous().view(1, channels, -1)
    numbers = 1, channels, images.shape[2], mean.numel(), [False, True, True]
    weight = images.new_empty(channels)  # read for the gradient of the images alone
    of_tasks = [
        torch.ops.aten.native_group_norm_backward(
            of_task, images, mean, deviation, weight, *numbers
        )
        for of_task in (grads if len(grads) > 1 and not isinstance(site, Layers) else (grads,))
    ]
    _, *both = zip(*of_tasks, strict=True)
    # A copy is not free.
    rows = (torch.cat(found) if len(found) > 1 else found[0] for found in both)
    of_weight, of_bias = (found.view(len(grads), site.samples, -1) for found in rows)
    return of_weight, of_bias


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
def running_norm(site: Site, operand: int) -> Share:
    """A batch normalization in eval mode."""
    # In training mode the statistics are those of all samples, and the losses mix them.
    if site.saved("training") or not site.samples_lead or operand not in (1, 2):
        raise NoRule
    if operand == 2:
        return site.of_channels(site.grad, 2)
    # Torch's formulas for the two kernels name it differently.
    epsilon = site.saved("epsilon" if site.name.startswith("Cudnn") else "eps")
    images, scale = widened(site.saved("input")), (site.saved("running_var") + epsilon).rsqrt()
    mean, scale = (
        of.view(-1, *[1] * (images.ndim - 2)) for of in (site.saved("running_mean"), scale)
    )
    # Centred first: afterwards digits would cancel.
    return site.of_channels(widened(site.grad) * ((images - mean) * scale), 1)
