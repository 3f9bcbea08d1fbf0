"""Precision, determinism and seeds."""

import os
import random

import numpy as np
import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_numerics(tf32: bool, deterministic: bool):
    """Allows TF32 if asked for, and uses deterministic algorithms, else those that cuDNN finds fastest."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and torch.cuda.is_available():
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
