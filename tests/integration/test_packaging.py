"""Editable, wheel and sdist installs hold both packages and the recipes, and never a module `kernels`."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOOK = """
import json, sys
from importlib.util import find_spec
import fastlora, fastlora_kernels
from fastlora.recipe import library
from fastlora.recipe.load import load_recipe
kernels = find_spec("kernels")
recipes = {name: load_recipe(path).model.name for name, path in library.bundled().items()}
print(json.dumps({
    "fastlora": fastlora.__file__, "kernels_package": fastlora_kernels.__file__,
    "kernels": None if kernels is None else [kernels.origin, *(kernels.submodule_search_locations or [])],
    "recipes": recipes,
}))
"""


def test_no_module_named_kernels_comes_from_this_repository() -> None:
    spec = find_spec("kernels")
    places = [] if spec is None else [str(spec.origin), *(spec.submodule_search_locations or [])]
    assert not any(str(ROOT) in place for place in places)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is built from it."""
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
    )
    return target


def test_sdist(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        "fastlora/cli/main.py",
        "kernels/fastlora_kernels/dispatch.py",
        "recipes/tiny.toml",
        "recipes/tiny/model/model.safetensors",
        "hatch_build.py",
    ):
        assert wanted in names
    assert not any(name.startswith(("runs/", ".venv/")) for name in names)


def test_wheel(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fastlora", "fastlora_kernels", f"{wheel.name.rsplit('-', 3)[0]}.dist-info",
    }  # fmt: skip
    assert "fastlora/bundled_recipes/tiny/cipher.jsonl" in names
    assert {"fastlora/page/base.html.j2", "fastlora/rundir/report.html.j2"} <= set(names)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    look(tmp_path, [f"import sys; sys.path.insert(0, {str(tmp_path)!r})"])


def test_editable(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--target", str(tmp_path), "--editable", str(ROOT),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    look(ROOT, [f"import site; site.addsitedir({str(tmp_path)!r})"])
    assert not (ROOT / "fastlora" / "bundled_recipes").exists()


def look(expected: Path, first: list[str]) -> None:
    """Import both packages in a fresh interpreter, away from the repository."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*first, LOOK])],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["fastlora"].startswith(str(expected))
    assert seen["kernels_package"].startswith(str(expected))
    assert "llama31" in seen["recipes"]
    assert Path(seen["recipes"]["tiny"]).is_dir()
    assert not any(str(ROOT) in place for place in seen["kernels"] or [])
