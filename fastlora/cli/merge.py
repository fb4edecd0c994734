from __future__ import annotations

import click

from fastlora.cli.options import json_option


@click.command("merge")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Merge the adapter of RUN into 16-bit weights. RUN is a run's folder, such as runs/tiny/1, or a recipe, for its
    newest finished run.

    They are written shard by shard, in the base's own type, read back and compared with the adapter before they
    take their place in RUN/merged. `fastlora export RUN --format 16bit --quant f16` chooses another type.
    """
    from fastlora.cli.export import export

    export(run, "16bit", None, as_json)
