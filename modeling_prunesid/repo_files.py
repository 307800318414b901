"""What a variant's files say: their fields, and the base that they name."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file


# How files are fetched, from the variant and from its base alike.
ACCESS_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What a caller says of the variant's repo, and what is therefore never said of its base.
VARIANT_ARGUMENTS = ("revision", "code_revision", "subfolder", "trust_remote_code", "_commit_hash", "_from_auto")
_DEEPEST_JSON = 64  # levels; upstream copies configurations recursively


def read_fields(name: str | os.PathLike, file: str, location: dict[str, Any]) -> dict[str, Any] | None:
    """
    The JSON object in a file of a repo or folder, or None where it has no such file.

    Raises:
        `ValueError`: if the file holds something else: broken JSON, a list, null, or objects in 64 others.
        `OSError`: if there is no such repo, or it cannot be reached.
    """
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location)
    if path is None:
        return None
    problem = None
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            problem = f"it is {json.dumps(fields)[:40]}"
        elif _is_deeper(fields, _DEEPEST_JSON):
            problem = f"it nests more than {_DEEPEST_JSON} levels"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    except RecursionError:
        problem = f"it nests more than {_DEEPEST_JSON} levels"
    if problem is not None:
        raise ValueError(f"{file} of {name} must hold a JSON object, but {problem}. Save the variant again.")
    return fields


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in items))


def read_base(fields: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    """
    Name and revision of the base in the fields of a variant; None, None where it is no thin variant.

    Raises:
        `ValueError`: if one of them is not a name.
    """
    values = []
    for name in ("base_model_name_or_path", "base_model_revision"):
        value = fields.get(name)
        if value is not None and (not isinstance(value, str) or value == ""):
            raise ValueError(
                f"{where}.{name} must be a non-empty string or null, got {value!r}. Save the variant again."
            )
        values.append(value)
    return values[0], values[1]
