"""A ``transformers.Trainer`` in however many processes torchrun starts: ``check_trainer.py FOLDER STEPS [RESUME]``.

Losses and trained weights go to FOLDER/result.pt. A step sees the same four rows in any world size.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import meft_kernels
from tests.models import TRAINABLE_START, tiny_llama


def train(folder: str, steps: int, resume: str | None = None) -> Trainer:
    """The trainer, having trained."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = tiny_llama()
    torch.manual_seed(5)
    meft_kernels.patch(model, **TRAINABLE_START)
    ids = torch.randint(1, 97, (16, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4 // world,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: str, steps: str, resume: str | None = None) -> None:
    trainer = train(folder, int(steps), resume)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save({"losses": losses, "weights": trained}, Path(folder, "result.pt"))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main(*sys.argv[1:])
