"""The parser of all command lines of the project, recipes, the types of flags, and how a command ends."""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from pathlib import Path

from .errors import Unavailable, UserError, drop_unwritable_output, one_line, print_stack, retry
from .files import is_dir

__version__ = "1.0.0"
# Exit statuses.
USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

NOT_GIVEN = object()
END = "--end-of-recipe"  # stands after the words of a recipe, so that its last flag does not take the word after @FILE
MAX_DEPTH = 10  # of recipes within recipes
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)  # in a recipe
ON_OFF = argparse.BooleanOptionalAction  # --flag and --no-flag

# Facts that hold of a flag, given where it is declared (add_flag). Without RUN_ONLY, a flag is also KEPT and IDENTITY.
RUN_ONLY = "run only"  # it concerns one run alone: paths, workers, printing
KEPT = "kept"  # checkpoints keep its value
IDENTITY = "identity"  # runs that differ in it are not seeds of one training
ALIKE = "alike"  # all ranks must have the same value; KEPT and IDENTITY each imply it
NETWORK = "network"  # the next stage and an evaluation take it from the checkpoint
EVALUATION = "evaluation"  # an evaluation takes it from the checkpoint
GOES_ON = "goes on"  # the command for the next stage repeats it
STARTS_FROM = "starts from"  # it names the checkpoint of an earlier stage


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with `-` and `_` equivalent in flag names, one-line errors, and the names given in args.given.

    intermixed: flags may come between the values of one positional argument.
    """

    def __init__(self, description=None, intermixed=False, **options):
        self.intermixed = intermixed
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, exit_on_error=False, **options)
        version = f"SSD-LT {__version__}"
        self.add_argument("--version", action="version", version=version, dest=argparse.SUPPRESS)

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
        for word in map(expand_home, args if args is not None else sys.argv[1:]):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = known.get(with_hyphens(name), name)
            words.append(name + equals + value)
        try:
            parsed, unknown = super().parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            of_value = isinstance(error.__context__, argparse.ArgumentTypeError)  # its message begins with the value
            self.error(f"{name}{'' if of_value else ':'} {error.message}")
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:  # the words after it may be its value, or DIR: only the flag is wrong
            self.error(f"unrecognized arguments: {flags[0]}{self.hint(flags[0])}")
        return parsed, unknown

    def hint(self, flag: str) -> str:
        """What to add to the message that a flag is unknown: one that it resembles."""
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def knows(self, word: str) -> bool:
        """Whether a word names one of the flags, or is a short one with its value, such as -b64."""
        names = set(map(with_hyphens, self._option_string_actions))
        name = with_hyphens(word.partition("=")[0])
        return name in names or (not word.startswith("--") and word[:2] in names)

    def marked(self, *facts: str) -> dict[str, argparse.Action]:
        """The flags of which one of the facts holds, by destination; of several with one destination, the first."""
        found = {}
        for action in self._actions:
            if has_value(action) and not set(facts).isdisjoint(get_facts(action)):
                found.setdefault(action.dest, action)
        return found

    def check_value(self, action: argparse.Action, value):
        """Raises UserError if the command line could not give a flag this value, which comes from a file."""
        namespace = argparse.Namespace()
        words = option_words(action, value)
        name, *values = shlex.split(words)
        is_flag = any(word.startswith("-") for word in values)  # such as --help, which would end the run
        try:
            if not is_flag:
                argparse.ArgumentParser.parse_known_args(self, [".", name, *values], namespace)
        except argparse.ArgumentError as error:
            self.error(f"{words}: {error.message}")
        if is_flag or getattr(namespace, action.dest) != value:
            self.error(f"{words}: is of another type")

    def error(self, message):
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message} (--help lists the flags)")


def expand_home(word: str) -> str:
    """Expands ~ in a word of the command line where shells do not: in @~/FILE and --flag=~/PATH."""
    start, sign, path = word.partition("=") if word.startswith("--") else ("", word[:1], word[1:])
    return start + sign + os.path.expanduser(path) if sign in ("@", "=") else word


def expand_recipes(words: list[str], folder: Path = Path(), depth: int = 0) -> list[str]:
    """The words, with those of its recipe in place of each @FILE.

    A recipe has words as in a shell, on any number of lines, and comments from # on; ~ and $VARIABLE are expanded, and
    @FILE in it is relative to its own folder. Raises UserError, with file and line, for a recipe that cannot be read
    or names a variable that is not set.
    """
    expanded = []
    for word in words:
        expanded += [*read_recipe(folder / word[1:], depth), END] if word.startswith("@") else [word]
    return expanded


def read_recipe(path: Path, depth: int) -> list[str]:
    """The words of a recipe, those of the recipes in it included."""
    if is_dir(path):
        raise UserError(f"@{path}: is a folder; name a recipe in it, such as @{path / 'stage_i.txt'}")
    try:
        lines = retry(Path.read_bytes, path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"@{path}: no such recipe, or not a text file ({one_line(error)}); correct the path") from None
    if depth == MAX_DEPTH:
        raise UserError(f"@{path}: recipes within recipes, more than {MAX_DEPTH} deep; does one contain itself?")
    words = []
    for number, line in enumerate(lines, 1):
        try:
            for word in shlex.split(line, comments=True):
                word = VARIABLE.sub(lambda match: os.environ[match[1].strip("{}")], word)
                words.append(expand_home(os.path.expanduser(word)))
        except KeyError as error:
            name = error.args[0]
            raise UserError(f"{path}, line {number}: ${name} is not set; set it, or write its value instead") from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; close the quotation in the same line") from None
    return expand_recipes(words, path.parent, depth + 1)


def has_value(action: argparse.Action) -> bool:
    """Whether an action sets an attribute of args, as --help does not."""
    return action.dest not in ("help", argparse.SUPPRESS)


def add_flag(group, *names_and_facts: str, **options):
    """Calls group.add_argument(*names, **options), and notes which of the facts above hold of the flag."""
    names = [word for word in names_and_facts if word.startswith("-")]
    group.add_argument(*names, **options).facts = {word for word in names_and_facts if word not in names}


def get_facts(action: argparse.Action) -> set[str]:
    """The facts of a flag, with those that they imply: KEPT and IDENTITY without RUN_ONLY, and ALIKE with either."""
    facts = set(getattr(action, "facts", ()))
    if action.option_strings and RUN_ONLY not in facts:
        facts |= {KEPT, IDENTITY}
    return facts if facts.isdisjoint({KEPT, IDENTITY}) else facts | {ALIKE}


def with_hyphens(flag: str) -> str:
    """The spelling of a flag by which it is compared."""
    return flag.replace("_", "-")


def option_name(action: argparse.Action) -> str:
    """A flag's long name."""
    return next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])


