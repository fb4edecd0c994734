from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import click

from fastlora.cli.options import gib, json_option, settings_option
from fastlora.errors import UsageError
from fastlora.recipe import library


@click.command("plan")
@click.argument("recipe")
@settings_option("train.micro_batch=4")
@click.option("--vram", callback=gib, metavar="24GiB", help="Of the card; else this machine's.")
@click.option("--host", callback=gib, metavar="64GiB", help="Memory of the host.")
@click.option("--seq", type=click.IntRange(min=8), metavar="TOKENS", help="Longest row.")
@click.option("--gpu", metavar="NAME", help="Whose speed to take, e.g. 'RTX 4090'.")
@json_option
def command(
    recipe: str,
    settings: tuple[str, ...],
    vram: float | None,
    host: float | None,
    seq: int | None,
    gpu: str | None,
    as_json: bool,
) -> None:
    """Say what training as RECIPE says will need and how fast it will be, and whether that fits.

    From the model's config.json alone, in a second. Exits with 3 when it does not fit; what to change is shown.
    """
    from fastlora.recipe.load import load_recipe

    if seq is not None:
        settings = (*settings, f"model.seq_len_tokens={seq}")
    loaded = load_recipe(library.find(recipe), settings)

    from fastlora.plan.advise import advise, with_settings
    from fastlora.plan.budget import NONE_FITS
    from fastlora.plan.gpus import gpu_named, installed, known, like_a_3090
    from fastlora.plan.measured import ceilings
    from fastlora.plan.predict import Card, Prediction, predict
    from fastlora.plan.settle import FREE_SHARE, full_rows, settle, without_budget
    from fastlora.plan.shape import read_config, shape_of
    from fastlora.recipe.schema import Recipe

    here = None if gpu else installed()
    name = gpu or (here[0] if here else None)
    found = gpu_named(name, ceilings(name)) if name else None
    if gpu and found is None:
        raise UsageError(f"--gpu {gpu}: not known; known are {', '.join(known())}")
    if here and found is None:
        found = like_a_3090(*here)  # as a run here does
    if here and loaded.engine == "auto" and find_spec("unsloth") is None:
        loaded = with_settings(loaded, {"engine": "peft"})  # as a run here would
    own = here[1] if here else found.vram_gib if found else None
    whole = vram or own  # --vram is another card; a budget leaves a card as large as it is
    sizes = [size for size in (whole, loaded.memory.vram_gib) if size is not None]
    size = min(sizes, default=None)
    card = Card(gpu=found, vram_gib=size, host_gib=host, whole_gib=whole)
    config = read_config(loaded.model.name, loaded.model.revision)
    shape = shape_of(config, f"{loaded.model.name}/config.json")

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, card)

    now = again(loaded)
    choice = settle(now, again, full_rows) if now.speed and size else None
    asked = loaded.memory.vram is not None
    if choice and asked:  # as a run would
        now = choice.result
    default = None
    if not asked and now.speed and size:
        free = replace(card, vram_gib=FREE_SHARE * size)

        def with_free(other: Recipe) -> Prediction:
            return predict(other, shape, free)

        default = settle(with_free(without_budget(loaded)), with_free, full_rows)
    refused = asked and choice is None and now.verdict != "unknown" and now.speed is not None
    best, singles = advise(now, again) if now.verdict in ("no", "tight") else (None, [])
    if as_json:
        document = {
            "recipe": recipe,
            **now.document(),
            "changes": [one.document() for one in singles],
            "cheapest": best and best.document(),
            "budget": choice and choice.document(),
            "default": default and default.document(),
        }
        click.echo(json.dumps(document))
    else:
        from rich.console import Console

        from fastlora.plan.show import show

        show(now, best, singles, choice, default, Console())
    if refused:
        of_host = "" if host is None else f", and {host:.1f} of the host"
        click.echo(
            f"memory.vram: {NONE_FITS} {size:.2f} GiB{of_host}; a run would refuse", err=True
        )
    elif asked and now.speed is None:
        click.echo("memory.vram: a choice needs a GPU's speed; name one with --gpu", err=True)
    if now.verdict == "no" or refused:
        sys.exit(3)
