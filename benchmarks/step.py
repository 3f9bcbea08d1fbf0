"""Training steps of the three stages, compared with plain baselines, with the published network and image size.

    python -m benchmarks.step [--stages i ii iii] [--batch 16] [--variants float32 channels_last bf16] [--scaling]
    python -m benchmarks.step --drift                         how much each switch changes the losses over 200 steps

Our steps are those of the scripts' train_one_epoch, on a batch of uint8 images that is normalized in each step as the
loader does; the baseline is given normalized images. Peak memory is that of a process that runs two steps. Before each
timed step a matrix product of the same type is timed. The peak rate of a type is the best rate of the run, of a product
or of a step, so that no share of it is above 100 %.
"""

import sys
from statistics import mean, median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from benchmarks import baseline, common
from datasets.loaders import to_device
from models import ARCHS, SDL, SLG, SSFL, build_backbone
from models.preprocess import normalize
from utils.command_line import whole_number
from utils.metrics import MetricLogger
from utils.numerics import set_numerics
from utils.train_state import TrainState, prepare_model

SCRIPTS = {"i": ssd_stage_i, "ii": ssd_stage_ii, "iii": ssd_stage_iii}
VARIANTS = {  # the scripts' flags
    "float32": "",
    "channels_last": "--channels-last",
    "tf32": "--channels-last --tf32",
    "bf16": "--channels-last --amp bf16",
    "fp16": "--channels-last --amp fp16",
    "float32 compiled": "--channels-last --compile",
    "tf32 compiled": "--channels-last --tf32 --compile",
    "bf16 compiled": "--channels-last --amp bf16 --compile",
    "fp16 compiled": "--channels-last --amp fp16 --compile",
}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUGE = 2**31 - 1  # steps: no progress line, which would wait for the device, is printed
DRIFT_SPANS = ((0, 10), (10, 50), (50, 200))
SCALING_BATCHES = (2, 4, 8, 16, 32)


# ---- our training


def script_args(stage, variant, arch, classes, size, queue):
    """The arguments of a stage's script, with the flags of a variant."""
    flags = (
        f"--arch {arch} --num-classes {classes} --image-size {size} --lr 0.01 --print-freq {HUGE} {VARIANTS[variant]}"
    )
    if stage == "i":
        flags += f" --moco-k {queue}"
    args = SCRIPTS[stage].get_parser().parse_args([*flags.split(), "."])
    args.seed = 0  # set here, since --seed would ask for deterministic algorithms
    return args


def network(stage, options) -> torch.nn.Module:
    """A stage's network on the CPU; options: of script_args."""
    if stage == "i":
        moco = options.moco_dim, options.moco_k, options.moco_m, options.moco_t
        return SSFL(options.arch, options.num_classes, *moco)
    if stage == "ii":
        return SLG(options.arch, options.num_classes)
    return SDL(options.arch, options.num_classes, options.kd_t)


class RepeatedBatch:
    """Replaces datasets.loaders.Loader: yields the same batch `count` times per epoch.

    views: uint8 (N, 3, S, S); labels (N,). Like the Loader, it normalizes the views each time it yields them.
    """

    name = "the benchmark's batch"

    def __init__(self, views, labels, device, channels_last: bool = False, count: int = 1):
        self.views, self.labels, self.device, self.channels_last = views, labels, device, channels_last
        self.count, self.images_per_step, self.images_per_epoch = count, len(labels), HUGE

    def start_at(self, epoch: int, position: int):
        """Does nothing: every epoch and step has the same batch."""

    def locate(self) -> str:
        return self.name

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            views = tuple(to_device(view, self.device, self.channels_last) for view in self.views)
            yield views, self.labels.to(self.device, non_blocking=True), list(range(len(self.labels)))


class Ours:
    """The training of a stage's script, called with one batch at a time; variant: one of VARIANTS."""

    def __init__(self, stage, variant, args):
        self.script, self.device = SCRIPTS[stage], torch.device(args.device)
        self.args = options = script_args(stage, variant, args.arch, args.classes, args.size, args.queue)
        torch.manual_seed(0)
        self.model = prepare_model(network(stage, options), self.device, options)
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad or stage == "i"],
            options.lr, options.momentum, weight_decay=options.weight_decay, fused=options.amp == "fp16" or None,
        )  # fmt: skip
        self.state = TrainState(stage, self.model, optimizer, None, self.device, options)

    def __call__(self, views, labels):
        """Runs a step; views: one or two tensors, uint8 (N, 3, S, S), on the device."""
        loader = RepeatedBatch(views, labels, self.device, self.args.channels_last)
        with common.quiet():
            self.script.train_one_epoch(self.model, loader, self.state, self.args)

    def loss(self, views, labels) -> float:
        """Runs a step and returns its loss."""
        self.state.metrics = MetricLogger(self.device)
        self(views, labels)
        return self.state.metrics.means()["loss"]


