"""Config files, read more strictly than YAML: a repeated key is an error, and errors name their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from proard.config.fields import ConfigError


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the keys and values of a YAML or JSON file.

    Parameters
    ----------
    path : str or Path
        A config file of a run or a Snakemake profile.

    Returns
    -------
    dict
        The result of a plain YAML loader.

    Raises
    ------
    ConfigError
        The file cannot be read, is not YAML (the message names file, line and column) or has no keys; or a section has
        a key twice, of which YAML would silently use the last one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    loader = None
    try:
        loader = yaml.SafeLoader(text.replace("\t", " ") if _is_json(text) else text)
        node = loader.get_single_node()
        repeated = _repeated(node, ())
        if repeated:
            key, first, second = repeated
            raise ConfigError(
                f"{path}: {key} is given twice, in line {first} and in line {second}; merge them into one"
            )
        content = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}{_place(error)}: not valid YAML: {_what(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no keys")
    return content


def _is_json(text: str) -> bool:
    """Whether a text is JSON, in which tabs may indent."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _repeated(node: yaml.Node | None, path: tuple[str, ...]) -> tuple[str, int, int] | None:
    """The first key that a section contains twice: dotted name and both lines. Merge keys (`<<`) may repeat."""
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, (_repeated(entry, (*path, str(i))) for i, entry in enumerate(node.value))), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name = (*path, str(key.value))
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in lines:
                return ".".join(name), lines[key.tag, key.value], line
            lines[key.tag, key.value] = line
        found = _repeated(value, name)
        if found:
            return found
    return None


def _place(error: yaml.MarkedYAMLError) -> str:
    """Line and column of an error, if known."""
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _what(error: yaml.MarkedYAMLError) -> str:
    """The problem, and the first line of the section that contains it."""
    began = error.context_mark
    where = f" from line {began.line + 1}" if began and error.context else ""
    tabs = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
    return f"{error.problem}{f' ({error.context}{where})' if error.context else ''}{tabs}"
