"""Runs main_worker(args, device) on every rank, and says in one line why a run failed.

There are five ways to start a run: a plain call (one process, no process group), a plain call per node with
--world-size, --multiprocessing-distributed (this process starts one process per GPU, or --nproc of them, and watches
them: spawn.py), torchrun and srun (they start the processes). rendezvous.py detects the way and joins the processes;
failures.py tells why one failed.
"""

import contextlib
import sys
from multiprocessing import active_children

import torch.distributed as dist

from ..command_line import prepare_streams
from ..distributed import close_progress
from ..errors import drop_unwritable_output
from ..signals import handle_stop_signals
from .failures import describe_failure, exit_now, tell_torchrun
from .rendezvous import detect_launcher, process_group
from .spawn import fork_workers, run_processes


def launch(main_worker, parser, argv=None) -> int:
    """Calls main_worker(args, device) in this process, or in those that it starts, and returns the exit status.

    The status is 0 after success, 2 after a user's mistake, 75 if the run was stopped and can continue, 130 after a
    second Ctrl-C, 141 if the reader of the output has closed it, and 1 after any other failure. The reason is printed
    on stderr, in one line if it is known; with TRACEBACK=1 in the environment the stack is printed before it.
    """
    status = 0
    message = ""
    others = active_children()
    prepare_streams()
    fork_workers()
    with handle_stop_signals(parser.prog, exits=argv is None):  # words from sys.argv: the process ends with main()
        try:
            args = parser.parse_args(argv)
            info = detect_launcher(args)
            if info.launcher == "spawn":
                status, message = run_processes(main_worker, args, info)
            else:
                with process_group(args, info) as device:
                    main_worker(args, device)
        except (Exception, KeyboardInterrupt) as error:
            close_progress()
            status, message = describe_failure(error)
            for child in set(active_children()) - set(others):  # data workers ignore the signal of an exit
                child.kill()
        if message:
            with contextlib.suppress(OSError):
                print(f"{parser.prog}: {message}", file=sys.stderr, flush=True)
            tell_torchrun(message)
        drop_unwritable_output()
        if dist.is_initialized():  # only after a failure
            exit_now(status)
    return status
