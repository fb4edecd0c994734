from __future__ import annotations

from pathlib import Path

import click


@click.command("merge")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(run: Path, as_json: bool) -> None:
    """Merge the adapter of RUN (a run's folder, such as runs/tiny/1) into 16-bit weights.

    They are written shard by shard, in the base's own type, read back and compared with the adapter before they
    take their place in RUN/merged. `fastlora export RUN --format 16bit --quant f16` chooses another type.
    """
    from fastlora.cli.export import export

    export(run, "16bit", None, as_json)
