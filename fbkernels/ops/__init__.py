"""The operators behind ``torch.ops.fbkernels``: each is a file with its schema, its check and its backends."""

from fbkernels.ops._op import BACKENDS, backend_of, backends, build_info, choose, emulating, fuses, interpreting, native, table
from fbkernels.ops.feedback import op as feedback
from fbkernels.ops.feedback_update import op as feedback_update
from fbkernels.ops.mirror import op as mirror
from fbkernels.ops.noise import KINDS
from fbkernels.ops.noise import draw as noise
from fbkernels.ops.perturbed_conv2d import op as perturbed_conv2d
from fbkernels.ops.perturbed_cross_entropy import op as perturbed_cross_entropy
from fbkernels.ops.perturbed_linear import op as perturbed_linear
from fbkernels.ops.perturbed_pointwise import op as perturbed_pointwise
from fbkernels.ops.pooled_weight_gradient import op as pooled_weight_gradient
from fbkernels.ops.ridge_gain import op as ridge_gain
from fbkernels.ops.unpool import op as unpool

__all__ = [
    "BACKENDS",
    "KINDS",
    "backend_of",
    "backends",
    "build_info",
    "choose",
    "emulating",
    "feedback",
    "feedback_update",
    "fuses",
    "interpreting",
    "mirror",
    "native",
    "noise",
    "perturbed_conv2d",
    "perturbed_cross_entropy",
    "perturbed_linear",
    "perturbed_pointwise",
    "pooled_weight_gradient",
    "ridge_gain",
    "table",
    "unpool",
]
