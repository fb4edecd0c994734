"""The bundled recipes. Imports neither pydantic nor torch: `fastlora recipes` must answer at once."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from fastlora.errors import UsageError

_PACKAGE = Path(__file__).parents[1]


def bundled_folder(packaged: str, checkout: str) -> Path:
    """A folder that a wheel carries inside the package (`packaged`) and a checkout beside it."""
    inside = _PACKAGE / packaged
    return inside if inside.is_dir() else _PACKAGE.parent / checkout


def bundled() -> dict[str, Path]:
    """Recipe name -> file, by name."""
    return {
        path.stem: path
        for path in sorted(bundled_folder("bundled_recipes", "recipes").glob("*.toml"))
    }


def describe(path: Path) -> list[str]:
    """The header comment of a recipe file: title, launch command, memory."""
    lines = []
    for line in read(path).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def read(path: Path) -> str:
    """The text of a recipe file, without the byte order mark that Windows editors put before it.

    Raises UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def text(path: Path) -> str:
    """The text of a recipe file that may be saved in another folder: of the paths in it, those of files beside it are
    absolute."""

    def anchored(quoted: re.Match[str]) -> str:
        beside = path.parent / quoted[1]
        return f'"{beside.resolve().as_posix()}"' if beside.exists() else quoted[0]

    return re.sub(r'"([^"\n]+/[^"\n]+)"', anchored, read(path))


def find(name: str) -> Path:
    """A bundled name (`llama31`) or a path (`recipes/llama31.toml`) -> the file.

    Raises UsageError with the nearest names where there is neither.
    """
    path, known = Path(name), bundled()
    if path.suffix == ".toml" and path.is_file():
        return path
    if name in known:
        return known[name]
    if path.suffix == ".toml":
        hint = (
            f"; the bundled recipe of that name: fastlora run {path.stem}"
            if path.stem in known
            else ""
        )
        raise UsageError(f"{name}: no such file{hint}")
    if path.exists():
        raise UsageError(
            f"{name}: not a recipe, which is a .toml file. Data are named in one: fastlora recipes llama31 > mine.toml "
            "gives one to change"
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UsageError(f"{name}: no bundled recipe of that name{hint} Known: {', '.join(known)}")
