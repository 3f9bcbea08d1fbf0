"""Training steps of the three stages against plain versions of them, at the published network and size.

    python -m benchmarks.step [--stages i ii iii] [--batch 16] [--variants float32 channels_last bf16] [--scaling]
    python -m benchmarks.step --drift                         how far each switch moves the losses over 200 steps

A step of ours is what the training loop does with a batch of the loader's, normalisation included; the textbook's is
given normalised images. Memory is the peak of a process that makes two steps. The share of the peak is that of the
rate that a matrix product reaches in the same run, in the same type.
"""

import sys
from argparse import Namespace
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode
from utils.averages import Averages, train_accuracies

from benchmarks import common, textbook
from models import SDL, SLG, SSFL, build_backbone
from models.preprocess import normalize
from ssd_stage_i import StageI
from ssd_stage_ii import StageII
from ssd_stage_iii import StageIII
from utils.numerics import AUTOCAST, Verdict

STAGES = {"i": StageI(), "ii": StageII(), "iii": StageIII()}
WEIGHTS = Namespace(con_weight=1.0, kd_weight=1.0)
VARIANTS = {  # (channels_last, amp, compile)
    "float32": (False, "none", False),
    "channels_last": (True, "none", False),
    "bf16": (True, "bf16", False),
    "fp16": (True, "fp16", False),
    "float32 compiled": (True, "none", True),
    "bf16 compiled": (True, "bf16", True),
    "fp16 compiled": (True, "fp16", True),
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
DRIFT_SPANS = ((0, 10), (10, 50), (50, 200))
SCALING_BATCHES = (2, 4, 8, 16, 32)


def network(stage, args) -> torch.nn.Module:
    """Ours, on the CPU."""
    if stage == "i":
        return SSFL(args.arch, args.classes, queue_size=args.queue)
    return {"ii": SLG, "iii": SDL}[stage](args.arch, args.classes)


class Ours:
    """A stage's training step as the training loop has it."""

    def __init__(self, stage, variant, args):
        self.stage, self.device = STAGES[stage], torch.device(args.device)
        self.channels_last, self.amp, compiled = VARIANTS[variant]
        torch.manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        self.model = network(stage, args).to(device=args.device, memory_format=layout).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad or self.stage.optimize_frozen]
        self.optimizer = torch.optim.SGD(parameters, **SGD)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.averages = Averages(self.device)
        if compiled:
            for name in self.stage.backbones:
                getattr(self.model, name).compile()

    def __call__(self, views, labels):
        """views: uint8 (N, 3, S, S), one or two of them, on the device. Returns the loss, on the device."""
        images = [normalize(view) for view in views]
        if self.channels_last:
            images = [view.to(memory_format=torch.channels_last) for view in images]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, AUTOCAST.get(self.amp), enabled=self.amp != "none"):
            loss, parts, logits = self.stage.step(self.model, images, labels, WEIGHTS)
        verdict = Verdict(loss, False)
        self.scaler.scale(loss).backward()
        verdict.bad()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.averages.add({"loss": loss, **parts, **train_accuracies(logits, labels)})
        return loss.detach()


class Textbook:
    """The plain version's step."""

    def __init__(self, stage, args):
        torch.manual_seed(0)
        self.model = textbook.STAGES[stage](args.arch, args.classes, args.queue).to(args.device).train()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], **SGD)

    def __call__(self, images, labels):
        return textbook.step(self.model, self.optimizer, images, labels)


