"""The functional interface."""

from fbkernels.ops.feedback import feedback
from fbkernels.ops.feedback_update import Update, feedback_update
from fbkernels.ops.mirror import Mirror, MirrorAll, mirror, mirror_all
from fbkernels.ops.noise import noise, philox_words
from fbkernels.ops.perturbed_conv2d import perturbed_conv2d
from fbkernels.ops.perturbed_cross_entropy import PerturbedCrossEntropy, perturbed_cross_entropy
from fbkernels.ops.perturbed_linear import perturbed_linear
from fbkernels.ops.perturbed_pointwise import Perturbed, perturbed_pointwise
from fbkernels.ops.ridge_gain import RidgeGain, ridge_gain

__all__ = [
    "Mirror",
    "MirrorAll",
    "Perturbed",
    "PerturbedCrossEntropy",
    "RidgeGain",
    "Update",
    "feedback",
    "feedback_update",
    "mirror",
    "mirror_all",
    "noise",
    "perturbed_conv2d",
    "perturbed_cross_entropy",
    "perturbed_linear",
    "perturbed_pointwise",
    "philox_words",
    "ridge_gain",
]
