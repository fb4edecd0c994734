"""Puts recipes/ and benchmarks/suites/ into the wheel, inside the package.

Not a static force-include: that would be copied into editable installs too, where it shadows the originals.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundleRecipes(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        for folder, packaged in (
            ("recipes", "bundled_recipes"),
            ("benchmarks/suites", "bundled_suites"),
        ):
            for path in sorted((root / folder).rglob("*")):
                if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                    relative = path.relative_to(root / folder)
                    build_data["force_include"][str(path)] = f"fastlora/{packaged}/{relative}"
