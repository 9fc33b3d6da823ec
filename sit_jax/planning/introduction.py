"""What a run says of itself before its first step."""

import jax

from sit_jax.models import attention
from sit_jax.models.flops import forward_macs
from sit_jax.planning.plan import held_whole


def introduce(say, config, parts, mesh, state, source):
    """The network, its data and its devices; what a source or a mesh remarks."""
    count, rest = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.frozen)
    )
    kept = f", {rest:,} more are frozen" if rest else ""
    device = jax.devices()[0].device_kind
    macs = forward_macs(parts.model, parts.shape)
    say(
        f"{type(parts.model).__name__} with {count:,} parameters{kept}, "
        f"{macs / 1e9:.3g} GMAC an image; {len(source):,} "
        f"records; batch {config.batch_size} on {jax.device_count()} x {device}; "
        f"EMA decay {config.ema_decay}; "
        f"attention {attention.attention_name(parts.model)}"
    )
    for line in (*getattr(source, "remarks", ()), *held_whole(mesh, state.params)):
        say(line)
