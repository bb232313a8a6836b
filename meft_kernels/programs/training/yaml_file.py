"""Settings in YAML: numbers and booleans are what people mean by them, and a key is given once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...packages import TRAIN_EXTRA, require

_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    PyYAML follows YAML 1.1, where ``1e-3`` is a string and ``no`` is false (``eval_strategy: no`` means the word). Here
    both are read as YAML 1.2 has them.

    Raises:
        ValueError: there is no such file, it is no YAML, no mapping, or names a key twice.
        MissingPackageError: PyYAML is not installed.
    """
    yaml = require("yaml", TRAIN_EXTRA)

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """Safe: no tags that build objects."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for position, key in enumerate(keys) if key in keys[:position]]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    replaced = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] not in replaced]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(replaced[0], _BOOL, list("tTfF"))
    # After the integers, which it would match too.
    Loader.add_implicit_resolver(replaced[1], _FLOAT, list("-+.0123456789"))
    try:
        with path.open(encoding="utf-8") as file:
            found = yaml.load(file, Loader=Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: it needs lines of the form name: value")
    return found


def write_yaml(path: Path, settings: dict[str, Any], comment: str) -> None:
    """Settings as a file that :func:`read_yaml` reads back."""
    yaml = require("yaml", TRAIN_EXTRA)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    path.write_text(f"# {comment}\n{text}", encoding="utf-8")
