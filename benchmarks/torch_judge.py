"""The 2015 Inception network in PyTorch: torch-fidelity's extractor, beside ours.

pip install --no-deps torch-fidelity; of the package only what the network takes is
imported, for all of it wants torchvision.
"""

import importlib.util
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from sit_jax.convert.rules import to_torch
from sit_jax.errors import UserError
from sit_jax.evaluation.features import inception_pipeline
from sit_jax.models.inception import RULES

PACKAGE = "torch_fidelity"
NAMES = ("2048", "logits_unbiased")
SPATIAL = 7  # channels


class TorchJudge:
    """weights: inception.load_inception(). Stages as in diagnosis/stages.py."""

    def __init__(self, weights, device="cpu", folder=None):
        self.device, self.network = device, network(weights, folder).to(device)
        made = f"{PACKAGE} {_version()}"
        self.pipeline = {**inception_pipeline(weights), "library": made}

    def stages(self, images):
        """uint8 [n, H, W, 1 or 3] -> {stage: array [n, ...]}, as stages.py's."""
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        seen, inside = {}, self.network
        first = inside.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda _, inputs: seen.__setitem__("resized", _nhwc(inputs[0]))
        )
        # which is the graph's mixed_6/conv
        sixth = inside.Mixed_6d.branch1x1.register_forward_hook(
            lambda _, inputs, out: seen.__setitem__("spatial features", _nhwc(out))
        )
        pool = self(images)
        first.remove()
        sixth.remove()
        spatial = seen["spatial features"][..., :SPATIAL].reshape(len(images), -1)
        return {
            "resized": seen["resized"],
            "features": pool,
            "spatial features": spatial,
        }

    def __call__(self, images):
        """uint8 [n, H, W, 3] -> features [n, 2048]."""
        batch = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(self.device)
        with torch.inference_mode():
            return self.network(batch)[0].cpu().numpy()


def network(weights, folder=None):
    """Returns torch-fidelity's network, from a folder, with these weights."""
    _reachable(folder)
    from torch_fidelity import feature_extractor_inceptionv3 as module

    state = to_torch(RULES, weights.params)
    state = {name: torch.from_numpy(np.array(a)) for name, a in state.items()}
    made = type("FeatureExtractor", (module.FeatureExtractorInceptionV3,), {})
    module.load_state_dict_from_url = lambda *args, **options: state
    made.load_state_dict = lambda self, state: torch.nn.Module.load_state_dict(
        self,
        state,
        strict=False,  # counters of batches
    )
    return made("inception", list(NAMES))


def _reachable(folder):
    """Makes the package's modules importable without what it imports itself."""
    if PACKAGE in sys.modules:
        return
    if folder is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None:
            raise UserError(
                "features by PyTorch need pip install --no-deps torch-fidelity"
            )
        places = list(found.submodule_search_locations)
    else:
        places = [str(Path(folder).expanduser() / PACKAGE)]
        if not Path(places[0]).is_dir():
            raise UserError(f"--torch-fidelity {folder}: no {PACKAGE} in it")
    package = types.ModuleType(PACKAGE)
    package.__path__ = places
    sys.modules[PACKAGE] = package


def _version():
    try:
        return metadata.version("torch-fidelity")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _nhwc(tensor):
    return np.ascontiguousarray(tensor.detach().cpu().numpy().transpose(0, 2, 3, 1))
