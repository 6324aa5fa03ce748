"""A JSON file of options as a command line, so that both are read by the same rules.

In: the file, and which options there are. Out: words as of a command line, or one error that names the file. It knows
nothing of what the options mean.
"""

import json
from pathlib import Path


def read_settings(path, known):
    """The words of a command line that stand for a file.

    Args:
        known: names of all options.

    Raises:
        ValueError: where it is no JSON object, or names an option that there is not.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
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
