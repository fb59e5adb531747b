"""What the raw overrides of the DeepSpeed config may hold: nothing that the learner decides, nothing mistyped."""

import difflib
from collections.abc import Mapping
from typing import Any

OWNED = {
    "train_batch_size": "set learner.batch_size",
    "train_micro_batch_size_per_gpu": "set learner.micro_batch_size",
    "gradient_accumulation_steps": "it follows from learner.batch_size and learner.micro_batch_size",
    "managed_gradient_accumulation": "the learner sets the boundaries of accumulation itself",
    "gradient_clipping": "set learner.optimizer.max_grad_norm",
    "optimizer": "set learner.optimizer",
    "scheduler": "set learner.optimizer.schedule",
    "fp16": "policy.dtype decides, float32 or bfloat16",
    "bf16": "policy.dtype decides, float32 or bfloat16",
    "bfloat16": "policy.dtype decides, float32 or bfloat16",
    "amp": "policy.dtype decides, float32 or bfloat16",
    "torch_autocast": "policy.dtype decides, float32 or bfloat16",
    "activation_checkpointing": "set learner.activation_checkpointing",
    "compile": "set learner.compile",
    "gradient_predivide_factor": "the learner's losses carry the number of ranks, and are divided by it once",
    "prescale_gradients": "the learner's losses carry the number of ranks, and are divided by it once",
    "gradient_allreduce_op": "the learner's losses carry the number of ranks, and are divided by it once",
    "zero_allow_untested_optimizer": "the learner's optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the learner's optimizer is torch's AdamW",
    "pipeline": "the learner has no pipeline stages",
    "tensor_parallel": "the learner has no tensor parallelism",
    "sequence_parallel_size": "the learner has no sequence parallelism",
    "hybrid_engine": "vLLM samples",
    "data_efficiency": "the learner deals out its pairs itself",
    "curriculum_learning": "the learner deals out its pairs itself",
    "progressive_layer_drop": "log-probs have to be those of the whole model",
    "sparse_attention": "set learner.attention",
    "compression_training": "weights are trained as they are served",
    "quantize_training": "weights are trained as they are served",
    "elasticity": "ranks and batch are those of the learner",
    "weight_quantization": "weights are trained as they are served",
    "checkpoint": "set the run's checkpoint section",
}
"""Keys that the learner sets, or that have no meaning to it, and what to do instead."""

TAKEN = frozenset(
    {
        "zero_optimization",
        "data_types",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "disable_allgather",
        "aio",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "flops_profiler",
        "comms_logger",
        "timers",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "disable_python_gc",
        "log_level",
    }
)
"""Keys that go to DeepSpeed as they are."""


def check_deepspeed(deepspeed: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a key that is not the user's to set, or that DeepSpeed would not read."""
    for key, value in deepspeed.items():
        if key in OWNED:
            shown = "" if isinstance(value, Mapping | list) else f" = {value!r}"
            raise ValueError(f"learner.deepspeed.{key}{shown}: it cannot be set here; {OWNED[key]}")
        if key not in TAKEN:
            near = difflib.get_close_matches(key, TAKEN, 1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(sorted(TAKEN))}"
            raise ValueError(f"learner.deepspeed.{key}: DeepSpeed's config has no such key; {hint}")
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"learner.deepspeed.zero_optimization = {zero!r}: expected a mapping")
