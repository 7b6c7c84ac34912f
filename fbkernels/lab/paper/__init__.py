"""The paper's figures and tables: ``fbkernels reproduce``."""

from fbkernels.lab.paper import autoencoder, cifar
from fbkernels.lab.paper.driver import SCALES, Experiment, reproduce
from fbkernels.lab.paper.fig2 import FIG2
from fbkernels.lab.paper.fixed_w import FIXED_W
from fbkernels.lab.paper.noise_search import NOISE_SEARCH
from fbkernels.lab.paper.scaling import SCALING

EXPERIMENTS: dict[str, Experiment] = {
    "fig2": FIG2,
    "fig2-fixed-w": FIXED_W,
    "fig3": autoencoder.FIGURE,
    "autoencoder-table": autoencoder.TABLE,
    "cifar10": cifar.experiment("cifar10"),
    "cifar100": cifar.experiment("cifar100"),
    "scaling": SCALING,
    "noise-search": NOISE_SEARCH,
}

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "reproduce"]
