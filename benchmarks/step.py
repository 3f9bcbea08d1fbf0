"""Training steps of the three stages, compared with plain baselines, with the published network and image size.

    python -m benchmarks.step [--stages i ii iii] [--batch 16] [--variants float32 channels_last bf16] [--scaling]
    python -m benchmarks.step --drift                         how much each switch changes the losses over 200 steps

Our steps are those of the scripts' train_one_epoch, on a batch of uint8 images that is normalized in each step as the
loader does; the baseline is given normalized images. Peak memory is that of a process that runs two steps. GFLOP/s are
those of the backbones' convolutions, where a backward pass counts as two forward passes.
"""

import contextlib
import io
import sys
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from benchmarks import baseline, common
from datasets.loaders import to_device
from models import ARCHS, STAGES, build_backbone
from models.preprocess import normalize
from utils.command_line import whole_number
from utils.errors import UserError
from utils.train_state import TrainState, prepare_model, set_numerics

SCRIPTS = {"i": ssd_stage_i, "ii": ssd_stage_ii, "iii": ssd_stage_iii}
VARIANTS = {  # the scripts' flags
    "float32": "",
    "channels_last": "--channels-last",
    "tf32": "--channels-last --tf32",
    "bf16": "--channels-last --amp bf16",
    "fp16": "--channels-last --amp fp16",
    "bn_splits_4": "--channels-last --bn-splits 4",
    "float32 compiled": "--channels-last --compile",
    "tf32 compiled": "--channels-last --tf32 --compile",
    "bf16 compiled": "--channels-last --amp bf16 --compile",
    "fp16 compiled": "--channels-last --amp fp16 --compile",
    "bn_splits_4 compiled": "--channels-last --bn-splits 4 --compile",
}
BY_ROUNDING = [name for name in VARIANTS if "bn_splits" not in name]  # their results differ by rounding alone
SPLITS = 4  # parts of a batch in the other variants
HUGE = 2**31 - 1  # steps
DRIFT_SPANS = ((0, 10), (10, 50), (50, 200))
SCALING_BATCHES = (2, 4, 8, 16, 32)


# ---- the steps that are compared


def script_args(stage, version, args):
    """The arguments of a stage's script, with the flags of a variant; the baseline has none."""
    flags = f"--arch {args.arch} --num-classes {args.classes} --image-size {args.size} --lr 0.01 --print-freq {HUGE}"
    queue = f"--moco-k {args.queue}" if stage == "i" else ""
    options = SCRIPTS[stage].get_parser().parse_args([*f"{flags} {queue} {VARIANTS.get(version, '')}".split(), "."])
    options.seed = 0  # set here, since --seed would ask for deterministic algorithms
    return options


def network(stage, options) -> torch.nn.Module:
    """A stage's network on the CPU; options: of script_args."""
    moco = {"queue_size": options.moco_k} if stage == "i" else {}
    return STAGES[stage](options.arch, options.num_classes, bn_splits=options.bn_splits, **moco)


class RepeatedBatch:
    """Replaces datasets.loaders.Loader: yields the same batch `count` times per epoch.

    views: uint8 (N, 3, S, S); labels (N,). Like the Loader, it normalizes the views each time it yields them.
    """

    def __init__(self, views, labels, device, channels_last: bool = False, count: int = 1):
        self.views = views
        self.labels = labels
        self.device = device
        self.channels_last = channels_last
        self.count = count
        self.images_per_step = len(labels)

    def start_at(self, epoch: int, position: int):
        """Does nothing: every epoch and step has the same batch."""

    def locate(self) -> str:
        return "the benchmark"

    def __len__(self):
        return HUGE  # as if more followed: the line that ends an epoch would wait for the device

    def __iter__(self):
        for _ in range(self.count):
            views = tuple(to_device(view, self.device, self.channels_last) for view in self.views)
            yield views, self.labels.to(self.device, non_blocking=True), list(range(len(self.labels)))


class Ours:
    """The training of a stage's script, called with one batch at a time; variant: one of VARIANTS."""

    def __init__(self, stage, variant, args):
        self.script = SCRIPTS[stage]
        self.device = torch.device(args.device)
        self.args = options = script_args(stage, variant, args)
        torch.manual_seed(0)
        self.model = prepare_model(network(stage, options), self.device, options)
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad or stage == "i"],
            options.lr, options.momentum, weight_decay=options.weight_decay, fused=options.amp == "fp16" or None,
        )  # fmt: skip
        self.state = TrainState(self.model, optimizer, self.device, options)

    def __call__(self, views, labels):
        """Runs a step; views: one or two tensors, uint8 (N, 3, S, S), on the device."""
        set_numerics(self.args.tf32, self.args.deterministic)  # other versions take their turns
        self.train(self.model, RepeatedBatch(views, labels, self.device, self.args.channels_last))

    def train(self, model, loader):
        """Runs the script's train_one_epoch, without its progress bar."""
        with contextlib.redirect_stderr(io.StringIO()):
            self.script.train_one_epoch(model, loader, self.state.optimizer, self.state, self.args)

    def loss(self, views, labels) -> float:
        """Runs a step and returns its loss."""
        self.state.step = 0
        self.state.images_seen = 0
        self.state.metrics.reset()
        self(views, labels)
        return self.state.metrics.means()["loss"]


class Baseline:
    """The plain version's step."""

    def __init__(self, stage, args):
        options = script_args(stage, "baseline", args)
        torch.manual_seed(0)
        self.model = baseline.STAGES[stage](args.arch, args.classes, args.queue).to(args.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, options.lr, options.momentum, weight_decay=options.weight_decay)

    def __call__(self, images, labels):
        set_numerics(tf32=False, deterministic=False)  # as ours in float32
        return baseline.step(self.model, self.optimizer, images, labels)