def option_words(action: argparse.Action, value) -> str:
    """The words of a command line that give a flag its value, as a shell takes them."""
    name = option_name(action)
    if isinstance(value, bool):
        return name if value else name.replace("--", "--no-", 1)
    return shlex.join([name, *map(str, value if isinstance(value, list | tuple) else [value])])


def number(least: float = 0.0, most: float = 1e6, above: float | None = None, kind: type = float):
    """An argparse type: numbers of a kind, int or float, from least (or greater than `above`) to most."""
    bounds = f"at least {least:.12g}" if above is None else f"above {above:g}"
    expected = f"must be a {'whole ' if kind is int else ''}number, {bounds} and at most {most:.12g}"

    def parse(text: str):
        digits = text.removeprefix("-").isdecimal()  # int also takes underscores, blanks and a plus
        try:
            value = kind(text) if kind is float or digits else math.nan
        except ValueError:  # not a number, or of thousands of digits
            value = math.nan
        if not least <= value <= most or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"{text[:40]}: {expected}")
        return value

    return parse


def whole_number(least: int = 0, most: int = 2**31 - 1):
    """An argparse type: whole numbers from least to most, both included."""
    return number(least, most, kind=int)


def non_empty(text: str) -> str:
    """An argparse type: text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("'': is empty; name a file or folder")
    return text


def prepare_streams():
    """Makes stdout escape the characters that its encoding cannot represent, for example in a path.

    Opens the null device in place of a closed stdin, stdout or stderr, as after 2>&-: otherwise the next file to be
    opened would get its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(work, parser: ArgumentParser, argv=None, interrupted: str = "stopped") -> int:
    """Calls work(args) and returns the exit status, which is work's own (None is 0) unless it fails.

    It is 2 after a mistake, 75 if the system could not read a file that may be fine, 130 after Ctrl-C, and 141 if the
    reader of the output has closed it. A mistake is printed as one line on stderr, after the stack if the environment
    has TRACEBACK=1; `interrupted` is printed after Ctrl-C.
    """
    prepare_streams()
    try:
        status = work(parser.parse_args(argv)) or 0
        sys.stdout.flush()  # here, where a failure is reported
        return status
    except BrokenPipeError:
        drop_unwritable_output()
        return BROKEN_PIPE
    except (UserError, Unavailable, OSError, MemoryError, KeyboardInterrupt) as error:
        print_stack(error)
        if isinstance(error, KeyboardInterrupt):
            print(interrupted, file=sys.stderr)
            return INTERRUPTED
        message = str(error) or "out of memory"
        if isinstance(error, OSError):  # a full disk, a folder that may not be written
            drop_unwritable_output()
            message = f"{error.filename or parser.prog}: {one_line(error)}"
        print(f"error: {message}", file=sys.stderr)
        return os.EX_TEMPFAIL if isinstance(error, Unavailable) else USER_ERROR
