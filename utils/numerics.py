"""Precision, determinism, seeds, and the watch for numbers that are not finite."""

import os
import random

import numpy as np
import torch

from . import distributed

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_numerics(args):
    """TF32 only where asked for; deterministic algorithms with --seed, else cuDNN's choice of the fastest."""
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)


def seed_everything(*entropy: int):
    """Seeds torch, numpy and random with what these numbers (seed, epoch, step, rank) give."""
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint32).tolist()
    torch.manual_seed(words[0])
    np.random.seed(words[1])
    random.seed(words[2])


class Verdict:
    """What the ranks agree on in a step: whether a loss is not finite, and whether one was asked to stop.

    The exchange starts before the backward call and is read after it, so that a GPU is not kept waiting.
    """

    def __init__(self, loss, stop: bool):
        broken = ~loss.detach().isfinite()
        flags = torch.stack([broken, torch.full_like(broken, stop)]).to(torch.int32)
        distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.flags = torch.empty(2, dtype=torch.int32, pin_memory=loss.is_cuda).copy_(flags, non_blocking=True)
        self.copied = torch.cuda.Event() if loss.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def bad(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.flags[0])

    def stop(self) -> bool:
        return bool(self.flags[1])
