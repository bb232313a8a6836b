"""Which of the peers' tests are run, and why the rest of the same files is not."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from .hub import DATA, MODELS


@dataclass(frozen=True)
class Difference:
    """Tests that pass plain and cannot pass patched."""

    tests: str
    """What their names contain."""
    error: str
    """What the failure says."""
    why: str


@dataclass(frozen=True)
class Peer:
    """One library and its tests."""

    name: str
    files: dict[str, tuple[str, ...]]
    """Files of tests: what the names begin with that are run, all where there is nothing."""
    pinned_in: str
    """The file of ours that says which version the library is tested with."""
    source: str = "src"
    """Folder of its checkout that holds the package: tests run against the code that they came with."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What a test's name contains: why it is not run at all."""
    differs: tuple[Difference, ...] = ()

    @property
    def repository(self) -> str:
        return f"https://github.com/huggingface/{self.name}"

    def difference(self, test: str, error: str) -> Difference | None:
        """The known reason why this test fails patched, with this error."""
        return next((case for case in self.differs if case.tests in test and case.error in error), None)


PREFIX_TUNING = "prefix tuning puts tokens into the KV cache before the first one, which is refused in training"
DIVERGES = (
    "trains all weights at a learning rate of 0.1, and hidden states grow beyond all bounds (the plain model's weights "
    "become NaN, which the test takes for changed); ours raises instead"
)
OUTGROWS = (
    "trains all weights at a learning rate of 0.1: hidden states grow beyond the range calibrated on the first batch, "
    "which is told"
)

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "peft",
            {
                "tests/test_decoder_models.py": (),
                "tests/test_feature_extraction_models.py": (),
                "tests/test_seq_classifier.py": (),
            },
            "constraints.txt",
            left_out={"test_prefix_tuning_mistral": "needs data from the hub"},
            differs=(Difference("test_prefix_tuning_qwen", "ReversibleUsageError", PREFIX_TUNING),),
        ),
        Peer(
            "accelerate",
            {"tests/test_examples.py": ()},
            "constraints.txt",
            left_out={"test_early_stopping": "needs data from the hub"},
        ),
        Peer(
            "trl",
            {
                "tests/test_sft_trainer.py": ("test_train",),
                "tests/test_dpo_trainer.py": ("test_train",),
                "tests/test_reward_trainer.py": ("test_train",),
                "tests/test_grpo_trainer.py": (
                    "test_train[",
                    "test_train_beta_non_zero",
                    "test_train_multiple_iterations",
                    "test_train_peft_config",
                    "test_train_peft_with_gradient_checkpointing",
                    "test_train_with_eval",
                ),
            },
            ".ci/run",
            source=".",
            left_out={
                "liger": "wants a GPU, and changes the classes for all tests after it",
                "set_chat_template_from_path": "wants a plugin of pytest",
                "test_train_loss_types": "many times the same model: what differs is what is made of its logits",
            },
            differs=(
                Difference("prompt_tuning[prefix_tuning]", "ReversibleUsageError", PREFIX_TUNING),
                Difference("test_train_model_dtype", "StreamOverflowError", DIVERGES),
                Difference("f_divergence[forward_kl]", "NonFiniteError", DIVERGES),
                Difference("test_grpo_trainer", "StreamOverflowError", OUTGROWS),
            ),
        ),
    )
}
METHODS = {"LoraConfig", "IA3Config"}
"""What of PEFT goes inside the layers, and is documented to train reversibly."""
_ID = re.compile(r"""["']([\w-]+/[\w.-]+)["']""")


def why_not(item: Any, peer: Peer) -> str | None:
    """Why a collected test is not run; None: it is."""
    wanted = peer.files[item.nodeid.partition("::")[0]]
    if wanted and not item.name.startswith(wanted):
        return "another part of the peer"
    for text, reason in peer.left_out.items():
        if text in item.name:
            return reason
    return _of_accelerate(item) if peer.name == "accelerate" else _of_models(item)


def _of_models(item: Any) -> str | None:
    parameters = getattr(item, "callspec", None)
    values = parameters.params if parameters else {}
    body = inspect.getsource(item.function)
    body = body[body.index("def ") :]  # the decorators' lists of ids are in the parameters, one at a time
    named = set(_ID.findall(body)) | {value for value in values.values() if isinstance(value, str) and "/" in value}
    if (method := values.get("config_cls")) is not None and method.__name__ not in METHODS:
        return "a PEFT method that we do not claim"
    if "slow" in item.keywords:
        return "slow"
    if named - {*MODELS, DATA}:
        return "needs a model or data set that is not made here"
    if not named & {*MODELS}:
        return "has no transformers model"
    return None


def _of_accelerate(item: Any) -> str | None:
    of_features = item.cls is not None and item.cls.__name__ == "FeatureExamplesTests"
    return None if of_features else "compares texts of examples"