def make_batch(stage, batch, args) -> tuple:
    """(uint8 views, labels) on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (baseline.STAGES[stage].views, batch, 3, args.size, args.size)
    views = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(args.device)
    labels = torch.randint(args.classes, (batch,), generator=generator).to(args.device)
    return list(views), labels


def stepper(stage, version, batch, args):
    """A function without arguments that runs a step of the version: "baseline" or one of VARIANTS."""
    views, labels = make_batch(stage, batch, args)
    if version == "baseline":
        step = Baseline(stage, args)
        images = [normalize(view) for view in views]
    else:
        step = Ours(stage, version, args)
        images = views
    return lambda: step(images, labels)


def check_batches(batches, args):
    """Raises UserError if a variant with BatchNorm by parts cannot split one of the batches."""
    wrong = [batch for batch in batches if batch % SPLITS or batch < 2 * SPLITS]
    if wrong and not set(args.variants) <= set(BY_ROUNDING):
        raise UserError(f"--batch {wrong[0]}: bn_splits_{SPLITS} needs a multiple of {SPLITS}, at least {2 * SPLITS}")


# ---- time, memory, rate


def step_flops(stage, args) -> float:
    """Floating point operations per image of a step, in the backbones.

    (PyTorch's counter goes wrong in the backward pass of grouped convolutions; heads and losses are below 1 %.)
    """
    with torch.device("meta"):
        backbone = build_backbone(args.arch).eval()
        image = torch.empty(1, 3, args.size, args.size)
    with FlopCounterMode(display=False) as counter:
        backbone(image)
    return STAGES[stage].passes * counter.get_total_flops()


def table_rows(stage, batch, args, argv) -> list[tuple[str, ...]]:
    """One row per version."""
    versions = ["baseline", *args.variants]
    functions = {version: stepper(stage, version, batch, args) for version in versions}
    taken = common.medians(functions, args.repeats, args.device)
    flops = step_flops(stage, args) * batch
    options = [*argv, "--batch", str(batch)]
    rows = []
    for version, seconds in taken.items():
        peak = None if args.no_memory else common.in_fresh_process("benchmarks.step", options, f"{stage}:{version}")
        times = f"{batch / seconds:.2f}", f"{taken['baseline'] / seconds:.2f}"
        rate = f"{flops / seconds / 1e9:,.0f}"
        rows.append(common.note((f"{stage.upper()}, {batch}", version, *times, common.mib(peak), rate)))
    return rows


def measure(name, args):
    """In a fresh process: prints the peak memory of two steps; name: stage:version."""
    stage, version = name.split(":")

    def two_steps():
        step = stepper(stage, version, args.batch, args)
        step()
        step()

    common.report_peak(two_steps, args.device, above=False)


HEADERS = ("stage, batch", "version", "images/s", "times as fast", "peak memory", "GFLOP/s")


def tables(args, argv) -> list[common.Table]:
    """Steps by stage, and by batch with --scaling."""
    sizes = {"step": [args.batch]} | ({"step by batch": args.scaling_batches} if args.scaling else {})
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}"
    check_batches([batch for batches in sizes.values() for batch in batches], args)
    found = []
    for name, batches in sizes.items():
        parts = [table_rows(stage, batch, args, argv) for stage in args.stages for batch in batches]
        found.append(common.Table(name, title, HEADERS, [row for rows in parts for row in rows]))
    return found


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
    """A table of how far the variants' losses are from those of float32."""
    check_batches([args.batch], args)
    measured = "mean loss, and mean distance from float32's"
    title = f"{common.command('benchmarks.step', argv)}; {common.machine(args.device)}; {measured}"
    spans = [(first, min(last, args.steps)) for first, last in DRIFT_SPANS if first < args.steps]
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
    headers = ("stage", "version", *(f"steps {first + 1} to {last}" for first, last in spans))
    return [common.Table("drift", title, headers, rows)]


def get_parser(drift: bool = False):
    """The flags; drift: with the defaults of --drift."""
    parser = common.argument_parser(__doc__, "step", repeats=5)
    add = parser.add_argument
    size = whole_number(1)
    add("--drift", action="store_true", help="show how much the switches change the losses, on small images")
    add("--steps", type=size, default=200, metavar="N", help="steps of --drift (default: %(default)s)")
    add("--stages", nargs="+", default=["i"] if drift else list(SCRIPTS), choices=SCRIPTS)
    add("--arch", default="resnet20" if drift else "resnext50_32x4d", choices=ARCHS, metavar="ARCH")
    add("--size", type=whole_number(8), default=32 if drift else 224, metavar="S", help="side of the images")
    add("--batch", type=whole_number(2), default=64 if drift else 16, metavar="N", help="images per step")
    add("--classes", type=size, default=10 if drift else 1000, metavar="C")
    add("--queue", type=size, default=1024 if drift else 115712, metavar="K", help="keys in stage I's queue")
    add("--scaling-batches", type=whole_number(2), nargs="+", default=SCALING_BATCHES, metavar="N")
    default = BY_ROUNDING if torch.cuda.is_available() else ["float32", "channels_last", "bf16"]
    add("--variants", nargs="+", default=default[1:] if drift else default, choices=VARIANTS)
    return parser


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    drift = "--drift" in argv
    return common.run(get_parser(drift), argv, drift_tables if drift else tables, measure)


if __name__ == "__main__":
    sys.exit(main())
