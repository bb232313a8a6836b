"""Preferences with TRL's DPOTrainer, no second model as the reference. Needs `pip install trl`. See README.md here."""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import meft_kernels
from meft_kernels.comparison.texts import load_texts
from meft_kernels.pretrained import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="'smollm2' (a package), a hub id or a folder")
parser.add_argument("--data", default="rotten_tomatoes", help="'rotten_tomatoes', 'imdb', or a CSV file: text, label")
parser.add_argument("--max-steps", type=int, default=50)
parser.add_argument("--out", default="dpo-out")
args = parser.parse_args()

texts = load_texts(args.data, held_out=1)
source = find_model(args.model)
tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options())
model = meft_kernels.patch(AutoModelForCausalLM.from_pretrained(source.path, **source.model_options()))

pairs = [
    {"prompt": f"Review: {text}\nSentiment:", "chosen": f" {right}", "rejected": f" {wrong}"}
    for text, label in zip(texts.train.texts, texts.train.labels, strict=True)
    for right, wrong in [(texts.classes[label], texts.classes[label - 1])]
]
trainer = DPOTrainer(
    model,
    ref_model=meft_kernels.reference_model(model),  # the pretrained model, from the same weights
    args=DPOConfig(
        args.out,
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        max_length=128,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # or torchrun's processes would each train alone on a CPU
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
trainer.train()
meft_kernels.save_adapter(model, f"{args.out}/adapter")
if trainer.is_world_process_zero():
    print(f"adapter in {args.out}/adapter")
