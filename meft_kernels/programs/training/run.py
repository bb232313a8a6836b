"""One run of ``meft-kernels train``, from its settings to the adapter on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import MeftError
from ...packages import TRAIN_EXTRA, require
from ...patching.state import count_parameters
from ...pretrained import Pretrained, find_pretrained
from ...reports.callback import MeftCallback
from ..using.folder import RUN, SETTINGS
from . import metrics
from .checkpoints import STATE, find_checkpoints, trainer_state, what_is_missing
from .classes import told_of_data
from .data import Rows, encode, load_rows
from .interruption import SaveAndStop
from .methods import ADAPTER, MERGED, Method, method_for
from .progress import ShowProgress, WriteHistory, write_history
from .settings import Settings, absolute, check_given, differences, merge, resolve
from .tokens import Encoder
from .yaml_file import read_yaml, write_yaml

HISTORY, METRICS = "log.jsonl", "metrics.json"


class RunError(MeftError, ValueError):
    """``--out`` and what is asked for do not go together."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    interrupted: bool
    step: int
    metrics: dict[str, float]
    uses: tuple[str, ...] = ()
    """What loads the result again, in Python."""
    leaves: tuple[str, ...] = ()
    """Folders with it, in ``out``."""
    by_class: tuple[dict[str, Any], ...] = ()
    """Figures of each class on the held-out texts; none for a language model."""