# ---- time, memory, rate


class Baseline:
    """The plain version's step."""

    def __init__(self, stage, args):
        options = script_args(stage, "float32", args.arch, args.classes, args.size, args.queue)
        set_numerics(options)  # the same precision of products as ours
        torch.manual_seed(0)
        self.model = baseline.STAGES[stage](args.arch, args.classes, args.queue).to(args.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, options.lr, options.momentum, weight_decay=options.weight_decay)

    def __call__(self, images, labels):
        return baseline.step(self.model, self.optimizer, images, labels)


def batch_of(stage, batch, args) -> tuple:
    """(uint8 views, labels) on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (baseline.STAGES[stage].views, batch, 3, args.size, args.size)
    views = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(args.device)
    labels = torch.randint(args.classes, (batch,), generator=generator).to(args.device)
    return list(views), labels


def stepper(stage, version, batch, args):
    """A function without arguments that runs a step of the version: "baseline" or one of VARIANTS."""
    views, labels = batch_of(stage, batch, args)
    if version == "baseline":
        step, images = Baseline(stage, args), [normalize(view) for view in views]
    else:
        step, images = Ours(stage, version, args), views
    return lambda: step(images, labels)


def step_flops(stage, arch, size) -> float:
    """Floating point operations per image of a step, in the backbones; a backward pass counts as two forward passes.

    (PyTorch's counter goes wrong in the backward pass of grouped convolutions; heads and losses are below 1 %.)
    """
    with torch.device("meta"):
        backbone, image = build_backbone(arch).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        backbone(image)
    passes = {"i": 3 + 1, "ii": 1, "iii": 3 + 1}  # of the trained encoder and of the one without gradients
    return passes[stage] * counter.get_total_flops()


def products(dtype, args) -> tuple[dict, float]:
    """({name: function}, operations of each): a square matrix product, computed in two ways.

    Whether the library for linear algebra or that for convolutions is faster depends on the processor.
    """
    side = args.product or (2048 if args.device == "cpu" else 8192)
    left, right = torch.randn(2, side, side, device=args.device).to(dtype).unbind()
    images = left.view(1, side, 1, side).to(memory_format=torch.channels_last)
    kernels = right.view(side, side, 1, 1).to(memory_format=torch.channels_last)
    functions = {"matmul": lambda: left @ right, "conv2d": lambda: torch.nn.functional.conv2d(images, kernels)}
    return functions, 2 * side**3


class Line(NamedTuple):
    """A version's measurements; rate: operations per second."""

    stage: str
    batch: int
    version: str
    seconds: float
    baseline_seconds: float
    peak_memory: int | None
    rate: float

    def row(self, share: str) -> tuple[str, ...]:
        """The cells of a table's row."""
        return (
            f"{self.stage.upper()}, {self.batch}", self.version, f"{self.batch / self.seconds:.2f}",
            f"{self.baseline_seconds / self.seconds:.2f}", common.mib(self.peak_memory), share,
        )  # fmt: skip


def under_numerics(function, version, args):
    """The function, called with TF32 and cuDNN's settings as the version's flags ask for them."""
    variant = "float32" if version == "baseline" else version
    options = script_args("ii", variant, args.arch, args.classes, args.size, args.queue)

    def call():
        set_numerics(options)
        return function()

    return call


def dtype_name(version) -> str:
    """The precision of a version's products, one of DTYPES."""
    first = version.split()[0]
    return first if first in DTYPES else "float32"


def measure_lines(stage, batch, args, argv, peak_rates) -> list[Line]:
    """One Line per version; raises peak_rates (operations per second by type) to the best rate measured."""
    versions = ["baseline", *args.variants]
    by_dtype = {name: products(DTYPES[name], args) for name in {dtype_name(version) for version in versions}}
    functions = {}
    for version in versions:  # each version is preceded by products of its type
        for name, product in by_dtype[dtype_name(version)][0].items():
            functions[version, name] = under_numerics(product, version, args)
        functions[version, "step"] = under_numerics(stepper(stage, version, batch, args), version, args)
    taken = common.alternate(functions, args.repeats, args.device)
    flops, lines = step_flops(stage, args.arch, args.size) * batch, []
    for (version, name), durations in taken.items():
        dtype = dtype_name(version)
        best = (flops if name == "step" else by_dtype[dtype][1]) / min(durations)
        peak_rates[dtype] = max(best, peak_rates.get(dtype, 0.0))
    for version in versions:
        peak_memory = None
        if not args.no_memory:
            options = [*argv, "--batch", str(batch)]
            peak_memory = common.in_fresh_process("benchmarks.step", options, f"{stage}:{version}")
        seconds, of_baseline = median(taken[version, "step"]), median(taken["baseline", "step"])
        lines.append(Line(stage, batch, version, seconds, of_baseline, peak_memory, flops / seconds))
        common.note(lines[-1].row(f"{lines[-1].rate / 1e9:,.0f} GFLOP/s"))
    return lines


def measure(name, args):
    """In a fresh process: prints the peak memory of two steps; name: stage:version."""
    stage, version = name.split(":")

    def two_steps():
        step = stepper(stage, version, args.batch, args)
        for _ in range(2):
            step()

    common.report_peak(two_steps, args.device, above=False)


HEADERS = ("stage, batch", "version", "images/s", "times as fast", "peak memory", "share of the processor's peak")


def tables(args, argv) -> list[common.Table]:
    """Steps by stage, and by batch with --scaling."""
    peak_rates, by_table = {}, {"step": [args.batch]}
    if args.scaling:
        by_table["step by batch"] = args.scaling_batches
    lines = {
        name: [
            line for stage in args.stages for batch in batches
            for line in measure_lines(stage, batch, args, argv, peak_rates)
        ]
        for name, batches in by_table.items()
    }  # fmt: skip
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peak_rates.items())
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}; peak: {peaks}"
    return [
        common.Table(
            name,
            title,
            HEADERS,
            [line.row(f"{line.rate / peak_rates[dtype_name(line.version)]:.0%}") for line in found],
        )
        for name, found in lines.items()
    ]


