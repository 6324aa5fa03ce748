"""Reads options from a JSON or YAML file as command-line arguments, so that the same checks apply to both."""

import json
from functools import partial
from pathlib import Path

import yaml

SETTINGS_ENDINGS = (".json", ".yaml", ".yml")


def read_settings(path, known):
    """Command-line arguments from a JSON or YAML file.

    Args:
        known: names of all options.

    Raises:
        ValueError: if the file is not an object of options, or contains an unknown option.
    """
    is_json = str(path).endswith(".json")
    load, kind = (partial(json.loads, object_pairs_hook=_once_each), "JSON") if is_json else (_load_yaml, "YAML")
    try:
        settings = load(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not {kind}: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold an object of options; it holds a {type(settings).__name__}.")
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"{path}: there is no option {', '.join(unknown)[:200]}. See run_retrieval.py --help.")
    arguments = []
    for name, value in settings.items():
        if isinstance(value, list):
            if not value or any(isinstance(each, list | dict) or str(each).startswith("-") for each in value):
                refuse_settings(path, f"{name} must be a list of plain values, not empty")
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def _once_each(pairs):
    """The pairs of a JSON or YAML object as a dict; parsers would take the last of two values without a word."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands in it twice")
    return dict(pairs)


def _load_yaml(text):
    root = yaml.compose(text, yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        _once_each([(name.value, value) for name, value in root.value])
    return yaml.safe_load(text)


def refuse_settings(path, message):
    """Raise a ValueError that names the file."""
    raise ValueError(f"{path}: {message}.")
