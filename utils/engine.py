"""The training loop that the stages share: data, optimizer, epochs, checkpoints, evaluation.

A stage says what its network, its step and its flags are (Stage); run(stage, argv) does everything else.
"""

import fcntl
import functools
import os
import secrets
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.device_augment import to_float
from datasets.loaders import batches, build_loader, close
from datasets.samplers import BatchSampler, EvalBatchSampler, ShuffledSampler
from datasets.splits import find_splits
from datasets.transforms import Views
from models.preprocess import normalize

from . import args as arguments
from . import checkpoint, distributed, log, report
from .averages import Averages, train_accuracies
from .distributed import gather_objects, together
from .errors import UserError
from .evaluate import evaluate
from .launch import USER_ERROR, launch
from .numerics import AUTOCAST, Verdict, seed_everything, set_numerics
from .schedule import learning_rate
from .signals import Stopped

MOST_CLASSES = 10**6  # beyond, a label is taken for a mistake, which could cost all memory


class Stage:
    """What distinguishes a stage; each script derives its own."""

    name: str  # "i", "ii" or "iii"
    backbones: tuple[str, ...]  # attributes of the network, for --compile
    optimize_frozen = False  # whether the optimizer also holds parameters that take no gradient, as published

    def parser(self) -> arguments.ArgumentParser:
        """The stage's command line."""
        raise NotImplementedError

    def classifiers(self, args) -> tuple[str, ...]:
        """Names of what the network returns in eval mode; the best checkpoint is that of the last."""
        raise NotImplementedError

    def views(self, args) -> tuple[str, ...]:
        """Names of a training image's views, of datasets.transforms.VIEWS."""
        return ("query",)

    def build(self, args) -> torch.nn.Module:
        """The network, with what it takes from the stage before, unless --resume brings it all."""
        raise NotImplementedError

    def step(self, model, views, labels, args):
        """(loss, {name: part of the loss}, {classifier: logits}) of a batch."""
        raise NotImplementedError

    def sampler(self, labels, args, **where):
        """The training sampler; where: seed, rank, world_size."""
        return ShuffledSampler(len(labels), **where)


def run(stage: Stage, argv=None) -> int:
    """A stage from its command line to its exit status; a user's mistake ends in one line on stderr and status 2."""
    parser = stage.parser()
    try:
        args = parser.parse_args(argv)
        args.program = parser.prog
        arguments.check(args)
        return launch(functools.partial(run_process, stage), args)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR


def run_process(stage: Stage, args, place, device, stop):
    """One process's part of the run; the others, if any, are at the same line."""
    process = Run(stage, args, place, device, stop)
    stop.defer()
    try:
        if not args.evaluate:
            process.train()
        process.test()
    finally:
        for loader in process.loaders.values():
            close(loader)


