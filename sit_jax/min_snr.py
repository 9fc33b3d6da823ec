"""Min-SNR-5: the objective that MDTv2 is trained with."""

from sit_jax import predictions
from sit_jax.diffusion import hybrid
from sit_jax.gaussians import gather

MOST = 5.0


def min_snr(process, batch, out):
    """hybrid, its squared error weighted by min(snr, 5) / snr; the bound is not.

    Hang et al., arXiv:2303.09556, where snr = alpha^2 / sigma^2. An error of the data
    weighs min(snr, 5). Of all other predictions MDT takes the noise's weight.
    """
    terms = hybrid(process, batch, out)
    alpha_bar = process.alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)
    most = snr.clip(max=MOST)
    weight = most if process.predicts is predictions.data else most / snr
    mse = gather(weight, batch.t[:, 0, 0, 0]) * terms["mse"]
    loss = mse + terms["vb"] if "vb" in terms else mse
    return terms | {"loss": loss, "mse": mse}
