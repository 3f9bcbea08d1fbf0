"""Recipes: text files of command line words, which @FILE puts in its place."""

import shlex
from pathlib import Path

from .errors import UserError, one_line

END = "--end-of-recipe"  # stands after the words of a recipe, so that its last flag does not take the word after @FILE
MAX_DEPTH = 10  # of recipes within recipes


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
            words += shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; close the quotation in the same line") from None
    return expand(words, path.parent, depth + 1)
