"""The one folder that touches private parts of transformers, accelerate and torch.

Each function says what it reaches into. `CHECKS` lists them with the versions they were checked for; `hfext doctor`
runs the checks, and a test fails when upstream moves one. Everything here is idempotent and leaves users of stock
names with stock behaviour, bit for bit.
"""

from ._checks import CHECKS
from ._generate import (
    attention_implementation,
    given_processors,
    keep_unknown_fields,
    let_callables_refuse,
    on_logits_processors,
    own_cache,
)
from ._hub import hub_failures, line_failed, pushes_of, wait_for_pushes
from ._masks import computes_its_own_attention, is_causal, mask_parts
from ._torch import (
    cpu_kernels,
    cpu_multiplies_bf16,
    full_tensor,
    optimizer_hook_tables,
    set_base_rates,
    set_optimizer_mode,
)
from ._trainer import (
    CheckpointMixin,
    add_enum_member,
    counters_kept,
    decayed_parameters,
    keep_column,
    loss_is_scaled,
    loss_shifts_labels,
    patch_method,
    plain_optimizer,
    quantized_weights_only,
    read_items,
    read_training_args,
    register_optimizer,
    register_scheduler,
    replaced,
    stock_optimizer,
    train_batch_size,
    two_pass_optimizer,
    undivided_modules,
    was_loaded,
    without_data_parallel,
    zeroth_order_optimizer,
)
