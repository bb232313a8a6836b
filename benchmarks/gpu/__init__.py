"""Everything that needs a GPU, in one command that is done in minutes and can be cut off at any time.

    python -m benchmarks.gpu --minutes 8
    python -m benchmarks.gpu --only step-llama-3.1-8b --minutes 5
    python -m benchmarks.gpu --report                      # tables and plots of what is there, no run
    python -m benchmarks.gpu --device cpu --tiny           # every path but the speed, on any machine

Nothing is downloaded: models have their real shapes and random weights, made on the device. Pieces, in this order:

* ``correctness``: the Triton ops against the torch reference; ``meft_kernels.verify`` of whole patched models in
  float32, bfloat16 and float16: every layer's input rebuilt bit for bit, every gradient that of plain autograd.
* ``kernels``: bandwidth of the fused ops (``benchmarks.kernels``).
* ``step-*``: training steps (forward, backward, AdamW) of every rival that runs there: time, tokens per second, bytes
  kept after forward, bytes at the peak.
* ``context-*``: the longest sequence of which a training step fits, doubled until one does not, then to a quarter; the
  loss is on its last tokens only, or the logits would decide.

Each piece runs in a process of its own and is a :class:`~meft_kernels.comparison.records.Record` under
``benchmarks/results/gpu/<device>/``, written after every rival. So a run that was cut off goes on where it was: what
has an outcome, a failure with its reason among them, is not measured again (``--again`` does). A rival that raises, or
does not fit, or kills its process (an illegal memory access does) is named with the reason, and the others go on. The
minutes are shared out among the pieces that are left; what would not fit is named as not run. Exit status: 0, or 1 if
something is wrong in ``correctness``, 2 if there is no such device.

How rivals are compared. All of them have the same frozen weights, in the same memory: a rival is a copy of the model's
modules around the base's tensors, and gets its own copy of a weight only if it trains it. So they fit side by side,
and take turns in rounds of a few steps; printed are medians, and medians over rounds of the ratio within a round. Two
kinds are timed apart, against MEFT and LoRA with checkpointing in the same process: full fine-tuning, whose weights,
gradients and optimiser states would crowd the others (blocks A-B-A), and what changes transformers for its whole
process, Liger-Kernel and Unsloth (blocks A-B, as there is no way back). All train as many parameters as MEFT of rank
64 (but for full and (IA)3). All weights, trained ones and so AdamW's states too, are bfloat16, without autocast: PEFT
would have LoRA in float32, and compute it so. The same batch of random tokens without padding, the same fused AdamW.
The first two steps are dropped: in them MEFT calibrates, and kernels are compiled.

Bytes are what torch's allocator has given out, from before a step on, plus the optimiser's states: everything but the
weights. On a CPU they are counted tensor by tensor. The allocator has expandable segments unless PYTORCH_ALLOC_CONF
says otherwise, so that what one rival leaves in its cache is no obstacle to the next.
"""
