"""What other trainers call a setting, and what does its work here.

Whoever comes from TRL, Unsloth, mlx-lm-lora or LightRFT types their names: an unknown key is
answered from here, and docs/coming_from.md (made by docs/coming_from.py) lists all of them.
"""

HERE: dict[str, tuple[str, str]] = {
    # their name: (settings here, separated by spaces; what differs)
    "beta": ("kl_coeff", ""),
    "kl_coef": ("kl_coeff", ""),
    "init_kl_coef": ("kl_coeff", ""),
    "epsilon": ("clip_eps", ""),
    "clip_range": ("clip_eps", ""),
    "epsilon_high": ("clip_eps_high", ""),
    "grpo_loss_type": ("loss_type", ""),
    "scale_rewards": ("advantage_estimator", "group_norm, batch, or dr_grpo for none"),
    "multi_objective_aggregation": ("advantage_estimator", "normalize_then_sum is gdpo"),
    "use_bias_correction_kl": ("kl_bias_correction", ""),
    "entropy_coef": ("entropy_coeff", ""),
    "sync_ref_model": ("ref_sync_updates", "above 0 turns it on"),
    "ref_model_sync_steps": ("ref_sync_updates", ""),
    "ref_model_mixup_alpha": ("ref_sync_alpha", ""),
    "vllm_importance_sampling_correction": ("importance_mode", "always corrected"),
    "vllm_importance_sampling_mode": ("importance_mode", ""),
    "vllm_importance_sampling_clip_max": ("importance_cap", ""),
    "vllm_importance_sampling_cap": ("importance_cap", ""),
    "vllm_importance_sampling_clip_min": ("importance_floor", ""),
    "off_policy_mask_threshold": ("importance_mode importance_cap", "token_mask, sequence_mask"),
    "group_size": ("num_generations", ""),
    "num_samples": ("num_generations", ""),
    "n_samples_per_prompt": ("num_generations", ""),
    "num_generations_eval": ("", "one greedy answer of each question; evaluate_model.py --n"),
    "generation_batch_size": ("rollout_batch_size", ""),
    "per_device_train_batch_size": ("batch_size", "in prompts here, not in completions"),
    "train_batch_size": ("batch_size", "in prompts here, not in completions"),
    "micro_batch_size": ("micro_batch_tokens", "in tokens; chosen by the memory there is"),
    "per_device_eval_batch_size": ("rollout_batch_size", "the sampler is that of training"),
    "steps_per_generation": (
        "gradient_accumulation_steps num_iterations",
        "every rollout is used by num_iterations updates",
    ),
    "auto_find_batch_size": (
        "rollout_batch_size micro_batch_tokens",
        "0: found, and halved when memory runs out",
    ),
    "max_tokens": ("max_new_tokens", ""),
    "max_tool_calling_iterations": ("max_turns", "turns of the model: one more"),
    "max_seq_length": ("max_prompt_length max_new_tokens", "a prompt that is too long is left out"),
    "max_completion_len": ("max_completion_length", ""),
    "max_prompt_len": ("max_prompt_length", ""),
    "top_k_sampling": ("top_k", ""),
    "temp": ("temperature", ""),
    "stop": ("stop_strings", ""),
    "max_steps": ("max_updates", ""),
    "iters": ("max_updates", ""),
    "num_iters": ("max_updates", ""),
    "steps": ("max_updates", ""),
    "epochs": ("num_epochs", ""),
    "num_train_epochs": ("num_epochs", ""),
    "lr": ("learning_rate", "of adapters: lora_learning_rate"),
    "lr_schedule": ("lr_scheduler_type warmup_ratio", ""),
    "lr_scheduler_kwargs": ("lr_scheduler_type", "cosine, linear and constant need none"),
    "warmup_steps": ("warmup_ratio", "a share of all updates"),
    "warmup": ("warmup_ratio", "a share of all updates"),
    "max_norm": ("max_grad_norm", ""),
    "grad_clip": ("max_grad_norm", ""),
    "adam_epsilon": ("", "1e-8, as everywhere"),
    "optim": ("moment_bits master_weights", "AdamW; moment_bits = 8 is the 8-bit one"),
    "optimizer": ("moment_bits master_weights", "AdamW; moment_bits = 8 is the 8-bit one"),
    "fp16": ("dtype", 'dtype = "float16"'),
    "bf16": ("dtype", 'dtype = "bfloat16"'),
    "fp16_full_eval": ("dtype", ""),
    "bf16_full_eval": ("dtype", ""),
    "grad_checkpoint": ("gradient_checkpointing", ""),
    "activation_checkpointing": ("gradient_checkpointing", ""),
    "use_gradient_checkpointing": ("gradient_checkpointing", ""),
    "torch_compile": ("use_compile", "mx.compile"),
    "model": ("model_name", ""),
    "model_name_or_path": ("model_name", ""),
    "pretrain": ("model_name", ""),
    "model_init_kwargs": ("dtype trust_remote_code", ""),
    "data": ("dataset", ""),
    "dataset_name": ("dataset", ""),
    "prompt_data": ("dataset", ""),
    "shuffle_dataset": ("shuffle", ""),
    "train_sampling_strategy": ("shuffle curriculum", ""),
    "data_seed": ("seed", ""),
    "mask_prompt": ("", "a prompt is never trained"),
    "remove_unused_columns": ("", "reward functions get every column"),
    "dataloader_drop_last": ("", "the last rows of an epoch are a smaller update"),
    "reward_functions": ("reward_funcs", ""),
    "reward_functions_file": ("reward_funcs", '"file.py:function"'),
    "reward_scaling": ("reward_weights", ""),
    "judge": ("reward_funcs reward_kwargs", "the reward judge; docs/rewards.md"),
    "judge_config": ("reward_kwargs", "docs/rewards.md"),
    "num_layers": ("lora_layers", ""),
    "lora_parameters": ("lora_rank lora_scale lora_dropout lora_keys", "scale is the factor"),
    "lora_r": ("lora_rank", ""),
    "loraplus_lr_ratio": ("lora_plus_ratio", ""),
    "r": ("lora_rank", ""),
    "rank": ("lora_rank", ""),
    "lora_alpha": ("lora_scale", "the factor itself: alpha / rank"),
    "target_modules": ("lora_keys", ""),
    "use_lora": ("train_type", 'train_type = "lora"'),
    "use_dora": ("train_type", 'train_type = "dora"'),
    "use_peft": ("train_type", 'train_type = "lora"'),
    "peft_config": ("train_type lora_rank lora_scale lora_keys", ""),
    "resume_adapter_file": ("adapter_path resume", "adapter_path starts from it, resume goes on"),
    "resume_from_checkpoint": ("resume", "or --resume"),
    "output": ("output_dir", ""),
    "save_every": ("save_steps", "in batches"),
    "save_strategy": ("save_steps", "in batches; 0 only at the end"),
    "steps_per_report": ("logging_steps", "in batches"),
    "logging_strategy": ("logging_steps", "in batches"),
    "logging_first_step": ("logging_steps", "the first is always shown"),
    "steps_per_eval": ("eval_steps", "in batches"),
    "eval_strategy": ("eval_steps", "in batches; 0 only before and after training"),
    "eval_on_start": ("eval_samples", "above 0: before training, too"),
    "eval_delay": ("eval_steps", ""),
    "val_batches": ("eval_samples", "in questions"),
    "test_batches": ("eval_samples", "in questions"),
    "load_best_model_at_end": ("save_best", "kept in best/"),
    "metric_for_best_model": ("eval_metric", ""),
    "greater_is_better": ("", "higher is better"),
    "num_completions_to_print": ("log_completions", "how many"),
    "log_unique_prompts": ("log_completions", "over as many prompts as possible"),
    "project": ("wandb_project", ""),
    "wandb_org": ("wandb_entity", ""),
    "system": ("system_prompt", ""),
    "instruction": ("system_prompt", ""),
    "judge_model": ("reward_kwargs", "of the reward judge; docs/rewards.md"),
    "load_in_4bit": ("model_name", "of a folder that utils/convert_model.py --quantize made"),
    "load_in_4bits": ("model_name", "of a folder that utils/convert_model.py --quantize made"),
    "load_in_6bits": ("model_name", "of a folder that utils/convert_model.py --bits 6 made"),
    "load_in_8bits": ("model_name", "of a folder that utils/convert_model.py --bits 8 made"),
    "load_in_mxfp4": ("model_name", "of a folder that utils/convert_model.py --q-mode mxfp4 made"),
    "fuse": ("", "final/ is the fused model, its adapters beside it"),
    "reference_model_path": ("", "the reference is the model as it was at the start"),
    "full_determinism": ("", "always: a seed gives the same run"),
    "ignore_data_skip": ("", "a resumed run goes on where it was"),
    "push_to_hub": ("", "hf upload OWNER/NAME outputs/.../final"),
    "use_cpu": ("", "MLX takes the GPU there is"),
    "max_memory": ("memory_limit_gb", ""),
}
# The same names, where what they do differs.
SAME = {
    "max_completion_length": "with the reasoning prefix; `max_new_tokens` are those sampled",
    "save_steps": "in batches of prompts",
    "logging_steps": "in batches of prompts",
    "eval_steps": "in batches of prompts",
    "adapter_path": "adapters to start from; those trained are written into `output_dir`",
    "batch_size": "in prompts, each with `num_generations` completions",
    "report_to": "csv, tensorboard, wandb, trackio",
}

