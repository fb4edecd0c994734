"""Puts recipes/ into the wheel as fastlora/bundled_recipes.

Not a static force-include: that would be copied into editable installs too, where it shadows recipes/.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundleRecipes(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        for path in sorted((root / "recipes").rglob("*")):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                relative = path.relative_to(root / "recipes")
                build_data["force_include"][str(path)] = f"fastlora/bundled_recipes/{relative}"
