"""TRL's SFTTrainer, wired: every argument that changes training is written out.

Unsloth changes several of TRL's defaults (lr, weight decay, batch), so a default left alone would
make one recipe mean two trainings.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastlora.data.prepared import Prepared
from fastlora.engines.base import Engine, resolve_checkpointing, resolve_dtype
from fastlora.recipe.schema import Recipe, TrainSection
from fastlora.rundir.store import RunDir
from fastlora.train.callbacks import TokenCounter
from fastlora.train.checkpoints import Checkpoints
from fastlora.train.collate import SplittableCollator
from fastlora.train.held_out import BaseLosses, evaluate_sources
from fastlora.train.loss import adapted_head_allowed
from fastlora.train.notes import Notes
from fastlora.train.oom import Continuation, DoesNotFit
from fastlora.train.static import StaticSteps, why_not
from fastlora.train.stop import Interrupted

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
    from trl import SFTConfig

# Beside a model's inputs: what changes from step to step as well.
_ITEMS, _SHARE = "num_items_in_batch", "share"
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def build_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    run: RunDir,
    engine: Engine,
    counter: TokenCounter,
    checkpoints: Checkpoints,
    base_losses: BaseLosses,
    continuation: Continuation,
    callbacks: list[TrainerCallback],
    epochs: float,
    own_loss: bool,
    notes: Notes,
) -> Trainer:
    """The trainer, ready for `train()`. `epochs` holds where the recipe gives neither epochs nor steps; `own_loss` is
    `takes_own_loss` of the model."""
    import torch
    from accelerate.utils import AutocastKwargs
    from transformers import PrinterCallback, ProgressCallback, Trainer
    from trl import (
        SFTTrainer,
    )  # here and not above: unsloth, when it is the engine, has replaced it

    parts = {label: rows.with_format("torch") for label, rows in data.eval_by_source().items()}
    reason = why_not(model, engine, own_loss=own_loss, packing=recipe.data.packing)
    graphs = bool(recipe.memory.cuda_graphs) and not reason
    if recipe.memory.cuda_graphs and reason:
        notes(f"cuda_graphs: not used ({reason})")
    if recipe.memory.dense_layers and not graphs:
        notes("memory.dense_layers: it does nothing (micro-batches are not recorded)")
    static: StaticSteps | None = None

    class CountingTrainer(SFTTrainer):  # type: ignore[misc]
        current_gradient_accumulation_steps: int
        share: torch.Tensor | float | None = None
        """What the loss of the forward in hand is multiplied with."""

        def training_step(
            self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
        ) -> Any:
            steps: int = self.current_gradient_accumulation_steps

            def forward(part: dict[str, Any], labels: int, parts: int, share: float | None) -> Any:
                def step(given: dict[str, Any]) -> Any:
                    # By it is divided what is not normalised by tokens, such as a router's loss.
                    self.current_gradient_accumulation_steps = steps * parts
                    self.share = given.pop(_SHARE)
                    try:
                        return super(CountingTrainer, self).training_step(
                            model, given, given.pop(_ITEMS)
                        )
                    finally:
                        self.share, self.current_gradient_accumulation_steps = None, steps

                given = part | {_ITEMS: num_items_in_batch, _SHARE: share}
                if static is None:
                    return step(given)
                return static(
                    step,
                    given,
                    labels=labels,
                    rows=continuation.most_rows("step"),
                    baked=steps * parts if num_items_in_batch is None else None,
                )

            loss = continuation.train(forward, inputs, means=num_items_in_batch is None)
            counter.add(inputs)
            return loss

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            method = partial(Trainer.compute_loss, self) if own_loss else super().compute_loss
            loss = method(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            return loss if self.share is None else loss * self.share

        def prediction_step(
            self,
            model: Any,
            inputs: dict[str, Any],
            prediction_loss_only: bool,
            *rest: Any,
            **named: Any,
        ) -> Any:
            def forward(part: dict[str, Any]) -> Any:
                step = super(CountingTrainer, self).prediction_step
                return step(model, part, prediction_loss_only, *rest, **named)[0]

            return continuation.evaluate(forward, inputs), None, None

        def _run_epoch(self, *rest: Any, **named: Any) -> None:
            # A run may be resumed whose training is over; the trainer itself would do one step more.
            if not self.control.should_training_stop:
                super()._run_epoch(*rest, **named)

        def evaluate(self, *rest: Any, **named: Any) -> dict[str, float]:
            try:
                # A loader draws a seed; training goes on with the random numbers it would have had.
                with torch.random.fork_rng(devices=()):
                    metrics: dict[str, float] = super().evaluate(*rest, **named)
                return metrics
            except (Interrupted, DoesNotFit):
                self._save_checkpoint(self.model, None)
                raise

        def evaluation_loop(self, dataloader: Any, *rest: Any, **named: Any) -> Any:
            loop = super().evaluation_loop
            if len(parts) < 2:
                return loop(dataloader, *rest, **named)
            return evaluate_sources(
                parts, lambda part: loop(self.get_eval_dataloader(part), *rest, **named)
            )

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            checkpoints.save(partial(super()._save_checkpoint, model, trial))

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            """Not counted: it walks every parameter, for every micro-batch (1.6 ms at 1B)."""
            return 0

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None: TRL would write one at every checkpoint, into a folder that is not the adapter's."""

    with adapted_head_allowed(model):
        trainer = CountingTrainer(
            model=model,
            args=training_arguments(
                recipe, engine, run, has_eval=data.eval is not None, epochs=epochs
            ),
            data_collator=SplittableCollator(int(tokenizer.pad_token_id), engine),
            # Tensors, because to make a batch of Python's lists takes 0.6 ms more.
            train_dataset=data.train.with_format("torch"),
            eval_dataset=None if data.eval is None else data.eval.with_format("torch"),
            processing_class=tokenizer,
            callbacks=[checkpoints, base_losses, continuation, *callbacks],
        )
    checkpoints.trainer = base_losses.trainer = continuation.trainer = trainer
    base_losses.wanted = len(parts) > 1
    # TRL casts the adapter of a quantized model to bfloat16, where updates below 1/256 of a weight are
    # lost; unsloth keeps it in float32. The same recipe is to mean the same training.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _skip_idle_walks(trainer.model)
    if graphs:
        # A cast that was kept from before would not be recorded.
        trainer.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        static = continuation.static = StaticSteps(
            recipe, trainer.model, engine, data.train, run, notes, int(tokenizer.pad_token_id)
        )
        trainer.add_callback(static)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)  # they print to stdout, which is for results
    return trainer


