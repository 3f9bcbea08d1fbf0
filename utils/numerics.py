"""Precision, determinism, seeds, and the check for losses that are not finite."""

import os
import random

import numpy as np
import torch

from .distributed import all_reduce

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_numerics(args):
    """Allows TF32 only with --tf32; uses deterministic algorithms with --seed, else those that cuDNN finds fastest."""
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor: a kernel each


def seed_everything(*entropy: int):
    """Seeds torch, numpy and random with a function of these numbers, such as (seed, epoch, step, rank)."""
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint32).tolist()
    torch.manual_seed(words[0])
    np.random.seed(words[1])
    random.seed(words[2])


class StepFlags:
    """What the ranks agree on in a step: whether any loss is not finite, and whether any was asked to stop.

    The exchange starts before the backward pass and is read after it, so that a GPU need not wait for the host.
    """

    def __init__(self, loss, stop: bool):
        not_finite = ~loss.detach().isfinite()
        flags = torch.stack([not_finite, torch.full_like(not_finite, stop)]).to(torch.int32)
        all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.flags = torch.empty(2, dtype=torch.int32, pin_memory=loss.is_cuda).copy_(flags, non_blocking=True)
        self.copied = torch.cuda.Event() if loss.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def loss_is_finite(self) -> bool:
        """Whether the loss of every rank is finite."""
        if self.copied is not None:
            self.copied.synchronize()
        return not self.flags[0]

    def stop(self) -> bool:
        """Whether any rank was asked to stop before this step; loss_is_finite must have been called."""
        return bool(self.flags[1])
