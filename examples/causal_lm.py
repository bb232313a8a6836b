"""Go on training a language model on texts, reversible, under transformers.Trainer. See README.md in this folder."""

import argparse

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import meft_kernels
from meft_kernels.comparison.labelled import Split
from meft_kernels.comparison.texts import load_texts
from meft_kernels.pretrained import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="'smollm2' (a package), a hub id or a folder")
parser.add_argument("--data", default="imdb", help="'rotten_tomatoes', 'imdb', or a CSV file: text, label")
parser.add_argument("--max-steps", type=int, default=50)
parser.add_argument("--held-out", type=int, default=8, help="how many texts to evaluate on")
parser.add_argument("--block", type=int, default=128, help="tokens in a row")
parser.add_argument("--out", default="causal-lm-out")
args = parser.parse_args()

texts = load_texts(args.data, held_out=args.held_out)
source = find_model(args.model)
tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options())
model = AutoModelForCausalLM.from_pretrained(source.path, **source.model_options())
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token

meft_kernels.patch(model)
meft_kernels.print_trainable_parameters(model)


def blocks(split: Split) -> Dataset:
    """All texts, one after another, cut into rows of the same length."""
    ids = [token for text in split.texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    starts = range(0, len(ids) - args.block, args.block)
    return Dataset.from_dict({"input_ids": [ids[start : start + args.block] for start in starts]})


trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # or torchrun's processes would each train alone on a CPU
    ),
    train_dataset=blocks(texts.train),
    eval_dataset=blocks(texts.held_out),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
meft_kernels.save_adapter(model, f"{args.out}/adapter")
if trainer.is_world_process_zero():
    prompt = tokenizer("This film", return_tensors="pt").to(model.device)
    written = model.eval().generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(f"held-out loss {before:.3f} -> {after:.3f}; adapter in {args.out}/adapter")
    print(tokenizer.decode(written[0], skip_special_tokens=True))