def _skip_idle_walks(model: PeftModel) -> None:
    """Makes `model.train()` cheap on a model that trains: the trainer calls it for every micro-batch.

    Setting 1,300 flags takes 2 ms or more, where a micro-batch of a 1B model takes 130 ms; reading them
    takes 0.04 ms. The root's flag alone does not tell: PEFT's wrapper says "training" around a base in
    evaluation mode, where gradient checkpointing and dropout are off.
    """
    walk, modules = model.train, list(model.modules())

    def train(mode: bool = True) -> PeftModel:
        return model if mode and all(module.training for module in modules) else walk(mode)

    model.train = train  # type: ignore[method-assign]


def rows_of_a_mean(recipe: Recipe, run: RunDir) -> int:
    """Rows of an evaluation's batch: the held-out loss is a mean over rows of their batch's mean over tokens. So it is
    not the micro-batch where that was chosen for the GPU: best checkpoint and early stopping would depend on it. A
    forward takes no more rows than a micro-batch has (train/oom.py)."""
    filled = run.manifest.get("memory", {}).get("filled", [])
    if any(one["key"] == "train.micro_batch" for one in filled):
        return int(TrainSection.model_fields["micro_batch"].default)
    return recipe.train.micro_batch


def training_arguments(
    recipe: Recipe, engine: Engine, run: RunDir, *, has_eval: bool, epochs: float
) -> SFTConfig:
    import torch
    from trl import SFTConfig

    train, cuda = recipe.train, torch.cuda.is_available()
    dtype = resolve_dtype(recipe.model)
    optimizer = OPTIMIZERS[train.optimizer] if cuda else "adamw_torch"
    return SFTConfig(
        output_dir=str(run.checkpoints),
        # length and batch
        num_train_epochs=train.epochs or epochs,
        max_steps=train.steps or -1,
        per_device_train_batch_size=train.micro_batch,
        per_device_eval_batch_size=rows_of_a_mean(recipe, run),
        gradient_accumulation_steps=train.accumulation_steps,
        # optimizer
        optim=optimizer,
        learning_rate=train.lr,
        lr_scheduler_type=train.scheduler,
        lr_scheduler_kwargs=None,
        warmup_steps=train.warmup_fraction,  # below 1 it is a fraction of all steps
        weight_decay=train.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=train.max_grad_norm,
        label_smoothing_factor=0.0,
        neftune_noise_alpha=None,
        average_tokens_across_devices=False,
        # numbers and memory
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16 and cuda,
        bf16_full_eval=False,
        fp16_full_eval=False,
        tf32=None,
        use_cpu=not cuda,
        # fastlora's own is on the model already; asked for here, transformers' would take its place.
        gradient_checkpointing=resolve_checkpointing(recipe, engine) == "unsloth",
        gradient_checkpointing_kwargs=None,
        activation_offloading=False,
        use_cache=False,  # with a cache, transformers does not keep packed rows apart
        torch_compile=False,
        use_liger_kernel=False,
        auto_find_batch_size=False,
        torch_empty_cache_steps=None,
        # seeds and order
        seed=train.seed,
        data_seed=train.seed,
        full_determinism=False,
        train_sampling_strategy="random",
        dataloader_drop_last=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        ignore_data_skip=False,
        # data: prepared by us
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        packing=False,
        eval_packing=False,
        padding_free=False,
        max_length=recipe.model.seq_len_tokens,
        shuffle_dataset=False,
        completion_only_loss=False,
        assistant_only_loss=False,
        loss_type="nll",
        pad_to_multiple_of=None,
        # cadence
        logging_strategy="steps",
        logging_steps=train.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no" if not has_eval else "steps" if train.eval_every_steps else "epoch",
        eval_steps=train.eval_every_steps,
        eval_on_start=False,
        prediction_loss_only=True,
        save_strategy="steps" if train.save_every_steps else "epoch",
        save_steps=train.save_every_steps or 500,
        save_total_limit=None,  # Checkpoints removes old ones, once the new one is whole
        save_only_model=False,
        load_best_model_at_end=False,  # done by us, after an interrupt it would be wasted
        metric_for_best_model="eval_loss" if has_eval else None,
        greater_is_better=False if has_eval else None,
        restore_callback_states_from_checkpoint=False,  # Checkpoints keeps its own
        # reports
        report_to="none",  # Trackers hands its own callbacks
        disable_tqdm=True,
        include_num_input_tokens_seen="no",
        push_to_hub=False,
    )
