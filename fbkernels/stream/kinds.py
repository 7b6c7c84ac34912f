"""Which kind of function a torch call is: what its difference is, follows from that (SPEC 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fbkernels._compile import constant
from fbkernels.stream.synchronised import synchronised

# fmt: off
NORMS = {"batch_norm", "group_norm", "layer_norm", "instance_norm", "local_response_norm", "rms_norm", "synchronised"}
ACTIVATIONS = {
    "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "relu6", "softplus", "mish", "hardswish", "hardsigmoid",
    "selu", "celu", "prelu", "threshold", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "clamp",
}
POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
# What may stand between a layer and its point: the noise goes in behind it (SPEC 1), behind dropout too, whose mask the error then passes.
GROUP = NORMS | ACTIVATIONS | POOLS | DROPOUTS
# Linear maps that carry a point's noise unchanged to the layer that reads it.
REARRANGEMENTS = {
    "flatten", "view", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous", "pad", "unflatten", "to",
    "float", "double",
}
# What carries an error through weights of its own, for which there is no B: inside of it, from time to time say; by one product; or by
# a number for each channel, which in direct feedback is no matter. A norm's gain is none of these.
SEVERAL_PRODUCTS = {
    "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell",
}
PRODUCTS = {
    "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "inner",
}
OWN_WEIGHTS = SEVERAL_PRODUCTS | PRODUCTS | {"mul", "__mul__", "__rmul__", "multiply"}
_METADATA = """
    size dim ndimension numel nelement stride is_contiguous element_size is_floating_point is_complex get_device storage_offset data_ptr
    __len__ __hash__ is_same_size untyped_storage requires_grad_ is_pinned is_set_to has_names is_shared backward is_inference result_type
    is_signed __reduce_ex__ can_cast promote_types
"""
_GRADIENTS = "register_hook retain_grad register_post_accumulate_grad_hook"
_LOOKS = """
    item __bool__ tolist numpy __float__ __int__ __index__ __array__ __repr__ __format__ __contains__ equal allclose is_nonzero __complex__
"""
_PROPERTIES = """
    shape device dtype ndim requires_grad is_cuda grad is_leaf grad_fn layout is_sparse is_mkldnn is_quantized is_meta is_nested itemsize
    nbytes _version is_mps is_xpu is_cpu is_ipu is_xla _base output_nr name names _backward_hooks
"""
_LINEAR = """
    view reshape flatten permute transpose movedim moveaxis squeeze unsqueeze contiguous unflatten to float double clone __getitem__
    expand t swapaxes swapdims chunk split unbind tensor_split narrow select index_select gather roll flip sum mean avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d repeat tile repeat_interleave neg __neg__ cumsum diagonal tril
    triu pixel_shuffle unfold fold pixel_unshuffle cpu cuda half bfloat16 ravel broadcast_to channel_shuffle rot90 trace take unsafe_chunk
    unsafe_split adjoint interpolate upsample view_as reshape_as expand_as type_as
"""
_ELEMENTWISE = "exp sqrt rsqrt square abs log softmax log_softmax max_pool2d layer_norm group_norm rms_norm"
# fmt: on
MADE = ("new_", "rand", "empty", "zeros", "ones", "full", "arange", "eye", "tensor", "as_tensor", "scalar_tensor")
# where the position of ``inplace`` is, of functions that take it so
_INPLACE = {
    "relu": 1, "relu6": 1, "elu": 2, "leaky_relu": 2, "hardtanh": 3, "dropout": 3, "hardswish": 1, "silu": 1, "hardsigmoid": 1, "mish": 1,
    "celu": 2, "selu": 1, "threshold": 3, "dropout1d": 3, "dropout2d": 3, "dropout3d": 3, "alpha_dropout": 3, "rrelu": 4,
}  # fmt: skip
LAYERS = {
    "linear": "linear",
    **{f"conv{d}d": "convolution" for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": "transposed" for d in (1, 2, 3)},
}


def _named(*names: str) -> list[Any]:
    """The functions of these names, wherever torch has them."""
    homes = (Tensor, torch, F, torch._C._nn, torch.special)
    return [f for name in names for home in homes if (f := getattr(home, name, None)) is not None and callable(f)]


def _table() -> dict[Any, str]:
    kinds: dict[Any, str] = {}

    def put(kind: str, *functions: Any) -> None:
        kinds.update(dict.fromkeys(functions, kind))

    put("elementwise", *_named(*(ACTIVATIONS - {"prelu", "clamp"}), *(n + "_" for n in ACTIVATIONS), *_ELEMENTWISE.split()))
    put("linear", *_named(*_LINEAR.split(), "neg_", "squeeze_", "unsqueeze_", "t_", "transpose_"))
    put("linear", *(getattr(Tensor, n).__get__ for n in ("T", "mT", "H", "mH", "real", "imag")))
    put("cut", *_named("detach", "detach_"), Tensor.data.__get__)  # type: ignore[attr-defined]
    put("add", *_named("add", "__add__", "__radd__"))
    put("subtract", *_named("sub", "subtract", "__sub__"))
    put("multiply", *_named("mul", "multiply", "__mul__", "__rmul__"))
    put("divide", *_named("div", "divide", "true_divide", "__truediv__"))
    put("matmul", *_named("matmul", "__matmul__", "bmm", "mm"))
    put("cat", *_named("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"))
    put("dropout", *_named("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"))
    put("pad", *_named("pad"))
    put("batch_norm", F.batch_norm)
    put("synchronised_norm", synchronised)
    put("layer", *_named(*LAYERS))
    put("metadata", *_named(*_METADATA.split()), torch.autograd.grad, *(_setters("requires_grad", "grad")))
    properties: list[Any] = [getattr(Tensor, n, None) for n in _PROPERTIES.split()]
    put("metadata", *(p.__get__ for p in properties if hasattr(p, "__get__") and not callable(p)))
    put("gradient", *_named(*_GRADIENTS.split()))
    put("look", *_named(*_LOOKS.split()))
    return kinds


def _setters(*names: str) -> list[Any]:
    return [getattr(Tensor, n).__set__ for n in names]


_KINDS = _table()


@constant  # Dynamo does not know a builtin's hash
def kind_of(func: Any) -> str:
    """The kind of a function; "made" of one whose result has a tensor's shape alone, "" of one that has no kind of its own."""
    kind = _KINDS.get(func)
    if kind is None:
        name = name_of(func)
        made = (name.startswith(MADE) and name != "tensordot") or name.endswith("_like")
        kind = _KINDS[func] = "made" if made else ""
    return kind


@constant
def name_of(func: Any) -> str:
    return str(getattr(func, "__name__", func))


@constant
def same(a: Any, b: Any) -> bool:
    return bool(a == b)


def by_position(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call whose ``input`` is named, with that in the first place, as it is of all but two functions."""
    if name_of(func) in ("where", "searchsorted"):
        return args, kwargs
    return (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}


def in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call writes into its first argument, or into ``out``."""
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return True
    if name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"):
        return True
    if kwargs and (kwargs.get("inplace") is True or kwargs.get("out") is not None):
        return True
    position = _INPLACE.get(name)
    return position is not None and len(args) > position and args[position] is True
