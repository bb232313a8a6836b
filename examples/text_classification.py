"""Classify texts: an encoder, reversible, under transformers.Trainer. See README.md in this folder."""

import argparse

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import meft_kernels
from meft_kernels.comparison.labelled import Split
from meft_kernels.comparison.texts import load_texts
from meft_kernels.pretrained import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="minilm", help="'minilm' (a package), a hub id or a folder")
parser.add_argument("--data", default="rotten_tomatoes", help="'rotten_tomatoes', 'imdb', or a CSV file: text, label")
parser.add_argument("--max-steps", type=int, default=200)
parser.add_argument("--held-out", type=int, default=256, help="how many texts to evaluate on")
parser.add_argument("--out", default="text-classification-out")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
args = parser.parse_args()

texts = load_texts(args.data, held_out=args.held_out)
path = find_model(args.model).path
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(texts.classes))

meft_kernels.patch(model)  # this is all; the new head trains beside the adapters
meft_kernels.print_trainable_parameters(model)


def encode(split: Split) -> Dataset:
    """Token ids and labels; the Trainer pads them, batch by batch."""
    rows = Dataset.from_dict({"text": split.texts, "label": split.labels})
    return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)


trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,  # adapters want more than the 2e-5 of full fine-tuning
        warmup_steps=20,
        logging_steps=20,
        save_steps=100,  # a checkpoint is the adapter alone
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # or torchrun's processes would each train alone on a CPU
    ),
    train_dataset=encode(texts.train),
    eval_dataset=encode(texts.held_out),
    processing_class=tokenizer,
    compute_metrics=lambda result: {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))},
    callbacks=[meft_kernels.MeftCallback()],  # kept bytes and tokens per second in the logs
)
trainer.train(resume_from_checkpoint=args.resume)
metrics = trainer.evaluate()
meft_kernels.save_adapter(model, f"{args.out}/adapter")
if trainer.is_world_process_zero():
    print(f"held-out accuracy {metrics['eval_accuracy']:.3f}; adapter in {args.out}/adapter")