# What has no counterpart, by the reason.
NOT_HERE: dict[str, str] = {
    "one process samples and trains, so that there is no engine to set up": (
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode "
        "vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
        "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
        "use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged cache_implementation use_cache fast_inference "
        "gpu_memory_utilization lm_studio_name generation_kwargs"
    ),
    "--ranks and --hostfile train on several devices, see docs/distributed.md": (
        "num_gpus n_gpus average_tokens_across_devices log_on_each_node save_on_each_node "
        "log_level_replica accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank "
        "eval_use_gather_object"
    ),
    "every device holds the whole model": (
        "vllm_tensor_parallel_size tensor_parallel tensor_parallel_size "
        "ds3_gather_for_generation parallelism_config fsdp fsdp_config deepspeed"
    ),
    "of PyTorch; MLX has nothing to set there": (
        "cast_lm_head_to_fp32 tf32 torch_compile_backend torch_compile_mode use_liger_kernel "
        "liger_kernel_config torch_empty_cache_steps optim_args optim_target_modules "
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs pad_to_multiple_of "
        "enable_jit_checkpoint skip_memory_metrics debug device_map attn_implementation"
    ),
    "the rows lie in memory": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "length_column_name label_names"
    ),
    "environment names the class here, see docs/environments.md": "environment_factory",
    "text only": "log_multimodal",
    "nothing is sent to the hub": (
        "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "part of transformers' Trainer, which is not used here": (
        "label_smoothing_factor neftune_noise_alpha logging_nan_inf_filter "
        "include_num_input_tokens_seen log_level disable_tqdm prediction_loss_only "
        "eval_do_concat_batches eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "save_only_model restore_callback_states_from_checkpoint do_train do_eval do_predict"
    ),
    "not in this trainer": (
        "router_aux_loss_coef disable_dropout repetition_penalty sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
        "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target "
        "klpo_route klpo_kl_estimator klpo_mc_samples klpo_top_k klpo_tail_floor alpha "
        "recurrence_chunk_size efficient_long_context"
    ),
    "of other ways to train than GRPO (utils/pretrain.py warms up on answers)": (
        "train train_mode sft_loss_type test optimizer_config dpo_cpo_loss_type dsla_loss "
        "latent_weight latent_margin latent_gamma latent_variant latent_pooling latent_layer "
        "lambda_mse_target tau_mse_target lambda_mse clip_epsilon_logits qat_enable qat_bits "
        "qat_group_size qat_mode qat_start_step qat_interval"
    ),
    "the command line's own: --config FILE": "config",
}
REASONS = {name: reason for reason, names in NOT_HERE.items() for name in names.split()}


def advice(name: str) -> str:
    """What to use instead of a name of another trainer's; empty for an unknown one."""
    name = name.strip().lstrip("-").replace("-", "_").lower()
    if name in REASONS:
        return f"{name} is not a setting here: {REASONS[name]}"
    if name not in HERE:
        return ""
    ours, remark = HERE[name]
    if not ours:
        return f"{name} is not needed here: {remark}"
    text = f"it is {' and '.join(map(repr, ours.split()))} here"
    return f"{text} ({remark})" if remark else text