def train(given: Mapping[str, Any], out: Path, *, resume: bool, overwrite: bool, console: Any) -> Outcome:
    """Train, evaluate, save; or stop with a checkpoint where a signal asks for it.

    Args:
        given: settings as :func:`~meft_kernels.programs.training.settings.check_given` takes them; what is left out
            is, in a resumed run, as it was, and else the default.
        out: folder for checkpoints, adapter, settings, log and figures.
        resume: go on from the last whole checkpoint in ``out``.
        overwrite: remove what an earlier run left in ``out``.
        console: a ``rich`` console for what is said meanwhile.

    Raises:
        RunError: ``out`` holds another run, or the run in it was begun with other settings or on other data.
        ValueError: settings, data or model cannot be used. Nothing has been written.
        MissingPackageError: a package is not installed; the message has the command.
    """
    for package in ("accelerate", "datasets", "yaml"):
        require(package, TRAIN_EXTRA)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "this command trains in one process, whose signals stop it at one step; for several GPUs start a script of "
            "your own with patch and Trainer under torchrun"
        )
    given = _absolute(check_given(given, "settings"))
    recorded = _recorded(out) if resume else None
    if recorded is None:
        _check_unused(out, resume=resume, overwrite=overwrite)
    given = given if recorded is None else merge(recorded, given)
    for name, missing in (("--model", given.get("model")), ("--data", given["data"].get("source"))):
        if not missing:
            raise RunError(f"{name} is missing" + (f", and {out} holds no run to go on with" if resume else ""))
    pretrained = find_pretrained(given["model"])
    settings, rows = _prepare(given, pretrained)
    if recorded is not None:
        _check_same(out, recorded, settings, rows, pretrained, console)
    arguments = _arguments(settings, out)
    encoder = Encoder(pretrained.tokenizer, settings.data.max_length)
    train_set, held_out, lost = encode(rows, encoder)
    for line, style in told_of_data(rows, encoder, lost):
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
    transformers.set_seed(arguments.seed)  # a new head and the adapters
    method = method_for(settings, pretrained)
    model = method.prepare(_load(pretrained, settings, rows))
    checkpoint = _last_whole(out, method, console) if resume else None
    trainable, total = count_parameters(model)
    console.print(
        f"{settings.method}, {settings.task}: {settings.model} on {settings.data.source}, "
        f"{len(train_set)} texts to train on, {len(held_out)} held out, {arguments.device}, "
        f"{trainable:,} trainable of {total:,} parameters",
        highlight=False,
        soft_wrap=True,
    )

    if settings.task == "classification" and (said := _replaced_head(pretrained, rows)):
        console.print(said, style="yellow", highlight=False)
    if settings.training.get("train_sampling_strategy", "random") != "random":
        console.print(
            "train_sampling_strategy: a run that is resumed after its first epoch sees another order of texts than an "
            "uninterrupted one; 'random' resumes exactly",
            style="yellow",
            highlight=False,
        )

    stop, shown = SaveAndStop(), ShowProgress(console)
    callbacks = [MeftCallback(), WriteHistory(out / HISTORY), shown, stop]
    measure = metrics.Accuracy(rows.classes)
    trainer = _trainer(model, arguments, settings, pretrained, (train_set, held_out), callbacks, measure)
    _begin(out, settings, rows, overwrite=overwrite)
    try:
        if checkpoint is not None and _is_finished(checkpoint):
            # A Trainer that is resumed past its last step would do one more.
            console.print(f"{checkpoint.name} is the last step's: nothing is left to train", highlight=False)
            trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / STATE))
            best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
            method.load(model, Path(best or checkpoint))
        else:
            with stop.listening():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if stop.requested:
                return Outcome(True, trainer.state.global_step, {})
    finally:
        shown.close()
    changed = method.finish(model)
    method.save(model, pretrained.tokenizer, out)
    found = _final_metrics(trainer, evaluated=not changed)
    if rows.classes and not measure.by_class:  # the last evaluation was an earlier process's
        trainer.predict(held_out)
    method.merge(model, pretrained.tokenizer, out)
    write_history(out / HISTORY, trainer.state.log_history)
    document = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, **found}
    if rows.classes:
        document["classes"] = measure.by_class
    (out / METRICS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Outcome(
        False, trainer.state.global_step, found, tuple(method.uses(out)), method.leaves, tuple(measure.by_class)
    )


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    made = dict(given)
    if made.get("model"):
        made["model"] = absolute(made["model"])
    if made["data"].get("source"):
        made["data"] = {**made["data"], "source": absolute(made["data"]["source"])}
    return made


def _recorded(out: Path) -> dict[str, Any] | None:
    """The settings of the run in ``out``, None if none was begun there."""
    if (out / SETTINGS).is_file():
        return check_given(read_yaml(out / SETTINGS), str(out / SETTINGS))
    if find_checkpoints(out):
        raise RunError(f"{out} holds checkpoints and no {SETTINGS}: they are not of a run of this command")
    return None


def _check_unused(out: Path, *, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, not a folder")
    used = [path.name for path in (*find_checkpoints(out), out / ADAPTER, out / MERGED) if path.exists()]
    if used and not overwrite and not resume:
        raise RunError(
            f"{out} holds an earlier run ({', '.join(used[:3])}): go on with it with --resume, remove it with "
            "--overwrite, or give another --out"
        )


def _prepare(given: dict[str, Any], pretrained: Pretrained) -> tuple[Settings, Rows]:
    settings = resolve(given, given.get("task") or "classification", encoder=not pretrained.causal)
    rows = load_rows(settings.data, given.get("task"))
    settings = resolve(given, rows.task, encoder=not pretrained.causal)
    if rows.task == "causal-lm" and not pretrained.causal:
        made_for = ", ".join(pretrained.config.architectures or ["no architecture named"])
        raise ValueError(
            f"{given['model']} is no causal language model ({made_for}); for classification the data needs the "
            f"columns {settings.data.text} and {settings.data.label}"
        )
    if settings.data.packing and rows.task != "causal-lm":
        raise ValueError("data.packing is for causal-lm")
    positions = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.data.max_length > positions:
        raise ValueError(f"data.max_length is {settings.data.max_length}, and this model has {positions} positions")
    return settings, rows


def _check_same(
    out: Path, recorded: dict[str, Any], settings: Settings, rows: Rows, pretrained: Pretrained, console: Any
) -> None:
    """A run that goes on with something else would be neither the one nor the other."""
    began = resolve(recorded, recorded["task"], encoder=not pretrained.causal)
    if differing := differences(began, settings):
        raise RunError(
            f"the run in {out} was begun with other settings: {'; '.join(differing)}. Leave them out to go on, or "
            "begin anew in another --out"
        )
    noted = json.loads((out / RUN).read_text(encoding="utf-8")) if (out / RUN).is_file() else {}
    if noted.get("data") not in (None, rows.fingerprint()):
        raise RunError(f"{settings.data.source} is not what it was when the run in {out} was begun: begin anew")
    for package, version in _versions().items():
        if noted.get(package, version) != version:
            console.print(
                f"begun with {package} {noted[package]}, going on with {version}: losses may differ in rounding",
                style="yellow",
                highlight=False,
            )


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _arguments(settings: Settings, out: Path) -> Any:
    try:
        return transformers.TrainingArguments(output_dir=str(out), disable_tqdm=True, **settings.training)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"training: {error}") from None


def _load(pretrained: Pretrained, settings: Settings, rows: Rows) -> Any:
    dtype = getattr(torch, settings.dtype)
    try:
        if settings.task == "causal-lm":
            return pretrained.load(transformers.AutoModelForCausalLM, dtype=dtype)
        return pretrained.load(
            transformers.AutoModelForSequenceClassification,
            dtype=dtype,
            num_labels=len(rows.classes),
            id2label=dict(enumerate(rows.classes)),
            label2id={name: index for index, name in enumerate(rows.classes)},
            ignore_mismatched_sizes=True,  # a head for other classes is begun anew
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{settings.model} cannot be loaded for {settings.task}: {error}") from None


def _replaced_head(pretrained: Pretrained, rows: Rows) -> str | None:
    heads = any("SequenceClassification" in name for name in pretrained.config.architectures or [])
    if not heads or pretrained.config.num_labels == len(rows.classes):
        return None
    return (
        f"the model's head is for {pretrained.config.num_labels} classes: a new one is trained for {len(rows.classes)}"
    )


def _collator(settings: Settings, tokenizer: Any) -> Any:
    if settings.task == "classification":
        return transformers.DataCollatorWithPadding(tokenizer)
    if settings.data.packing:
        return transformers.DataCollatorWithFlattening()
    # It pads the labels that are there; DataCollatorForLanguageModeling would make them anew, from the prompt too, and
    # without the end where that is the padding token.
    return transformers.DataCollatorForSeq2Seq(tokenizer)


def _trainer(
    model: Any,
    arguments: Any,
    settings: Settings,
    pretrained: Pretrained,
    parts: tuple[Any, Any],
    callbacks: list[transformers.TrainerCallback],
    measure: metrics.Accuracy,
) -> Any:
    classifies = settings.task == "classification"
    try:
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=parts[0],
            eval_dataset=parts[1],
            processing_class=pretrained.tokenizer,
            data_collator=_collator(settings, pretrained.tokenizer),
            callbacks=callbacks,
            compute_metrics=measure if classifies else metrics.perplexity,
            preprocess_logits_for_metrics=metrics.predicted_class if classifies else metrics.token_losses,
        )
    except (ImportError, RuntimeError) as error:  # a reporter or an optimizer that is not installed
        raise ValueError(f"training: {error}") from None
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _last_whole(out: Path, method: Method, console: Any) -> Path | None:
    """The checkpoint to go on from. Those that are not whole are removed: a later one could be taken for it."""
    for path in find_checkpoints(out):
        reason = what_is_missing(path, method.checkpoint_files)
        if reason is None:
            console.print(f"going on from {path.name}", highlight=False)
            return path
        console.print(f"{path.name} is not whole ({reason}): skipped and removed", style="yellow", highlight=False)
        shutil.rmtree(path)
    console.print(f"{out} has no checkpoint yet: starting at the first step", highlight=False)
    return None


def _is_finished(checkpoint: Path) -> bool:
    state = trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])


def _begin(out: Path, settings: Settings, rows: Rows, *, overwrite: bool) -> None:
    if overwrite:
        for path in (*find_checkpoints(out), out / ADAPTER, out / MERGED):
            if path.exists():
                shutil.rmtree(path)
        for name in (HISTORY, METRICS):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_yaml(out / SETTINGS, settings.plain(), "All settings of this run; it can be given to --config.")
    noted = {"data": rows.fingerprint(), "layout": rows.layout.needed[0], **_versions()}
    (out / RUN).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def _final_metrics(trainer: Any, *, evaluated: bool) -> dict[str, float]:
    """Of the model as it is saved: the last evaluation's, unless the weights, or the model, have changed since."""
    last: dict[str, Any] = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if not evaluated or last.get("step") != trainer.state.global_step or trainer.args.load_best_model_at_end:
        last = trainer.evaluate()
    return {name: value for name, value in last.items() if name in ("eval_loss", "eval_accuracy", "eval_perplexity")}
