"""The parser of all command lines of the project, the types of their flags, and how a command ends."""

import argparse
import difflib
import math
import os
import select
import shlex
import sys

from .errors import UserError, one_line, print_stack

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit statuses
NOT_GIVEN = object()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with `-` and `_` equivalent in flag names, errors of one line, and args.given, what the user gave.

    intermixed: flags may come between the values of one positional argument.
    """

    def __init__(self, description=None, intermixed=False, **options):
        self.intermixed = intermixed
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, exit_on_error=False, **options)

    def parse_args(self, argv=None):
        """As in argparse; args.given has the names of the arguments that were given."""
        defaults = {action.dest: action.default for action in self._actions if has_value(action)}
        parse = super().parse_intermixed_args if self.intermixed else super().parse_args
        args = parse(argv, argparse.Namespace(**dict.fromkeys(defaults, NOT_GIVEN)))
        args.given = sorted(name for name, value in vars(args).items() if value is not NOT_GIVEN)
        for name in set(defaults) - set(args.given):
            setattr(args, name, defaults[name])
        return args

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; the error for an unknown flag suggests one that it resembles."""
        known = {with_hyphens(option): option for option in self._option_string_actions}
        words = []
        for word in args if args is not None else sys.argv[1:]:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = known.get(with_hyphens(name), name)
            words.append(name + equals + value)
        try:
            found, unknown = super().parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            of_value = isinstance(error.__context__, argparse.ArgumentTypeError)  # its message begins with the value
            self.error(f"{name}{'' if of_value else ':'} {error.message}")
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:  # the words after it may be its value, or DIR: only the flag is wrong
            self.error(f"unrecognized arguments: {flags[0]}{self.hint(flags[0])}")
        return found, unknown

    def hint(self, flag: str) -> str:
        """What to add to the message that a flag is unknown: one that it resembles."""
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def saved_actions(self) -> dict[str, argparse.Action]:
        """The flags that a checkpoint keeps, by destination: all but those that run_only marked."""
        return {a.dest: a for a in self._actions if a.option_strings and has_value(a) and not hasattr(a, "run_only")}

    def error(self, message):
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message} (--help lists the flags)")


def has_value(action: argparse.Action) -> bool:
    """Whether an action sets an attribute of args, as --help does not."""
    return action.dest not in ("help", argparse.SUPPRESS)


def run_only(action: argparse.Action) -> argparse.Action:
    """Marks a flag that concerns one run alone (paths, workers, device, printing): a checkpoint does not keep it."""
    action.run_only = True
    return action


def with_hyphens(flag: str) -> str:
    """The spelling of a flag by which it is compared: `-` and `_` are equivalent in its name."""
    return flag.replace("_", "-")


def option_name(action: argparse.Action) -> str:
    """The flag's long name."""
    return next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])


def option_words(action: argparse.Action, value) -> str:
    """The words of a command line that give a flag its value."""
    name = option_name(action)
    if isinstance(value, bool):
        return name if value else name.replace("--", "--no-", 1)
    return shlex.join([name, *map(str, value if isinstance(value, list | tuple) else [value])])


def check_value(action: argparse.Action, value):
    """A value from a file as the flag's type returns it. Raises ValueError if the command line could not give it."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{option_name(action)} is on or off")
        return value
    if value is None and action.default is None:
        return None
    several = action.nargs in ("*", "+") or isinstance(action.nargs, int)
    if several != isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
        raise ValueError(f"{option_name(action)} has another number of values")
    try:
        values = [action.type(str(item)) if action.type else str(item) for item in (value if several else [value])]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{option_name(action)} {error}") from None
    if action.choices and not set(values) <= set(action.choices):
        raise ValueError(f"{option_name(action)} {values[0]} is unknown")
    return values if several else values[0]


def whole_number(least: int = 0, most: int = 2**31 - 1):
    """An argparse type: whole numbers from least to most, both included."""

    def parse(text: str) -> int:
        if len(text) > 20 or not text.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be a whole number from {least} to {most}")
        check_bounds(text, int(text), least, most)
        return int(text)

    return parse


def number(least: float = 0.0, most: float = 1e6, above: float | None = None):
    """An argparse type: numbers from least (or greater than `above`) to most."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be a number")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be above {above:g}")
        check_bounds(text, value, least, most)
        return value

    return parse


def check_bounds(text: str, value: float, least: float, most: float):
    """Raises ArgumentTypeError if a value is not between least and most."""
    if value < least:
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be at least {least:g}")
    if value > most:
        raise argparse.ArgumentTypeError(
            f"{text[:40]}: must be at most {most if isinstance(most, int) else f'{most:g}'}"
        )


def non_empty(text: str) -> str:
    """An argparse type: text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("'': is empty; name a file or folder")
    return text


def output_is_closed() -> bool:
    """Whether the reader of the output, such as head, has closed it; what is still written then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    if not poll.poll(0):
        return False
    drop_unwritable_output()
    return True


def drop_unwritable_output():
    """If stdout cannot be written, sends what it still holds nowhere: flushing it at the exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_unprintable():
    """Lets stdout escape the characters of paths and names that a terminal or file of its encoding cannot hold."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(work, parser: ArgumentParser, argv=None, interrupted: str = "stopped") -> int:
    """Calls work(args) and returns the exit status: work's (None is 0), 2 after a mistake, 130 after Ctrl-C.

    A mistake is printed as one line on stderr, after the stack if the environment has TRACEBACK=1; `interrupted` is
    printed after Ctrl-C.
    """
    escape_unprintable()
    try:
        status = work(parser.parse_args(argv)) or 0
        sys.stdout.flush()  # here, where a failure is reported
        return status
    except BrokenPipeError:
        drop_unwritable_output()
        return BROKEN_PIPE
    except (UserError, OSError, KeyboardInterrupt) as error:
        print_stack(error)
        if isinstance(error, KeyboardInterrupt):
            print(interrupted, file=sys.stderr)
            return INTERRUPTED
        message = str(error)
        if isinstance(error, OSError):  # a full disk, a folder that may not be written
            drop_unwritable_output()
            message = f"{error.filename or parser.prog}: {one_line(error)}"
        print(f"error: {message}", file=sys.stderr)
        return USER_ERROR
