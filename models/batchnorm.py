"""BatchNorm by parts: one process normalizes as several processes do."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SplitBatchNorm(_BatchNorm):
    """BatchNorm that, in train mode, normalizes each of `splits` pieces p of a batch with the piece's own statistics.

        y_i = weight (x_i - mean(x_p)) / sqrt(var(x_p) + eps) + bias    for every image i of piece p

    x: (N, C, ...), N a multiple of splits. The pieces are contiguous, as the ranks' parts of a global batch are. The
    running statistics take the mean of the pieces', which is the average of the ranks' own. Eval mode is BatchNorm's.
    Source: "split BatchNorm" of MoCo's CIFAR-10 demonstration (He et al.), there with strided pieces.
    """

    splits = 1  # set by split_batchnorm

    def _check_input_dim(self, x):
        pass  # (N, C) and anything with further dimensions

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"{len(x)} images cannot be split into {self.splits} equal pieces")
        momentum, running = self.momentum, []
        means = variances = [None] * self.splits
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
            running = [self.running_mean, self.running_var]
            means, variances = (buffer.repeat(self.splits, 1) for buffer in running)
        pieces = [
            F.batch_norm(piece, mean, variance, self.weight, self.bias, True, momentum or 0.0, self.eps)
            for piece, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        for buffer, moved in zip(running, (means, variances), strict=False):
            buffer.copy_(moved.mean(dim=0))
        return torch.cat(pieces)


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """The module with SplitBatchNorm in place of each BatchNorm; parameters, buffers and their names stay.

    Like SyncBatchNorm.convert_sync_batchnorm, it changes the module in place and returns it, or a new module for a
    BatchNorm itself. With one piece nothing changes. Raises ValueError for a BatchNorm with a forward pass of its own.
    """
    if splits == 1:
        return module
    for name, child in module.named_children():
        setattr(module, name, split_batchnorm(child, splits))
    if not isinstance(module, _BatchNorm):
        return module
    if type(module).forward not in (_BatchNorm.forward, SplitBatchNorm.forward):
        raise ValueError(f"{type(module).__name__} cannot be split: its forward pass is not BatchNorm's")
    split = SplitBatchNorm(module.num_features, module.eps, module.momentum)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "track_running_stats"):
        setattr(split, name, getattr(module, name))
    split.affine, split.splits = module.affine, splits
    return split.train(module.training)
