"""Reads options from a JSON or YAML file as command-line arguments, so that the same checks apply to both."""

import json
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
    load, kind = (json.loads, "JSON") if str(path).endswith(".json") else (yaml.safe_load, "YAML")
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


def refuse_settings(path, message):
    """Raise a ValueError that names the file."""
    raise ValueError(f"{path}: {message}.")
