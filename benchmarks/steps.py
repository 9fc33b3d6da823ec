"""One training step in a process of its own: ours, or the original PyTorch one.

A worker gets its case as JSON, prints what making the step ready cost, and then for
every number read from its input the seconds that so many steps take.
"""

import functools
import json
import sys
import time

SHAPE = (32, 32, 4)  # 256 px latents


def main():
    case = json.loads(sys.argv[1])
    try:
        facts, run, memory = (theirs if case["side"] == "torch" else ours)(case)
        say(facts)
        for line in sys.stdin:
            begun = time.perf_counter()
            run(int(line))
            seconds = time.perf_counter() - begun
            say({"seconds": seconds, "peak_gb": memory() / 1e9})
    except Exception as error:  # out of memory, say: one row less
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]})


def say(facts):
    print("=" + json.dumps(facts), flush=True)


def ours(case):
    import jax
    import numpy as np

    from sit_jax.models import attention
    from sit_jax.models.codec import Pixels
    from sit_jax.models.flops import step_macs
    from sit_jax.parallel import hardware
    from sit_jax.planning.programs import get_compiler_options
    from sit_jax.trainer.compile import keep_freed_memory, limit_kept_memory
    from sit_jax.training.state import TrainState, init_params
    from sit_jax.training.step import make_train_step

    keep_freed_memory()
    model, process, tx = parts(case)
    begin = lambda key: TrainState.create(init_params(model, SHAPE, key), tx)
    state = jax.jit(begin)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "latent": rng.standard_normal((case["batch"], *SHAPE), np.float32),
        "label": rng.integers(1000, size=case["batch"]).astype(np.int32),
    }
    batch, key = jax.device_put(batch), jax.random.key(1)
    options = get_compiler_options(jax.default_backend())
    how = {"donate_argnums": 0, "compiler_options": options}
    step = jax.jit(make_train_step(model, process, tx), **how)
    begun = time.perf_counter()
    step = step.lower(state, Pixels(), batch, key).compile()
    compiling = time.perf_counter() - begun
    limit_kept_memory(step)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, Pixels(), batch, key)
        jax.block_until_ready((state, metrics))

    run(2)
    facts = {
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
        "attention": attention.attention_name(model),
        "compile_s": compiling,
        "temporaries_gb": step.memory_analysis().temp_size_in_bytes / 1e9,
        "gflop_per_image": 6e-9 * step_macs(model, SHAPE),
        "peak_tflops": (hardware.peak_flops() or 0) / 1e12,
    }
    return facts, run, hardware.peak_memory


def parts(case):
    """Returns model, process and optimizer of the published run, at the case's size."""
    import optax

    from sit_jax.diffusion.gaussian import GaussianDiffusion
    from sit_jax.diffusion.interpolant import Interpolant
    from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
    from sit_jax.models import dit, mdt
    from sit_jax.training.optimizers import adan

    names = ("dtype", "remat", "unroll", "attention")
    fields = {name: case[name] for name in names if name in case}
    fields |= dit.SIZES[case["size"]] | case.get("fields", {})
    adamw = optax.adamw(1e-4, weight_decay=0.0)
    if case["kind"] == "mdtv2":
        tx = optax.chain(optax.clip_by_global_norm(1.0), adan(1e-4))
        return mdt.MDTv2(**fields), GaussianDiffusion(objective=mdt_min_snr_loss), tx
    if case["kind"] == "dit":
        return dit.DiT(**fields), GaussianDiffusion(), adamw
    return dit.SiT(**fields), Interpolant(), adamw


def theirs(case):
    """SiT, DiT, fast-DiT or MDT, with optimizer and average as their scripts have them.

    MDT's own, Adan, is a package of its own; without a clone of it AdamW stands in.
    Attention is scaled_dot_product_attention but in MDT, whose module has its own.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if case["tf32"] else "highest")
    model, loss = original(case)
    model = model.to(device).train()
    average = [weight.detach().clone() for weight in model.parameters()]
    if case["remat"] == "full":
        for block in checkpointed(model):
            recompute = functools.partial(
                torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
            )
            block.forward = recompute
    weights = list(model.parameters())
    tx = optimizer(case, weights)
    x = torch.randn(case["batch"], SHAPE[2], *SHAPE[:2], device=device)
    y = torch.randint(1000, (case["batch"],), device=device)
    net = torch.compile(model) if case["compile"] else model
    half = torch.autocast(device, torch.bfloat16, enabled=case["dtype"] == "bfloat16")

    def run(steps):
        for _ in range(steps):
            with half:
                value = loss(net, x, y)
            tx.zero_grad()
            value.backward()
            tx.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - 0.9999)
        if device == "cuda":
            torch.cuda.synchronize()

    begun = time.perf_counter()
    run(1)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    first = {"device": name, "version": f"torch {torch.__version__}"}
    first["compile_s"] = time.perf_counter() - begun if case["compile"] else 0.0
    run(1)
    return first, run, torch.cuda.max_memory_allocated if device == "cuda" else resident


def optimizer(case, weights):
    import originals
    import torch

    if not case.get("adan"):
        return torch.optim.AdamW(weights, lr=1e-4, weight_decay=0, foreach=True)
    (package,) = originals.load(case["adan"], "adan")
    return package.Adan(weights, lr=1e-4, weight_decay=0.0, max_grad_norm=1)


def original(case):
    import absent
    import originals
    import torch

    draw_t = lambda x: torch.randint(1000, (len(x),), device=x.device)
    if case["kind"] == "mdtv2":
        ours = ("masked_diffusion", "masked_diffusion.models")
        package, models = originals.load(case["reference"], *ours)
        fields = case.get("fields", {})
        make = getattr(models, f"MDTv2_{case['size']}_2")
        masks = fields.get("hide", 0.3)
        model = make(mask_ratio=masks, decode_layer=fields.get("decoder", 4))
        diffusion = package.create_diffusion("")

        def loss(net, x, y):
            t, told = draw_t(x), [{"y": y}, {"y": y, "enable_mask": True}]
            each = lambda more: diffusion.training_losses(net, x, t, more)["loss"]
            return sum(each(more).mean() for more in told[: 1 if masks is None else 2])

        return model, loss
    if case["kind"] == "dit":
        models, package = originals.load(case["reference"], "models", "diffusion")
        model = models.DiT_models[f"DiT-{case['size']}/2"](input_size=SHAPE[0])
        diffusion = package.create_diffusion("")
        losses = lambda net, x, y: diffusion.training_losses(
            net, x, draw_t(x), {"y": y}
        )
    else:
        absent.stand_in("torchdiffeq")  # for its samplers
        models, package = originals.load(case["reference"], "models", "transport")
        model = models.SiT_models[f"SiT-{case['size']}/2"](input_size=SHAPE[0])
        transport = package.create_transport()
        losses = lambda net, x, y: transport.training_losses(net, x, {"y": y})
    return model, lambda net, x, y: losses(net, x, y)["loss"].mean()


def checkpointed(model):
    lists = ("blocks", "en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    return [block for name in lists for block in getattr(model, name, [])]


def resident():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    from pathlib import Path

    here = Path(__file__).parent
    sys.path[:0] = [str(here.parent), str(here)]
    main()
