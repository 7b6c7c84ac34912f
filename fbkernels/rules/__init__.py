"""How B is learned: one small file a rule. A rule of your own subclasses ``Rule`` and is passed as an instance; nothing else changes."""

from collections.abc import Callable
from functools import partial

from fbkernels.rules.base import Measurement, Rule
from fbkernels.rules.fixed import Fixed
from fbkernels.rules.joint import Joint
from fbkernels.rules.kolen_pollack import KolenPollack
from fbkernels.rules.lms import LMS
from fbkernels.rules.node_perturbation import NodePerturbation
from fbkernels.rules.normalized_lms import NormalizedLMS
from fbkernels.rules.ridge import Ridge
from fbkernels.rules.sign_symmetric import SignSymmetric
from fbkernels.rules.synthetic_gradient import SyntheticGradient
from fbkernels.rules.weight_mirror import WeightMirror
from fbkernels.rules.weight_transport import WeightTransport

__all__ = [
    "LMS",
    "Fixed",
    "Joint",
    "KolenPollack",
    "Measurement",
    "NodePerturbation",
    "NormalizedLMS",
    "Ridge",
    "Rule",
    "SignSymmetric",
    "SyntheticGradient",
    "WeightMirror",
    "WeightTransport",
]

# names on the command line, with the settings that a rule has no default for
RULES: dict[str, Callable[..., Rule]] = {
    "ridge": Ridge,
    "lms": partial(LMS, lr=0.005),
    "nlms": partial(NormalizedLMS, lr=0.005),
    "joint": Joint,
    "joint-loss": partial(Joint, signal="loss"),
    "joint-output": partial(Joint, signal="output"),
    "weight-mirror": WeightMirror,
    "fixed": Fixed,
    "kolen-pollack": partial(KolenPollack, decay=1e-3),
    "synthetic": partial(SyntheticGradient, lr=0.005),
    "sign-symmetric": SignSymmetric,
    "weight-transport": WeightTransport,
    "node-perturbation": NodePerturbation,
}