# ---- drift


def drift_batches(stage, args):
    """Yields (views, labels) to learn from: a view is the pattern of its class with new noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(args.classes, 3, args.size // 4, args.size // 4, generator=generator)
    patterns = torch.nn.functional.interpolate(patterns, size=(args.size, args.size), mode="bilinear")
    for _ in range(args.steps):
        labels = torch.randint(args.classes, (args.batch,), generator=generator)
        noise = torch.randn(baseline.STAGES[stage].views, args.batch, *patterns.shape[1:], generator=generator)
        views = (patterns[labels] + 0.3 * noise).clamp_(0, 1).mul_(255).to(torch.uint8)
        yield list(views.to(args.device)), labels.to(args.device)


def losses(stage, variant, args) -> list[float]:
    """The loss of each step of a training, from the same seed and on the same batches for every variant."""
    step = Ours(stage, variant, args)
    return [step.loss(views, labels) for views, labels in drift_batches(stage, args)]


def drift_tables(args, argv) -> list[common.Table]:
    """Tables of how far the variants' losses are from those of float32."""
    measured = "mean loss, and mean distance from float32's"
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}; {measured}"
    spans = [(first, min(last, args.steps)) for first, last in DRIFT_SPANS if first < args.steps]
    headers = ("stage", "version", *(f"steps {first + 1} to {last}" for first, last in spans))
    rows = []
    for stage in args.stages:
        reference = losses(stage, "float32", args)
        for variant in ["float32", *(v for v in args.variants if v != "float32")]:
            found = reference if variant == "float32" else losses(stage, variant, args)
            cells = []
            for first, last in spans:
                distance = mean(abs(a - b) for a, b in zip(found[first:last], reference[first:last], strict=True))
                cells.append(f"{mean(found[first:last]):.4f}, {distance:.1e}")
            rows.append((stage.upper(), variant, *cells))
    return [common.Table("drift", title, headers, rows)]


def get_parser(drift: bool = False):
    """The flags; drift: with the defaults of --drift."""
    parser = common.argument_parser(__doc__, "step", repeats=5)
    add, size = parser.add_argument, whole_number(1)
    add("--drift", action="store_true", help="show how much the switches change the losses, on small images")
    add("--steps", type=size, default=200, metavar="N", help="steps of --drift (default: %(default)s)")
    add("--stages", nargs="+", default=["i"] if drift else list(SCRIPTS), choices=SCRIPTS)
    add("--arch", default="resnet20" if drift else "resnext50_32x4d", choices=ARCHS, metavar="ARCH")
    add("--size", type=whole_number(8), default=32 if drift else 224, metavar="S", help="side of the images")
    add("--batch", type=whole_number(2), default=64 if drift else 16, metavar="N", help="images per step")
    add("--classes", type=size, default=10 if drift else 1000, metavar="C")
    add("--queue", type=size, default=1024 if drift else 115712, metavar="K", help="keys in stage I's queue")
    add("--product", type=size, default=None, metavar="N", help="rows of the square matrix product")
    add("--scaling-batches", type=whole_number(2), nargs="+", default=SCALING_BATCHES, metavar="N")
    without_float32 = list(VARIANTS)[1:] if drift else list(VARIANTS)
    on_cpu = without_float32 if drift else ["float32", "channels_last", "bf16"]
    default = without_float32 if torch.cuda.is_available() else on_cpu
    add("--variants", nargs="+", default=default, choices=VARIANTS)
    return parser


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    drift = "--drift" in argv
    return common.run(get_parser(drift), argv, drift_tables if drift else tables, measure)


if __name__ == "__main__":
    sys.exit(main())
