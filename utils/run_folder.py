"""The folder of a run: locked against other runs, and what is written there besides the checkpoints."""

import zlib
from pathlib import Path

import torch

from . import checkpoint, log
from .arguments import resolved, unused_arguments
from .command_line import IDENTITY, STARTS_FROM
from .distributed import is_main_process, print_main, raise_on_all_ranks
from .errors import UserError, one_line
from .files import lexists, lock_folder
from .results import plots
from .results.records import read_args, read_runs, saved_checksums
from .results.tables import table

LIST_NAMES = {"train": "training", "val": "validation", "test": "test"}


class RunFolder:
    """The run's --output_dir; a with block on it keeps other runs out of the folder.

    Rank 0 writes; an evaluation writes only results.json and, with --plots, plots, and only if --output_dir was given.
    Entering raises UserError, on all ranks, if the folder cannot be written, another run uses it, or it holds a
    checkpoint or results that this run neither continues nor may overwrite.
    """

    def __init__(self, args):
        self.args = args
        self.path = Path(args.output_dir)
        self.writes = not args.evaluate or "output_dir" in args.given
        self.lock = None
        self.summary_writer = None
        self.test_facts = {}  # on rank 0: what the records of results.json say of the test list

    def __enter__(self):
        with raise_on_all_ranks():
            if is_main_process() and self.writes:
                if self.args.plots:
                    plots.require_matplotlib("--plots")
                if self.args.tensorboard:
                    log.require_tensorboard()
                self._claim()
        return self

    def __exit__(self, kind, *exception):
        try:
            if self.summary_writer is not None:
                self.summary_writer.close()
            if self.lock is not None:
                checkpoint.settle(self.path)
        except OSError:  # such as a full disk; it must not hide what ended the run
            if kind is None:
                raise
        finally:
            if self.lock is not None:
                self.lock.close()

    def _claim(self):
        """Locks the folder, and brings it in order."""
        folder = self.path
        args = self.args
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(folder)
        except BlockingIOError:
            raise UserError(f"--output_dir {folder}: another run is writing there; choose another folder") from None
        except OSError as error:
            raise UserError(
                f"--output_dir {folder}: cannot be written ({one_line(error)}); choose another folder"
            ) from None
        checkpoint.settle(folder)
        present = checkpoint.present_in(folder)
        has_results = lexists(folder / "results.json")
        problem = None
        if args.evaluate and present and has_results:
            problem = "holds the results.json of a training; to replace it add --overwrite"
        elif present and not args.evaluate and not self._continues():
            problem = f"holds {present[0].name}; continue with --resume auto, start over with --overwrite"
        elif has_results and not present and not args.evaluate:
            problem = "holds the results.json of an earlier run, but no checkpoint; start over with --overwrite"
        if problem and not args.overwrite:
            raise UserError(f"--output_dir {folder}: {problem}, or choose another folder")

    def _continues(self) -> bool:
        """Whether --resume names a checkpoint in this folder."""
        return bool(self.args.resume) and Path(self.args.resume).parent.resolve() == self.path.resolve()

    def _sources(self) -> dict[str, str]:
        """The files that the weights come from, argument -> path; with --resume, its checkpoint alone."""
        unused = {name for _, names in unused_arguments(self.args) for name in names}
        names = ["resume"] if self.args.resume else ["pretrained", *self.args.marked[STARTS_FROM]]
        return {name: path for name in names if name not in unused and (path := getattr(self.args, name, None))}

    def start(self, state, data):
        """Prints the run's settings, and begins what it writes: args.json, log.txt so far, TensorBoard's files.

        With --overwrite the earlier run is set aside here; it is removed once this one has a checkpoint.
        """
        print_main(log.run_summary(state, data))
        with raise_on_all_ranks():
            if not is_main_process():
                return
            self._compare_with_sources(state, data)
            if self.args.evaluate:
                return
            kept = 0  # epochs of the earlier run
            if self._continues():
                checkpoint.quarantine_unreadable(self.path, self.args.resume)
                kept = state.epoch
            elif checkpoint.present_in(self.path) or lexists(self.path / "results.json"):
                checkpoint.set_aside(self.path)
            if kept < self.args.epochs:  # else results.json may already be that of all epochs
                (self.path / "results.json").unlink(missing_ok=True)
            self._write_args(state, data)
            log.truncate_log(self.path, kept)
            if self.args.tensorboard:
                self.summary_writer = log.require_tensorboard()(str(self.path), purge_step=kept)

    def _compare_with_sources(self, state, data):
        """Notes the images that the weights were or will be trained on, and warns of lists that may not be meant.

        These are validation and test lists with some of those images, and lists that differ from those in the args.json
        next to a checkpoint that the run starts from: its training list, or all three with --resume.
        """
        sources = self._sources()
        digests = []
        for name, path in sources.items():
            if (earlier := checkpoint.trained_on(path)) is not None:
                digests.append(earlier.flatten())
            saved = {} if self.args.evaluate or name == "pretrained" else saved_checksums(Path(path).parent)
            for split in LIST_NAMES if name == "resume" else ("train",):
                if saved.get(split) not in (None, data.checksums.get(split)):
                    print_main(f"warning: {path} was trained with another {LIST_NAMES[split]} list")
        if not self.args.evaluate and state.epoch < self.args.epochs:
            digests.append(data.train.dataset.digests())
        self.test_facts = {"test_checksum": data.checksums["test"]}
        if not digests:  # published weights do not tell
            return
        state.model.trained_on = torch.cat(digests).unique()
        came_from = f" ({next(iter(sources.values()))})" if sources else ""
        for loader in filter(None, (data.val, data.test)):
            seen = int(torch.isin(loader.dataset.digests(), state.model.trained_on).sum())
            if loader is data.test:
                self.test_facts["test_trained_on"] = seen
            if seen:
                what = f"{seen} of {len(loader.dataset)} {LIST_NAMES[loader.name]} images"
                print_main(
                    f"warning: {what} were trained on, by this run or one that it came from{came_from}: accuracies on "
                    "them say nothing of new images"
                )

    def _write_args(self, state, data):
        """Writes args.json; a resumed run keeps the path that it once started from, a finished run the whole file."""
        file = self.path / "args.json"
        values = resolved(self.args)
        starts_from = list(self.args.marked[STARTS_FROM])
        if self._continues() and lexists(file):
            if state.epoch >= self.args.epochs:
                return
            try:
                earlier = read_args(self.path)
            except UserError:  # damaged: it is written anew
                earlier = {}
            values |= {name: earlier.get(name) for name in starts_from if not values[name]}
        if (trained_on := state.model.trained_on) is not None:
            digests = {"images": len(trained_on), "checksum": zlib.crc32(trained_on.numpy())}
            values["trained_on"] = digests | {"test_images": self.test_facts["test_trained_on"]}
        values |= {"num_classes": data.num_classes, "device": data.test.device.type}
        values |= {"identity": self.args.marked[IDENTITY], "starts_from": starts_from}
        log.write_json(file, values | {"list_checksums": data.checksums, "environment": log.environment()})

    def write_epoch(self, record: dict):
        """Adds an epoch's record to log.txt, and to TensorBoard's files with --tensorboard; on rank 0."""
        log.append_epoch(self.path, record)
        if self.summary_writer is not None:
            log.add_scalars(self.summary_writer, record)

    def finish(self, results: dict[str, dict], *commands: str):
        """Writes the results, and prints where the run's files are and the commands that may come next."""
        self.write_results(results)
        files = [checkpoint.LAST, checkpoint.BEST, "log.txt", "results.json", "args.json"]
        files = [name for name in files if (self.path / name).exists()]
        print_main("\n".join([f"\nin {self.path}: {', '.join(files)}", "next:", *(f"  {c}" for c in commands)]))

    def write_results(self, results: dict[str, dict]):
        """Prints the table of the test list, writes results.json, and draws the plots with --plots.

        results: classifier -> its record.
        """
        results = {name: result | self.test_facts for name, result in results.items()}
        print_main("\n" + table({f"{name} classifier": result for name, result in results.items()}))
        if is_main_process() and self.writes:
            records = [{"phase": "test", "classifier": name, **result} for name, result in results.items()]
            log.write_json(self.path / "results.json", records)
            if self.args.plots:
                plots.write_plots(read_runs([self.path])[0], self.path / "plots")
                print_main(f"plots: {self.path / 'plots'}")
