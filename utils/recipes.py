"""Recipes: text files of command line words, which @FILE puts in its place."""

import re
import shlex
from pathlib import Path

from .command_line import with_hyphens
from .errors import UserError, one_line

END = "--end-of-recipe"  # stands after the words of a recipe, so that its last flag does not take the word after @FILE
MAX_DEPTH = 10  # of recipes within recipes


class RecipeWord(str):
    """A word of a recipe; origin: the file and line that it stands in."""

    origin = ""


def expand(words: list[str], folder: Path = Path(), depth: int = 0) -> list[str]:
    """The words, with those of its recipe in place of each @FILE.

    A recipe has words as in a shell, on any number of lines, and comments from # on; @FILE in it is relative to its own
    folder. Raises UserError, with file and line, for a recipe that cannot be read.
    """
    expanded = []
    for word in words:
        expanded += [*read_recipe(folder / word[1:], depth), END] if word.startswith("@") else [word]
    return expanded


def read_recipe(path: Path, depth: int) -> list[str]:
    """The words of a recipe, those of the recipes in it included."""
    if path.is_dir():
        raise UserError(f"@{path}: is a folder; name a recipe in it, such as @{path / 'stage_i.txt'}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"@{path}: no such recipe, or not a text file ({one_line(error)}); correct the path") from None
    if depth == MAX_DEPTH:
        raise UserError(f"@{path}: recipes within recipes, more than {MAX_DEPTH} deep; does one contain itself?")
    words = []
    for number, line in enumerate(lines, 1):
        try:
            found = [RecipeWord(word) for word in shlex.split(line, comments=True)]
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; close the quotation in the same line") from None
        for word in found:
            word.origin = f"{path}, line {number}"
        words += found
    return expand(words, path.parent, depth + 1)


def origin(message: str, words: list[str]) -> str:
    """File and line of the flag that a message begins with, if a recipe was the last to give it; else empty."""
    flag = re.search(r"--[\w-]+", message)
    given = [w for w in expand(words) if flag and with_hyphens(w.partition("=")[0]) == with_hyphens(flag[0])]
    return getattr(given[-1], "origin", "") if given else ""