class Run:
    """A training run, or an evaluation: everything that it is made of, ready to go on where it stopped."""

    def __init__(self, stage: Stage, args, place, device, stop):
        self.stage, self.args, self.place, self.device, self.stop = stage, args, place, device, stop
        self.main = place.rank == 0
        self.epoch, self.step, self.best, self.partial = args.start_epoch, 0, 0.0, None
        self.folder = Path(args.output_dir)
        self.classifiers = stage.classifiers(args)
        self.writes = not args.evaluate or "output_dir" in args.given
        content = self._open_checkpoint()
        self._settle_defaults(content)
        with together():
            self._check_batch(content)
            self._claim_folder()
        self._find_data()
        with together():
            self._check_labels()
            self._build(content)
        self._build_loaders()
        if args.compile:
            for name in stage.backbones:
                getattr(self.network, name).compile()
        self.model = self.network
        if distributed.world() > 1 and not args.evaluate:
            self.model = data_parallel(self.network, device)
        with together():
            self._remember()

    def say(self, text):
        """Prints on rank 0."""
        if self.main:
            print(text, flush=True)

    # ---- set-up, in the order of __init__

    def _open_checkpoint(self):
        if self.args.resume == "auto":
            found = None
            with together():
                if self.main:
                    found = checkpoint.newest(self.folder)
                    if found is None and self.args.evaluate:
                        raise UserError(f"--resume auto: no checkpoint in {self.folder}; name one")
            self.args.resume = str(gather_objects(found)[0] or "")
        if not self.args.resume:
            return None
        with together():
            content = checkpoint.read_run(self.args.resume, "--resume")
            for note in checkpoint.adopt(content, self.args):
                self.say(note)
            return content

    def _settle_defaults(self, content):
        """Chooses what the user left open or what cannot serve here, and says what was chosen."""
        args, place = self.args, self.place
        saved = (content or {}).get("run", {})
        args.deterministic = args.seed is not None or bool(saved.get("deterministic"))
        if args.seed is None:
            args.seed = gather_objects(saved.get("seed", secrets.randbelow(2**31)))[0]
            if not args.evaluate:
                self.say(f"seed {args.seed}" + (", as saved" if "seed" in saved else ", drawn; repeat with --seed"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if "workers" not in args.given and args.workers > cores:
            args.workers = cores
            self.say(f"{cores} data loading workers, one a core (--workers)")
        if self.device.type == "cpu" and place.launcher != "plain" and args.dist_backend == "nccl":
            args.dist_backend = "gloo"
            self.say("gloo instead of nccl: there is no GPU in use (--dist-backend)")
        args.eval_batch_size = args.eval_batch_size or args.batch_size
        self.batch_size = args.batch_size // place.local_world
        self.workers = -(-args.workers // place.local_world)

    def _check_batch(self, content):
        """Refuses a batch that the processes or the queue cannot take; warns where resuming will not be exact."""
        args, place, step = self.args, self.place, self.batch_size * self.place.world
        if args.evaluate:
            return
        if self.batch_size < 2:
            raise UserError(
                f"--batch-size {args.batch_size}: {place.local_world} processes need at least "
                f"{2 * place.local_world}, two images each, for BatchNorm"
            )
        if self.batch_size * place.local_world != args.batch_size:
            self.say(f"--batch-size {args.batch_size}: {self.batch_size} images a process")
        if getattr(args, "moco_k", step) < step:
            raise UserError(f"--moco-k {args.moco_k}: the queue must hold at least a step's {step} keys")
        saved = (content or {}).get("run", {})
        now = {"seed": args.seed, "batch_size": args.batch_size, "world_size": place.world}
        for name, value in now.items():
            if saved.get(name, value) != value:
                self.say(f"warning: {name} is {value}, it was {saved[name]}: the result will not be bit-identical")

    def _claim_folder(self):
        """Refuses a folder that another run uses, or that holds a checkpoint which this run would write over."""
        args, folder = self.args, self.folder
        self.obsolete = []
        if not self.main or not self.writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output_dir {folder}: another run is writing there; choose another folder") from None
        checkpoint.remove_leftovers(folder)
        files = [folder / name for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)]
        present = [file for file in files if file.exists()]
        inside = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
        if present and not inside and not args.evaluate:
            if not args.overwrite:
                raise UserError(
                    f"--output_dir {folder}: holds {present[0].name}; continue with --resume auto, "
                    "start anew with --overwrite, or choose another folder"
                )
            self.obsolete = present

    def _find_data(self):
        """The splits; the first process of a node looks for their files, the others take its word."""
        args, place = self.args, self.place
        given = {split: getattr(args, f"{split}_list") for split in ("train", "val", "test")}
        wanted = ("train", "test") if args.evaluate else ("train", "val", "test")

        def progress(iterator):
            return tqdm(iterator, desc="looking for the images", leave=False, disable=None if self.main else True)

        with together():
            splits = find_splits(args.data, given, wanted, progress, check=place.local_rank == 0)
        looked = gather_objects({name: (split.layout, split.missing) for name, split in splits.items()})
        found = looked[place.rank - place.local_rank]
        self.splits = {n: split._replace(layout=found[n][0], missing=found[n][1]) for n, split in splits.items()}

    def _check_labels(self):
        """Refuses missing files, labels beyond --num-classes, and data that give no step."""
        args, place = self.args, self.place
        for name, split in self.splits.items():
            if not (args.evaluate and name == "train"):  # of which only the counts are used
                split.require()
        labels = self.splits["train"].index.labels
        if args.num_classes is None:
            index = self.splits["train"].index
            args.num_classes = index.num_classes
            if args.num_classes > MOST_CLASSES:
                line = index.line(int(labels.argmax()))
                raise UserError(
                    f"{index.name}, line {line}: the label {args.num_classes - 1} would mean {args.num_classes} "
                    "classes; correct the list, or give --num-classes"
                )
        for split in self.splits.values():
            largest = split.index.num_classes - 1
            if largest >= args.num_classes:
                line = split.index.line(int(split.index.labels.argmax()))
                raise UserError(
                    f"{split.index.name}, line {line}: the label {largest} is out of range of {args.num_classes} "
                    f"classes; correct the list, or give --num-classes {largest + 1}"
                )
        self.train_counts = torch.bincount(labels, minlength=args.num_classes)
        sampler = self.stage.sampler(labels, args, seed=args.seed, rank=place.rank, world_size=place.world)
        self.batch_sampler = BatchSampler(sampler, self.batch_size)
        if self.batch_sampler.steps == 0 and not args.evaluate:
            raise UserError(
                f"--batch-size {args.batch_size}: the training list's {len(labels)} images give no full step; lower it"
            )

    def _build(self, content):
        args, stage = self.args, self.stage
        set_numerics(args)
        seed_everything(args.seed)
        self.network = stage.build(args)
        if content is not None:
            checkpoint.agree(args.resume, "--resume", content["state_dict"], (stage.name,), args.arch, args.num_classes)
        layout = torch.channels_last if args.channels_last else torch.preserve_format
        self.network.to(device=self.device, memory_format=layout)
        parameters = [p for p in self.network.parameters() if p.requires_grad or stage.optimize_frozen]
        hyperparameters = {"momentum": args.momentum, "weight_decay": args.weight_decay}
        hyperparameters["fused"] = args.amp == "fp16" or None  # skips an overflowed step without asking the host
        self.optimizer = torch.optim.SGD(parameters, lr=args.lr, **hyperparameters)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        if content is None:
            return
        restored = (self.network,) if args.evaluate else (self.network, self.optimizer, self.scaler)
        checkpoint.restore(args.resume, "--resume", content, stage.name, *restored)
        for group in self.optimizer.param_groups:
            group.update(hyperparameters)
        self.epoch, self.step = int(content.get("epoch", 0)), int(content.get("step", 0))
        self.best, self.partial = float(content.get("best_acc1", 0.0)), content.get("averages")
        if self.step > self.batch_sampler.steps and not args.evaluate:
            raise UserError(
                f"{args.resume}: stopped at step {self.step}, of {self.batch_sampler.steps} here; resume with "
                "the lists, --batch-size and processes it was saved with"
            )

    def _build_loaders(self):
        args, place, pinned = self.args, self.place, self.device.type == "cuda"
        dataset = self.splits["train"].dataset(Views(self.stage.views(args), args.image_size, args.seed, args.augment))
        self.loaders = {"train": build_loader(dataset, self.batch_sampler, self.workers, pinned)}
        for name in set(self.splits) - {"train"}:
            dataset = self.splits[name].dataset(Views(("eval",), args.image_size))
            size = max(1, args.eval_batch_size // place.local_world)
            shard = EvalBatchSampler(len(dataset), size, place.rank, place.world)
            self.loaders[name] = build_loader(dataset, shard, self.workers, pinned)

    def _remember(self):
        """Starts the run's folder: args.json, and log.txt up to the checkpoint."""
        if self.main and not self.args.evaluate:
            for file in self.obsolete:
                file.unlink()
            if self.args.resume:
                checkpoint.set_aside_unreadable(self.folder, self.args.resume)
            log.write_json(
                self.folder / "args.json", arguments.resolved(self.args) | {"environment": log.environment()}
            )
            log.keep_epochs(self.folder, self.epoch if self.args.resume else 0)
            self.board = log.open_board(self.folder, self.epoch) if self.args.tensorboard else None

    # ---- training

    def train(self):
        """From the epoch and step where the run stands to its last epoch, with a checkpoint after each."""
        args = self.args
        while self.epoch < args.epochs:
            started = time.perf_counter()
            lr = learning_rate(self.epoch, args.lr, args.epochs, args.cos, args.schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            first = self.step
            averages = self._train_epoch(lr)
            seconds = time.perf_counter() - started
            images = (self.step - first) * self.batch_size * self.place.world
            means = averages.global_means()
            results = self.evaluate("val", averages)
            best_of = results[self.classifiers[-1]]["overall"]
            is_best = best_of > self.best
            self.best = max(best_of, self.best)
            self.epoch, self.step, self.partial = self.epoch + 1, 0, None
            if self.main:
                speed = {"images_per_second": images / seconds, "seconds": seconds}
                self._log_epoch({"epoch": self.epoch - 1, "lr": lr, **means}, results, speed)
            self.save(is_best)
            self._leave_if_asked()

    def _train_epoch(self, lr) -> Averages:
        args, scaler = self.args, self.scaler
        averages = Averages(self.device)
        if self.partial:
            averages.load(self.partial)
        self.model.train()
        self.batch_sampler.start_at(self.epoch, self.step)
        title = f"epoch {self.epoch + 1}/{args.epochs}"
        progress = log.Progress(title, self.batch_sampler.steps, args.print_freq, self.step, quiet=not self.main)
        for views, labels, indices in batches(self.loaders["train"]):
            seed_everything(args.seed, self.epoch, self.step, self.place.rank)
            views, labels = [self._to_device(view) for view in views], labels.to(self.device, non_blocking=True)
            self.optimizer.zero_grad(set_to_none=True)  # before the activations come, to lower the peak
            with self._autocast():
                loss, parts, logits = self.stage.step(self.model, views, labels, args)
            verdict = Verdict(loss, self.stop.asked)
            scaler.scale(loss).backward()
            if verdict.bad():
                self._report_bad_numbers(loss, lr, indices)
            scaler.step(self.optimizer)
            scaler.update()
            self.step += 1
            averages.add({"loss": loss, **parts, **train_accuracies(logits, labels)})
            progress.step(lambda: ", ".join(f"{name} {value:.4g}" for name, value in averages.means().items()))
            if verdict.stop():
                self._save_and_leave(averages)
            if args.save_every_steps and self.step % args.save_every_steps == 0:
                self.save(averages=averages)
        progress.close()
        return averages

    def _log_epoch(self, means: dict, results: dict[str, dict], speed: dict):
        """A line in log.txt and on screen, and TensorBoard's figures where asked for."""
        kept = ("overall", "top5", "many", "medium", "few")
        validation = {name: {key: result[key] for key in kept} for name, result in results.items()}
        record = {**means, "val": validation, **speed}
        log.append_epoch(self.folder, record)
        if self.board is not None:
            log.add_scalars(self.board, record)
        shown = [
            f"{name} {value:.4f}" for name, value in means.items() if name not in ("epoch", "lr") and "top" not in name
        ]
        shown += [f"validation {name} {report.percent(r['overall'])} %" for name, r in results.items()]
        self.say(f"epoch {self.epoch}/{self.args.epochs}: {', '.join(shown)}; {speed['seconds']:.0f} s")

    def _to_device(self, view):
        """A view of the loader's as normalised floats on the device."""
        images, parameters = view if isinstance(view, list) else (view, None)
        images = images.to(self.device, non_blocking=True)
        images = normalize(images if parameters is None else to_float(images, parameters))
        return images.to(memory_format=torch.channels_last) if self.args.channels_last else images

    def _autocast(self):
        return torch.autocast(self.device.type, AUTOCAST.get(self.args.amp), enabled=self.args.amp != "none")

    def _report_bad_numbers(self, loss, lr, indices):
        index = self.splits["train"].index
        mine = None
        if not loss.isfinite():
            lines = ", ".join(str(index.line(i)) for i in indices)
            mine = f"batch of {index.name}, lines {lines}"
        culprit = next(text for text in gather_objects(mine) if text)
        error = UserError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {self.step + 1}, learning rate {lr:g}; weights "
            f"and checkpoints stay as they were; lower --lr, or look at the {culprit}"
        )
        error.everywhere = True
        raise error

    # ---- stopping and saving

    def save(self, is_best=False, averages: Averages | None = None):
        """Writes last_checkpoint.pth.tar, in the published format with what exact resuming needs beside it.

        averages: those of the epoch, in the midst of one. Only rank 0 writes; all must call it then.
        """
        partial = averages.state() if averages is not None else None
        if not self.main:
            return
        args = self.args
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "stage": self.stage.name,
            "arch": args.arch,
            "state_dict": {f"module.{name}": value for name, value in self.network.state_dict().items()},
            "best_acc1": torch.tensor(self.best, dtype=torch.float64),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": partial,
            "run": {
                "seed": args.seed, "deterministic": args.deterministic, "image_size": args.image_size,
                "batch_size": args.batch_size, "world_size": self.place.world,
            },
        }  # fmt: skip
        checkpoint.save(self.folder, state, is_best)

    def _save_and_leave(self, averages):
        self.save(averages=averages)
        self._leave()

    def _leave(self):
        if self.args.evaluate:
            error = Stopped("stopped on request; evaluate again with the same command")
        elif self.epoch == self.args.epochs:
            error = Stopped("stopped on request before the test evaluation was done; continue with --resume auto")
        else:
            place = f"epoch {self.epoch + 1}, step {self.step}"
            error = Stopped(f"stopped on request at {place}; continue with --resume auto")
        error.everywhere = True
        raise error

    def _asked_anywhere(self) -> bool:
        return any(gather_objects(self.stop.asked))

    def _leave_if_asked(self):
        if self._asked_anywhere():
            self._leave()

    # ---- evaluation

    def evaluate(self, split: str, averages: Averages | None = None) -> dict[str, dict]:
        """Results by classifier over a split, with rank 0's BatchNorm statistics. Leaves where a stop was asked for."""
        distributed.broadcast_buffers(self.network)
        loader = self.loaders[split]
        self.network.eval()

        def shard():
            progress = log.Progress(split, len(loader), self.args.print_freq, quiet=not self.main)
            for (view,), labels, _ in batches(loader):
                if self.stop.asked:
                    break
                yield self._to_device(view), labels.to(self.device, non_blocking=True)
                progress.step(str)
            progress.close()

        def predict(images):
            with self._autocast():
                logits = self.network(images)
            return (logits if isinstance(logits, tuple) else (logits,))[: len(self.classifiers)]

        def stop_before_counting():
            if self._asked_anywhere():
                if averages is not None:
                    self._save_and_leave(averages)
                self._leave()

        return evaluate(predict, shard(), self.classifiers, self.train_counts, self.device, stop_before_counting)

    def test(self):
        """The test list, with the weights as they are: results.json and the table."""
        results = self.evaluate("test")
        if not self.main:
            return
        self.say("\n" + report.table({f"{name} classifier": result for name, result in results.items()}))
        if self.writes:
            records = [{"phase": "test", "classifier": name, **result} for name, result in results.items()]
            log.write_json(self.folder / "results.json", records)


def data_parallel(network, device) -> DistributedDataParallel:
    """The network with its gradients averaged over ranks, and no buffer ever sent.

    The queue is the same everywhere by construction, and large; BatchNorm's running statistics serve evaluation alone,
    which takes rank 0's.
    """
    buffers = [name for name, _ in network.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
