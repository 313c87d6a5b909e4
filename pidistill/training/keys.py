"""Config keys: which recipes read them, and the least value of each whole number."""

# Keys that mean the same in every recipe,
EVALUATION_KEYS = frozenset(
    {
        "output_dir", "seed", "device", "dtype", "threads", "model", "tokenizer", "checkpointer", "dataset", "environment",
        "privileged", "sampler", "max_turns", "environment_threads", "environment_timeout_s", "on_overflow", "eval_samples",
        "eval_success_threshold", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "custom_sharded_layers",
        "fallback_checkpoint_dir", "adapter_dir", "tensor_parallel_dim",
    }
)  # fmt: skip
# and in every one that trains.
COMMON_KEYS = EVALUATION_KEYS | frozenset(
    {
        "max_steps", "optimizer", "lr_scheduler", "clip_grad_norm", "max_nonfinite_steps", "save_every_steps",
        "resume_from_checkpoint", "metric_logger", "enable_activation_checkpointing", "enable_activation_offloading",
        "compile", "score_chunk_tokens", "eval_dataset", "eval_every_steps", "packing", "micro_batch_tokens",
        "reward_shaping", "keep_last",
    }
)  # fmt: skip

# Whole numbers, and the least that each may be; null leaves the default.
LEAST = {
    "seed": 0, "threads": 1, "max_steps": 1, "batch_size": 1, "micro_batch_tokens": 1, "prompts_per_round": 1, "group_size": 1,
    "updates_per_round": 1, "minibatch_rollouts": 1, "score_chunk_tokens": 1, "max_turns": 1, "environment_threads": 1,
    "max_nonfinite_steps": 1, "eval_samples": 1, "eval_every_steps": 0, "save_every_steps": 0, "rollout_log_steps": 0,
    "samples_per_prompt": 1, "prompts_per_batch": 1, "rollout_log_samples": 1, "sft_batch_size": 1,
    "rollout_log_max_new_tokens": 1, "rollout_log_max_chars": 1, "tensor_parallel_dim": 1, "keep_last": 1,
}  # fmt: skip


ROUND_KEYS = frozenset(
    {
        "prompts_per_round", "group_size", "updates_per_round", "minibatch_rollouts", "objective",
        "teacher", "teacher_model", "teacher_checkpointer", "teacher_tokenizer", "rollout_log_steps", "rollout_log_samples",
        "rollout_log_max_new_tokens", "rollout_log_max_chars", "sft_weight", "sft_batch_size", "max_sampler_mismatch_nats",
        "importance_weights",
    }
)  # fmt: skip
