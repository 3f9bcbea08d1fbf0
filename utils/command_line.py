"""The parser of every command line of the project, types of flags, and the way a command ends."""

import argparse
import difflib
import math
import sys

from .errors import UserError, one_line

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses
NOT_GIVEN = object()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with `-` and `_` alike in flag names, errors of one line, and args.given: what the user set.

    intermixed: flags may stand between the words of a positional argument of several.
    """

    def __init__(self, description=None, intermixed=False, **options):
        self.intermixed = intermixed
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)

    def parse_args(self, argv=None):
        """As argparse's; the names of the arguments that were given stand in args.given."""
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        parse = super().parse_intermixed_args if self.intermixed else super().parse_args
        args = parse(argv, argparse.Namespace(**dict.fromkeys(defaults, NOT_GIVEN)))
        args.given = sorted(name for name, value in vars(args).items() if value is not NOT_GIVEN)
        for name in set(defaults) - set(args.given):
            setattr(args, name, defaults[name])
        return args

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; an unknown flag is named with the one that it resembles."""
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        words = []
        for word in args if args is not None else sys.argv[1:]:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = known.get(name.replace("_", "-"), name)
            words.append(name + equals + value)
        found, unknown = super().parse_known_args(words, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:  # the words after it are its value, or DIR: only the flag is to blame
            close = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {flags[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        return found, unknown

    def error(self, message):
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message} (--help lists the flags)")


def whole_number(least: int = 0, most: int = 2**31 - 1):
    """An argparse type: whole numbers from least to most, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text[:32])
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:32]}: must be from {least} to {most}")
        return value

    return parse


def number(least: float = 0.0, most: float = 1e9, above: float | None = None):
    """An argparse type: finite numbers from least, or above `above`, to most."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        too_small = value < least if above is None else value <= above
        if not math.isfinite(value) or too_small or value > most:
            bound = f"from {least:g}" if above is None else f"above {above:g}"
            raise argparse.ArgumentTypeError(f"{text[:32]}: must be {bound} to {most:g}")
        return value

    return parse


def run_command(work, parser: ArgumentParser, argv=None, interrupted: str = "stopped") -> int:
    """Calls work(args) and returns the exit status: work's (None is 0), 2 after a mistake, 130 after Ctrl-C.

    A mistake is said in one line on stderr; `interrupted` is said after Ctrl-C.
    """
    try:
        return work(parser.parse_args(argv)) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or parser.prog}: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return USER_ERROR