def batch_of(stage, batch, args) -> tuple:
    """(uint8 views, labels) on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (textbook.STAGES[stage].views, batch, 3, args.size, args.size)
    views = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(args.device)
    labels = torch.randint(args.classes, (batch,), generator=generator).to(args.device)
    return list(views), labels


def stepper(stage, version, batch, args):
    """A function of no arguments that makes a step of the version: "textbook" or one of VARIANTS."""
    views, labels = batch_of(stage, batch, args)
    if version == "textbook":
        step, given = Textbook(stage, args), [normalize(view) for view in views]
    else:
        step, given = Ours(stage, version, args), views
    return lambda: step(given, labels)


def step_flops(stage, args) -> float:
    """Floating point operations of a step an image: of the backbones, a backward pass counted as two forward passes.

    (PyTorch's counter goes wrong in the backward pass of grouped convolutions; heads and losses are below 1 %.)
    """
    with torch.device("meta"):
        backbone, image = build_backbone(args.arch).eval(), torch.empty(1, 3, args.size, args.size)
    with FlopCounterMode(display=False) as counter:
        backbone(image)
    passes = {"i": 3 + 1, "ii": 1, "iii": 3 + 1}  # of the trained encoder and of the one without gradients
    return passes[stage] * counter.get_total_flops()


def measure(name, args):
    """A fresh process's part: the peak memory of two steps. name: stage:version."""
    stage, version = name.split(":")

    def two_steps():
        step = stepper(stage, version, args.batch, args)
        for _ in range(2):
            step()

    common.report_peak(two_steps, args.device, above=False)


def rows(stage, batch, args, argv, rates) -> list[tuple[str, ...]]:
    """One line a version. rates: operations a second of a matrix product, by type."""
    versions = ["textbook", *args.variants]
    taken = common.alternate(
        {version: stepper(stage, version, batch, args) for version in versions}, args.repeats, args.device
    )
    flops, lines = step_flops(stage, args) * batch, []
    for version in versions:
        peak = None
        if not args.no_memory:
            options = [*argv, "--batch", str(batch)]
            peak = common.in_fresh_process("benchmarks.step", options, f"{stage}:{version}")
        rate = rates[version.split()[0] if version.split()[0] in HALF else "float32"]
        lines.append(common.note((
            f"{stage.upper()}, {batch}", version, f"{batch / taken[version]:.2f}",
            f"{taken['textbook'] / taken[version]:.2f}", common.mib(peak), f"{flops / taken[version] / rate:.0%}",
        )))  # fmt: skip
    return lines


HEADERS = ("stage, batch", "version", "images/s", "times as fast", "peak memory", "share of the processor's peak")


def tables(args, argv) -> list[common.Table]:
    rates = {"float32": common.product_rate(args.device, size=args.product)}
    for name, dtype in HALF.items():
        if any(variant.startswith(name) for variant in args.variants):
            rates[name] = common.product_rate(args.device, dtype, args.product)
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}; matrix product: {peaks}"
    lines = [line for stage in args.stages for line in rows(stage, args.batch, args, argv, rates)]
    found = [common.Table("step", title, HEADERS, lines)]
    if args.scaling:
        by_batch = [
            line
            for stage in args.stages
            for batch in args.scaling_batches
            for line in rows(stage, batch, args, argv, rates)
        ]
        found.append(common.Table("step by batch", title, HEADERS, by_batch))
    return found


# ---- drift


def drift_batches(stage, args):
    """Batches (views, labels) to learn from: a view is the pattern of its class under fresh noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(args.classes, 3, args.size // 4, args.size // 4, generator=generator)
    patterns = torch.nn.functional.interpolate(patterns, size=(args.size, args.size), mode="bilinear")
    for _ in range(args.steps):
        labels = torch.randint(args.classes, (args.batch,), generator=generator)
        noise = torch.randn(textbook.STAGES[stage].views, args.batch, *patterns.shape[1:], generator=generator)
        views = (patterns[labels] + 0.3 * noise).clamp_(0, 1).mul_(255).to(torch.uint8)
        yield list(views.to(args.device)), labels.to(args.device)


def losses(stage, variant, args) -> list[float]:
    """Of each step of a training run: from one seed, on the same batches, whatever the variant."""
    step = Ours(stage, variant, args)
    return [step(views, labels).item() for views, labels in drift_batches(stage, args)]


def drift_tables(args, argv) -> list[common.Table]:
    measured = "mean loss, and mean distance to float32's"
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}; {measured}"
    spans = [(first, min(last, args.steps)) for first, last in DRIFT_SPANS if first < args.steps]
    headers = ("stage", "version", *(f"steps {first + 1} to {last}" for first, last in spans))
    lines = []
    for stage in args.stages:
        reference = losses(stage, "float32", args)
        for variant in ["float32", *(v for v in args.variants if v != "float32")]:
            found = reference if variant == "float32" else losses(stage, variant, args)
            cells = []
            for first, last in spans:
                distance = mean(abs(a - b) for a, b in zip(found[first:last], reference[first:last], strict=True))
                cells.append(f"{mean(found[first:last]):.4f}, {distance:.1e}")
            lines.append((stage.upper(), variant, *cells))
    return [common.Table("drift", title, headers, lines)]


def parse(argv):
    """The options."""
    drift = "--drift" in argv  # has its own defaults
    parser = common.argument_parser(__doc__, "step", repeats=5)
    parser.add_argument("--drift", action="store_true", help="how far the switches move the losses, on small images")
    parser.add_argument("--steps", type=int, default=200, help="of --drift")
    parser.add_argument("--stages", nargs="+", default=["i"] if drift else list(STAGES), choices=STAGES)
    parser.add_argument("--arch", default="resnet20" if drift else "resnext50_32x4d")
    parser.add_argument("--size", type=int, default=32 if drift else 224)
    parser.add_argument("--batch", type=int, default=64 if drift else 16)
    parser.add_argument("--classes", type=int, default=10 if drift else 1000)
    parser.add_argument("--queue", type=int, default=1024 if drift else 115712)
    parser.add_argument("--product", type=int, default=None, metavar="N", help="side of the matrix product")
    parser.add_argument("--scaling-batches", type=int, nargs="+", default=SCALING_BATCHES, metavar="N")
    half_and_compiled = list(VARIANTS)[1:] if drift else list(VARIANTS)
    on_cpu = half_and_compiled if drift else ["float32", "channels_last", "bf16"]
    default = half_and_compiled if torch.cuda.is_available() else on_cpu
    parser.add_argument("--variants", nargs="+", default=default, choices=VARIANTS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if args.measure:
        measure(args.measure, args)
    else:
        common.publish((drift_tables if args.drift else tables)(args, argv), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
