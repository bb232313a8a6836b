"""The model card of an adapter's folder."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCardData

_TEMPLATE = """---
{metadata}
---

# Adapter for {base}

Trained with [MEFT](https://arxiv.org/abs/2306.00477) (*Make Pre-trained Model Reversible*) by `meft_kernels`
{library_version}: {variant}, {arithmetic} arithmetic, rank {rank}; {parameters:,} parameters. The backbone is not in
this folder.

```python
from meft_kernels import {auto_class}

model = {auto_class}.from_pretrained("this folder or its hub id")
```

or into a model of the same base that is there already:

```python
model = meft_kernels.load_adapter(model, "this folder")
```

## Settings

| setting | value |
| --- | --- |
{settings}
"""
_AUTO_CLASSES = {
    "ForCausalLM": "AutoMeftModelForCausalLM",
    "LMHeadModel": "AutoMeftModelForCausalLM",
    "ForSequenceClassification": "AutoMeftModelForSequenceClassification",
    "ForTokenClassification": "AutoMeftModelForTokenClassification",
    "ForQuestionAnswering": "AutoMeftModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoMeftModelForSeq2SeqLM",
}


def auto_class_for(model_class: str) -> str:
    """The class that loads base model and adapter, for a class of transformers by its name."""
    return next((name for end, name in _AUTO_CLASSES.items() if model_class.endswith(end)), "AutoMeftModel")


def model_card(description: dict[str, Any], parameters: int) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        description: what ``adapter_config.json`` will hold.
        parameters: how many the folder holds.
    """
    base = description["base_model_name_or_path"]
    on_hub = bool(base) and base.count("/") <= 1 and not os.path.exists(base)
    metadata = ModelCardData(
        library_name="meft_kernels", tags=["meft", "reversible", "adapter"], base_model=base if on_hub else None
    )
    settings = description["config"]
    model_class = description["base_model_class"]
    return _TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"a `{model_class}`",
        library_version=description["library_version"],
        auto_class=auto_class_for(model_class),
        parameters=parameters,
        settings="\n".join(f"| `{name}` | `{value!r}` |" for name, value in settings.items()),
        **{name: settings[name] for name in ("variant", "arithmetic", "rank")},
    )
