"""Public architectures under fb.convert: ``python bench/zoo.py [--source DIR ...] [--only PATTERN] [--out results/zoo.json]``.

Code that we did not write, each network as published (10 classes, small images), in both feedback structures. What is not there is left
out:

* torchvision and timm, where they can be imported (``pip install timm torchvision``);
* ``--source DIR``: checkouts of github.com/weiaicunzai/pytorch-cifar100, github.com/kuangliu/pytorch-cifar and
  github.com/milesial/Pytorch-UNet, which have no package.

Checked, against the plain model with the same seeds, its constant parameters (norms, layer scales, heads that start at zero) made random:

========== ==================================================================================================================
step       two training steps run, in float32
gradients  every parameter with a gradient in backprop has one, finite, and not zero where backprop's is of note
eval       the output in eval() is the plain model's, bit for bit
rng        a training forward draws from torch's, Python's and NumPy's generators what the plain model's does
clean      the training output is the plain model's to 1e-10 in float64
buffers    so are the buffers after a step
transport  layerwise: WeightTransport gives backprop's gradients to 1e-8 in float64
control    layerwise: and Fixed does not
heads      direct: so does a step at every parameter behind the last hidden layers, the output layers among them
oracle     direct: the output's change is that of a second pass of the plain model with the same noise, to 1e-10 in float64, and where a
           sample's noise is left out its output does not change
revert     fb.revert gives the plain model back: the same parameters, no hooks, the same output in eval() bit for bit
summary    fb.summary(net, x) knows every point's B
---------- ------------------------------------------------------------------------------------------------------------------
bitwise    (for information) the training output in float32 is the plain model's bit for bit
compile    (for information, with --compile PATTERN) torch.compile(net, fullgraph=True, backend="aot_eager") gives eager's outputs and
           gradients in a first and a second step
========== ==================================================================================================================

Each architecture has a process of its own, one thread and ``--limit`` seconds. Takes half an hour. Prints a table, and writes what was
found, check by check, with the reason where one fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import fnmatch
import functools
import json
import math
import multiprocessing
import random
import re
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fbkernels as fb
from fbkernels.training.step import Step

BATCH, CLASSES, STD, SEED = 4, 10, 0.05, 3
STRUCTURES: dict[str, Callable[[], fb.Rule]] = {"direct": lambda: fb.Joint(signal="output"), "layerwise": fb.WeightMirror}
CHECKS = ("step", "gradients", "eval", "rng", "clean", "buffers", "transport", "control", "heads", "oracle", "revert", "summary")
INFORMATION = ("bitwise", "compile")

# source and size: calls in the source's own words, mostly the smallest of a family
ZOO = {
    ("pytorch-cifar100", 32): """
        attention.attention56() densenet.densenet121() googlenet.googlenet() inceptionv3.inceptionv3() mobilenet.mobilenet()
        mobilenetv2.mobilenetv2() nasnet.nasnet() preactresnet.preactresnet18() preactresnet.preactresnet50() resnet.resnet18()
        resnet.resnet50() resnext.resnext50() rir.resnet_in_resnet() senet.seresnet18() senet.seresnet50() shufflenet.shufflenet()
        shufflenetv2.shufflenetv2() squeezenet.squeezenet(class_num=10) stochasticdepth.stochastic_depth_resnet18() vgg.vgg16_bn()
        wideresidual.wideresnet(depth=16,widen_factor=4) xception.xception()""",
    ("pytorch-cifar", 32): """
        LeNet() VGG('VGG11') DPN26() SENet18() PNASNetB() densenet_cifar() GoogLeNet() ShuffleNetV2(net_size=0.5) ResNet18()
        ResNeXt29_2x64d() PreActResNet18() MobileNet() MobileNetV2() EfficientNetB0() RegNetX_200MF() RegNetY_400MF() SimpleDLA() DLA()""",
    ("Pytorch-UNet", 32): "UNet(n_channels=3,n_classes=10) UNet(n_channels=3,n_classes=10,bilinear=True)",
    ("torchvision", 64): """
        alexnet() resnet18() resnet50() densenet121() squeezenet1_1() googlenet(aux_logits=False,init_weights=False)
        googlenet(aux_logits=True,init_weights=False) mobilenet_v2() mobilenet_v3_small() mobilenet_v3_large() mnasnet0_5()
        shufflenet_v2_x0_5() efficientnet_b0() efficientnet_v2_s() regnet_x_400mf() regnet_y_400mf() convnext_tiny() swin_t() swin_v2_t()
        VisionTransformer(image_size=64,patch_size=16,num_layers=4,num_heads=4,hidden_dim=64,mlp_dim=128)
        segmentation.fcn_resnet50(weights_backbone=None,aux_loss=True) segmentation.lraspp_mobilenet_v3_large(weights_backbone=None)
        video.r3d_18()""",
    ("torchvision", 96): """
        inception_v3(aux_logits=False,init_weights=False) segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None)""",
    ("timm", 32): "convmixer_768_32()",
    ("timm", 64): """
        resnet10t() resnet18d() resnetblur18() resnetv2_18() resnetv2_50x1_bit() seresnet18() skresnet18() resnest14d() res2net50_26w_4s()
        ecaresnet26t() dla34() dpn48b() vovnet39a() ese_vovnet19b_slim_dw() cs3darknet_s() selecsls42() hrnet_w18_small() repvgg_a0()
        gernet_s() nf_regnet_b0() efficientnet_b0() efficientnet_lite0() mobilenetv3_small_050() mobilenetv4_conv_small_035() lcnet_035()
        tinynet_e() ghostnet_050() rexnet_100() mixnet_s() regnety_002() convnext_atto() convnextv2_atto() poolformer_s12()
        edgenext_xx_small() mobilevit_xxs() mobilevitv2_050() starnet_s1() fastvit_t8() hgnetv2_b0()
        vit_tiny_patch16_224(img_size=64,drop_path_rate=0.1) deit_tiny_distilled_patch16_224(img_size=64) cait_xxs24_224(img_size=64)
        xcit_nano_12_p16_224() mixer_s32_224(img_size=64) resmlp_12_224(img_size=64) gmlp_ti16_224(img_size=64) pvt_v2_b0()
        swin_tiny_patch4_window7_224(img_size=64,window_size=4) tiny_vit_5m_224() levit_128s(img_size=64) mambaout_femto()
        sequencer2d_s() inception_next_atto()""",
    ("timm", 96): "inception_v4()",
    ("timm", 240): "crossvit_9_240()",
}


class Namespace(dict[str, Any]):
    """Names for ``eval``, looked up when they are asked for."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, name: str) -> Any:
        return self.find(name)

    def __getattr__(self, name: str) -> Any:
        return self.find(name)


@dataclass(frozen=True)
class Architecture:
    source: str
    call: str
    size: int
    directory: str | None = None

    @property
    def name(self) -> str:
        return f"{self.source}: {self.call}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 8, 32, 32) if "video." in self.call else (3, self.size, self.size)

    def build(self) -> nn.Module:
        model = eval(self.call, {}, Namespace(functools.partial(_find, self.source, self.directory)))
        assert isinstance(model, nn.Module)
        if self.source == "pytorch-cifar100":
            _fewer_classes(model, 100)
        return Pooled(model) if self.source == "Pytorch-UNet" or "segmentation." in self.call else model


def _find(source: str, directory: str | None, name: str) -> Any:
    """A constructor in a source's words."""
    if source == "timm":
        import timm

        return functools.partial(timm.create_model, name, num_classes=CLASSES)
    if source == "torchvision":
        import torchvision

        if name in ("segmentation", "video"):
            return Namespace(lambda n: functools.partial(getattr(getattr(torchvision.models, name), n), num_classes=CLASSES))
        return functools.partial(getattr(torchvision.models, name), num_classes=CLASSES)
    assert directory is not None
    sys.path.insert(0, directory)
    if source == "pytorch-cifar100":
        return __import__(f"models.{name}", fromlist=[name])
    return getattr(__import__("unet" if source == "Pytorch-UNet" else "models"), name)


def _fewer_classes(model: nn.Module, classes: int) -> None:
    """The zoo's constructors for CIFAR-100 take no number of classes; direct feedback's B is that wide, at every unit."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.out_features == classes:
                setattr(module, name, nn.Linear(child.in_features, CLASSES))


class Pooled(nn.Module):
    """A network whose outputs are maps, as a classifier: direct feedback's B would have a column for each pixel of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        maps = self.net(x)
        return {k: m.mean((2, 3)) for k, m in maps.items()} if isinstance(maps, dict) else maps.mean((2, 3))


def architectures(directories: list[str]) -> list[Architecture]:
    """Those whose source is here. A checkout is known by a file that the others lack."""
    marks = {"pytorch-cifar100": "models/rir.py", "pytorch-cifar": "models/dla_simple.py", "Pytorch-UNet": "unet/unet_parts.py"}
    found: dict[str, str | None] = {}
    for source, mark in marks.items():
        for directory in directories:
            if (Path(directory) / mark).exists():
                found[source] = str(Path(directory).resolve())
    for source in ("torchvision", "timm"):
        try:
            __import__(source)
            found[source] = None
        except (ImportError, RuntimeError) as error:
            print(f"{source} is left out: {error}", file=sys.stderr)
    result = []
    for (source, size), calls in ZOO.items():
        if source in found:
            result += [Architecture(source, call, size, found[source]) for call in calls.split()]
    for source in {s for s, _ in ZOO} - found.keys():
        print(f"{source} is left out", file=sys.stderr)
    return result


# the plain model


def randomise(model: nn.Module) -> None:
    """Parameters that are one constant get values of their own, and running statistics are those of no fresh network."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() > 1 and p.min() == p.max():
                p.add_(torch.empty_like(p).uniform_(-0.2, 0.2))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None:
                m.running_mean.uniform_(-0.1, 0.1)
                m.running_var.uniform_(0.8, 1.2)


def generators() -> tuple[bytes, int, int]:
    """Where the random number generators are."""
    return torch.get_rng_state().numpy().tobytes(), hash(random.getstate()), hash(str(numpy.random.get_state(legacy=False)))


def seeded(run: Callable[[], Any]) -> Any:
    """With the draws of dropout and drop path the same each time."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy.random.seed(SEED)
    return run()


def leaves(out: Any) -> list[Tensor]:
    """A model's outputs, however they are packed."""
    packed = vars(out) if hasattr(out, "__dataclass_fields__") else out
    return [t for t in tree_leaves(packed) if isinstance(t, Tensor)]


def several(out: Any, y: Tensor) -> Tensor:
    """Auxiliary heads: the sum of their losses, per sample."""
    return torch.stack([F.cross_entropy(z, y, reduction="none") for z in leaves(out)]).sum(0)


class Plain:
    """What the plain model does in one training step."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        model = copy.deepcopy(model)
        self.model = model
        if x.dtype == torch.float32:
            with torch.no_grad():
                self.eval = [t.clone() for t in leaves(model.eval()(x))]
        out = seeded(lambda: model.train()(x))
        self.generators, self.out = generators(), [t.detach().clone() for t in leaves(out)]
        self.heads = len(self.out)
        self.exact = behind_hidden(model, leaves(out))
        (F.cross_entropy(out, y) if isinstance(out, Tensor) else several(out, y).mean()).backward()
        self.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.buffers = dict(model.named_buffers())
        for p in model.parameters():
            p.grad = None


LAYERS = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}  # which argument is the weight


def behind_hidden(model: nn.Module, outputs: list[Tensor]) -> set[str]:
    """Parameters that no hidden layer stands before: by the graph, back from the outputs to the first layer on each way."""
    names = {id(p): n for n, p in model.named_parameters()}
    found, seen = set(), set()
    todo = [t.grad_fn for t in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(names[id(node.variable)])
            continue
        following = [n for n, _ in node.next_functions]
        weight = LAYERS.get(node.name())
        if weight is not None and (node.name().startswith("Conv") or _is_parameter(following[weight])):
            following.pop(1 if node.name().startswith("Addmm") else 0)  # what it reads
        todo += following
    return found


def _is_parameter(node: Any) -> bool:
    """Whether a node of the graph is a parameter, or one transposed."""
    while node is not None and node.name() in ("TBackward0", "ViewBackward0", "TransposeBackward0"):
        ((node, _),) = node.next_functions
    return hasattr(node, "variable")


def criterion(plain: Plain, net: nn.Module) -> Callable[..., Tensor]:
    """The three lines of the README, where a model has one output."""
    if plain.heads == 1 and isinstance(plain.model, nn.Module) and not isinstance(plain.model, Pooled):
        return fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    loss = fb.PerturbedLoss(several, net)
    return lambda out, y: loss(out, y).mean()


# checks: each returns what to note, and raises Failed


class Failed(Exception):
    """A check's answer, and not a crash."""


def need(ok: bool, reason: str) -> None:
    if not ok:
        raise Failed(reason)


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of a list of tensors, each in the maximum norm."""
    need([t.shape for t in got] == [t.shape for t in want], f"shapes {[tuple(t.shape) for t in got]}, not {[tuple(t.shape) for t in want]}")
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        if a.is_floating_point() and a.numel():
            errors.append(float((a.detach().double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)))
        elif not torch.equal(a, b):
            errors.append(math.inf)
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def gradient_errors(net: nn.Module, plain: Plain) -> dict[str, float]:
    """Relative error of each parameter's gradient; a bias before a norm has none but the rounding of a sum."""
    size = max(float(g.norm()) for g in plain.gradients.values())
    errors = {}
    for name, p in net.named_parameters():
        want = plain.gradients.get(name)
        if want is not None:
            got = torch.zeros_like(want) if p.grad is None else p.grad
            errors[name] = float((got - want).norm() / (want.norm() + 1e-6 * size))
    return errors


def exact(errors: dict[str, float]) -> str:
    worst = max(errors, key=errors.__getitem__)
    need(errors[worst] < 1e-8, f"gradient of {worst}: relative error {errors[worst]:.1e}")
    return f"{errors[worst]:.1e}, {len(errors)} parameters"


class Recorded(dict[str, dict[str, dict[str, Any]]]):
    """What was found, structure and check first; sent home at once, since a process may end at any time."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    @contextlib.contextmanager
    def check(self, structure: str, *names: str) -> Iterator[dict[str, str]]:
        """Note what happens in the ``with`` block as these checks' result."""
        note: dict[str, str] = {}
        ok, reason = True, ""
        try:
            yield note
        except Failed as failed:
            ok, reason = False, str(failed)
        except Exception as error:  # whatever foreign code or ours raises is a finding
            ok, reason = False, f"{type(error).__name__}: {' '.join(str(error).split()) or '(no message)'}"[:400]
        for name in names:
            self.note(structure, name, ok, reason or note.get(name, ""))

    def note(self, structure: str, name: str, ok: bool, note: str) -> None:
        self.connection.send((structure, name, ok, note))
        self.setdefault(structure, {})[name] = {"ok": ok, "note": note}


def examine(which: Architecture, structures: list[str], compiles: bool, doubles: bool, record: Recorded) -> None:
    with record.check("", "plain"):
        torch.manual_seed(0)
        model = which.build()
        randomise(model)
        x, y = torch.randn(BATCH, *which.shape), torch.arange(BATCH) % CLASSES
        plain = Plain(model, x, y)
    if not record[""]["plain"]["ok"]:
        return
    in_double: tuple[Plain, nn.Module, Tensor] | None = None
    if doubles:
        with contextlib.suppress(Exception):  # constants of float32 in forward
            double = copy.deepcopy(model).double()
            in_double = Plain(double, x.double(), y), double, x.double()
    for structure in structures:
        in_float32(structure, model, plain, x, y, record)
        if in_double is not None:
            in_float64(structure, *in_double, y, record)
        if compiles:
            with record.check(structure, "compile"):
                compiled(structure, model, plain, x, y)


def convert(structure: str, model: nn.Module, rule: fb.Rule | None = None) -> nn.Module:
    """The network in training, around a copy of the model."""
    rule = STRUCTURES[structure]() if rule is None else rule
    return fb.convert(copy.deepcopy(model), feedback=structure, rule=rule, noise_std=STD, seed=SEED, warmup=0).train()


def in_float32(structure: str, model: nn.Module, plain: Plain, x: Tensor, y: Tensor, record: Recorded) -> None:
    net: nn.Module | None = None
    with record.check(structure, "step"):
        original = copy.deepcopy(model)
        net = fb.convert(original, feedback=structure, rule=STRUCTURES[structure](), noise_std=STD, seed=SEED, warmup=0).train()
        loss = criterion(plain, net)
        out = seeded(lambda: net(x))
        state, outputs = generators(), leaves(out)
        clean = [t.detach().clone() for t in outputs]
        loss(out, y).backward()
        given = {n: p.grad is not None and bool(p.grad.isfinite().all()) for n, p in net.named_parameters()}
        net.zero_grad()
        loss(seeded(lambda: net(x)), y).backward()
    if net is None or not record[structure]["step"]["ok"]:
        return
    with record.check(structure, "gradients"):
        missing = [n for n in plain.gradients if not given[n]]
        need(not missing, f"none, or not finite, at {len(missing)} parameters: {', '.join(missing[:4])}")
        size = max(float(g.norm()) for g in plain.gradients.values())
        zero = [n for n, p in net.named_parameters() if n in plain.gradients and (p.grad is None or not p.grad.any())]
        zero = [n for n in zero if plain.gradients[n].norm() > 1e-4 * size]
        need(not zero, f"zero in the second step at {len(zero)} parameters: {', '.join(zero[:4])}")
    with record.check(structure, "rng"):
        names = ("torch", "random", "numpy")
        other = [n for n, a, b in zip(names, state, plain.generators, strict=True) if a != b]
        need(not other, f"the draws of {', '.join(other)} differ")
    with record.check(structure, "bitwise"):
        need(same(clean, plain.out), f"relative error {distance(clean, plain.out):.1e}")
    if structure == "layerwise":
        with record.check(structure, "control") as note:
            fixed = convert(structure, model, fb.Fixed())
            criterion(plain, fixed)(seeded(lambda: fixed(x)), y).backward()
            error = max(gradient_errors(fixed, plain).values())
            note["control"] = f"{error:.1e}"
            need(not error < 0.01, f"the gradients are backprop's, to {error:.1e}: that WeightTransport's are shows nothing")
    with record.check(structure, "eval"), torch.no_grad():
        fresh = convert(structure, model).eval()
        need(same(leaves(fresh(x)), plain.eval), f"relative error {distance(leaves(fresh(x)), plain.eval):.1e}")
    with record.check(structure, "revert"), torch.no_grad():
        after = [t.clone() for t in leaves(net.eval()(x))]
        back = fb.revert(net)
        ours, theirs = dict(back.named_parameters()), dict(original.named_parameters())
        need(list(ours) == list(theirs) and all(ours[n] is theirs[n] for n in ours), "other parameters")
        need([(n, type(m)) for n, m in back.named_modules()] == [(n, type(m)) for n, m in original.named_modules()], "other modules")
        need(list(back.state_dict()) == list(original.state_dict()), "another state dict")
        for (name, m), n in zip(back.named_modules(), original.modules(), strict=True):
            need(len(m._forward_hooks) == len(n._forward_hooks), f"a forward hook is left at {name!r}")
            need(len(m._forward_pre_hooks) == len(n._forward_pre_hooks), f"a forward pre-hook is left at {name!r}")
        need(same(leaves(back.eval()(x)), after), "another output in eval()")
    with record.check(structure, "summary"):
        table = fb.summary(net.train(), x)
        need(len(table) > 0 and len(str(table).splitlines()) >= len(table), "no rows")
        unknown = [r.name for r in table if not r.units or not r.B]
        need(not unknown, f"no B known at {', '.join(unknown[:4])}")


def in_float64(structure: str, plain: Plain, model: nn.Module, x: Tensor, y: Tensor, record: Recorded) -> None:
    checked = structure, "clean", "buffers"
    if structure == "layerwise":
        with record.check(*checked, "transport"):
            net = convert(structure, model, fb.WeightTransport())
            out = seeded(lambda: net(x))
            clean = [t.detach().clone() for t in leaves(out)]
            criterion(plain, net)(out, y).backward()
        if not record[structure]["transport"]["ok"]:
            return
        with record.check(structure, "transport") as note:
            note["transport"] = exact(gradient_errors(net, plain))
    else:
        with record.check(*checked, "heads", "oracle"):
            witness = Witness()
            net = convert(structure, model, witness)
            with watched(net) as activities:
                out = seeded(lambda: net(x))
            clean = [t.detach().clone() for t in leaves(out)]
            criterion(plain, net)(out, y).backward()
        if not record[structure]["oracle"]["ok"]:
            return
        with record.check(structure, "heads") as note:
            note["heads"] = exact({n: e for n, e in gradient_errors(net, plain).items() if n in plain.exact})
        with record.check(structure, "oracle") as note:
            change, others = second_pass(model, x, activities)
            (seen,) = witness.seen
            error, mixed = distance([seen], [change]), distance([others], [torch.cat([0 * change[:1], change[1:]])])
            note["oracle"] = f"{error:.1e}, {len(activities)} points"
            need(error < 1e-10, f"relative error {note['oracle']}")
            need(mixed < 1e-10, f"a sample gets another's noise: {mixed:.1e}")
    with record.check(structure, "clean") as note:
        error = distance(clean, plain.out)
        note["clean"] = "bitwise" if same(clean, plain.out) else f"{error:.1e}"
        need(error < 1e-10, f"relative error {error:.1e}")
    with record.check(structure, "buffers"):
        buffers = dict(net.named_buffers())
        gone = [n for n in plain.buffers if n not in buffers]
        need(not gone, f"gone: {', '.join(gone[:4])}")
        other = [n for n, b in plain.buffers.items() if not distance([buffers[n]], [b]) < 1e-10]
        need(not other, f"other values in {len(other)} buffers: {', '.join(other[:4])}")


def compiled(structure: str, model: nn.Module, plain: Plain, x: Tensor, y: Tensor) -> None:
    """Two steps, eager and compiled, from the same start."""
    torch._dynamo.reset()
    nets = [convert(structure, model) for _ in range(2)]
    runs: list[Any] = [nets[0], torch.compile(nets[1], fullgraph=True, backend="aot_eager")]
    losses = [criterion(plain, n) for n in nets]
    for step in ("first", "second"):
        found = []
        for net, run, loss in zip(nets, runs, losses, strict=True):
            net.zero_grad()
            out = seeded(functools.partial(run, x))
            loss(out, y).backward()
            found.append([t.detach().clone() for t in leaves(out)] + [p.grad for p in net.parameters() if p.grad is not None])
        size = max(float(t.abs().max()) for t in found[0])
        need(len(found[0]) == len(found[1]), f"{step} step: {len(found[1])} results, not {len(found[0])}")
        error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / size
        need(error < 1e-4, f"{step} step: relative error {error:.1e}")


# the oracle: the plain model once more, with the noise


class Witness(fb.LMS):
    """A rule that keeps the output's change of each step, as any rule is shown it."""

    def __init__(self) -> None:
        super().__init__(1e-9)
        self.seen: list[Tensor] = []

    def update(self, m: Any, state: dict[str, Tensor]) -> Any:
        self.seen.append(m.output_change.clone())
        return super().update(m, state)

    def __deepcopy__(self, memo: Any) -> Witness:
        return self


@dataclass
class Activity:
    """A point of the network's step: what the clean stream had there, its index in the noise counters, and which rows are whose."""

    name: str
    clean: Tensor
    index: int = -1
    dim: int = 0  # holds the rows of all samples, one sample's behind the other's,
    strided: bool = False  # or in turns
    channels_first: bool = False  # made by a convolution


# --- SEAM: all that the oracle is told by the engine. A point's place in the plain model is then found by the value of its activity. ---


@contextlib.contextmanager
def watched(net: Any) -> Iterator[list[Activity]]:
    """The points that a training forward passes in the ``with`` block, in order."""
    found: list[Activity] = []
    visit = Step.visit

    def record(step: Step, point: fb.FeedbackPoint, h: Tensor) -> None:
        visit(step, point, h)
        found.append(Activity(point.name, h.detach().clone()))

    with unittest.mock.patch.object(Step, "visit", record):
        yield found
    placement = net.feedback.placement
    for h in found:
        h.index = fb.points(net)[h.name].index
        if (rows := placement.rows.get(h.name)) is not None:  # else the batch comes first
            h.dim, h.strided = rows.dim, rows.strided
        h.channels_first = any(chain.maps for chain in placement.layers.values() if chain is not None and chain.point == h.name)


# --- end of the seam ---


def noise(h: Activity, samples: int, first: int) -> Tensor:
    """SPEC 6, in float64 from the raw words: Box-Muller on word pairs, a convolution's units numbered channels-last; 0 before sample
    ``first``."""
    units = h.clean.numel() // samples
    words = fb.functional.philox_words(SEED, 0, h.index, samples, -(-units // 4) * 4).view(samples, -1, 2) >> 8
    radius, angle = (-2 * ((words[..., 0] + 1) * 2.0**-24).double().log()).sqrt(), words[..., 1].double() * (2 * math.pi * 2.0**-24)
    xi = STD * torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :units]
    xi[:first] = 0
    row = [n for d, n in enumerate(h.clean.shape) if d != h.dim]
    xi = xi.reshape(samples, -1, *row[1:], row[0]).movedim(-1, 2) if h.channels_first else xi.reshape(samples, -1, *row)
    return (xi.transpose(0, 1) if h.strided else xi).flatten(0, 1).movedim(0, h.dim)


class Pass(TorchFunctionMode):
    """A pass of the plain model, call by call. The first finds the points' places and keeps batch statistics; others use both, with noise
    from sample ``start`` on."""

    def __init__(self, samples: int, activities: list[Activity], first: Pass | None = None, start: int = 0) -> None:
        super().__init__()
        self.samples, self.first, self.start, self.waiting, self.calls = samples, first, start, list(activities), 0
        self.places: dict[int, Activity] = {}
        self.statistics: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        self.calls += 1
        if self.first is None:
            for activity in self.waiting:
                if activity.clean.shape == out.shape and torch.equal(activity.clean, out):
                    self.places[self.calls] = activity
                    self.waiting.remove(activity)
                    break
            return out
        here = self.first.places.get(self.calls)
        if here is None:
            return out
        xi = noise(here, self.samples, self.start)
        return out.add_(xi) if any(out is a for a in args) else out + xi

    def batch_norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """With the first pass's statistics in the second."""
        if not training:
            return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
        if self.first is None:
            v, m = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
            self.statistics.append((m, v))
            return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
        m, v = self.first.statistics[len(self.statistics)]
        self.statistics.append((m, v))
        return F.batch_norm(x, m, v, weight, bias, False, momentum, eps)


def second_pass(model: nn.Module, x: Tensor, activities: list[Activity]) -> list[Tensor]:
    """The output's change, all outputs side by side, of plain passes with the same draws and batch statistics: with all samples' noise,
    and without the first sample's."""
    model, outputs = copy.deepcopy(model).train(), []
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    first = Pass(len(x), activities)
    for run in (first, Pass(len(x), [], first), Pass(len(x), [], first, 1)):
        with torch.no_grad(), run:
            outputs.append(torch.cat([t.flatten(1) for t in leaves(seeded(lambda: model(x)))], 1))
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
    need(not first.waiting, f"no call of the plain model gives the activity of point {', '.join(a.name for a in first.waiting[:4])}")
    return [out - outputs[0] for out in outputs[1:]]


# processes, tables


def work(which: Architecture, structures: list[str], compiles: bool, doubles: bool, connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    examine(which, structures, compiles, doubles, Recorded(connection))
    connection.close()


def supervised(which: Architecture, structures: list[str], compiles: bool, doubles: bool, limit: float) -> dict[str, Any]:
    """One architecture in a process of its own; what it had found when it ended, however it did."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process, start = context.Process(target=work, args=(which, structures, compiles, doubles, sender)), time.monotonic()
    process.start()
    sender.close()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    ended = ""
    while True:
        if not receiver.poll(max(0.0, start + limit - time.monotonic())):
            process.kill()
            ended = f"more than {limit:.0f} seconds"
            break
        try:
            structure, name, ok, note = receiver.recv()
        except EOFError:
            break
        results.setdefault(structure, {})[name] = {"ok": ok, "note": note}
    process.join()
    if process.exitcode and not ended:
        ended = f"the process ended with {process.exitcode}"
    plain = results.pop("", {}).get("plain", {"ok": False, "note": ended})
    if ended and plain["ok"]:
        structure = list(results)[-1] if results else structures[0]
        rest = structures[structures.index(structure) :]
        for s in rest:
            results.setdefault(s, {})["ended"] = {"ok": False, "note": ended}
    return {
        "name": which.name,
        "source": which.source,
        "shape": which.shape,
        "plain": plain,
        "seconds": round(time.monotonic() - start, 1),
        "structures": results,
    }


def failed(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [n for n in (*CHECKS, "ended") if n in checks and not checks[n]["ok"]]


def cause(note: str) -> str:
    """A message without the names and numbers in it."""
    return re.sub(r"\b\d[\d.e+-]*", "#", re.sub(r"'[^']*'", "'...'", note.split(": ", 1)[-1] if "Error" in note else note))[:150]


def report(rows: list[dict[str, Any]], structures: list[str]) -> str:
    """Markdown: an architecture a line, then totals, then what the failures have in common."""
    counted = [r for r in rows if r["plain"]["ok"]]
    lines = ["| architecture | " + " | ".join(structures) + " |", "| --- |" + " --- |" * len(structures)]
    for row in counted:
        cells = []
        for s in structures:
            checks = row["structures"].get(s, {})
            bad = failed(checks)
            cells.append(("ok" if checks else "-") if not bad else ", ".join(bad))
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", "| check | " + " | ".join(structures) + " |", "| --- |" + " --- |" * len(structures)]
    whole = [sum(s in r["structures"] and not failed(r["structures"][s]) for r in counted) for s in structures]
    lines.append("| all of them | " + " | ".join(f"{n} of {len(counted)}" for n in whole) + " |")
    for name in (*CHECKS, *INFORMATION):
        cells = []
        for s in structures:
            found = [r["structures"][s][name]["ok"] for r in counted if name in r["structures"].get(s, {})]
            cells.append(f"{sum(found)} of {len(found)}" if found else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for s in structures:
        causes = collections.Counter(
            (name, cause(r["structures"][s][name]["note"])) for r in counted for name in failed(r["structures"].get(s, {}))[:1]
        )
        lines += ["", f"{s}: first failures"] + [f"* {n} x {name}: {text}" for (name, text), n in causes.most_common()]
    lines += [f"\nnot counted, since the plain model does not run: {r['name']}: {r['plain']['note']}" for r in rows if not r["plain"]["ok"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", default=[], metavar="DIR", help="a checkout of one of the zoos; may be given again")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="architectures whose name matches, as in fnmatch")
    parser.add_argument("--structure", choices=[*STRUCTURES], action="append", help="default: both")
    parser.add_argument("--compile", default="", metavar="PATTERN", help="compile these too, which takes long")
    parser.add_argument("--float32", action="store_true", help="leave out the checks in float64, two thirds of the time")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for one architecture")
    parser.add_argument("--list", action="store_true", help="print names, and end")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of other architectures, and do not run those again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zoo.json")
    args = parser.parse_args()
    structures = args.structure or [*STRUCTURES]
    chosen = [a for a in architectures(args.source) if fnmatch.fnmatch(a.name, args.only)]
    if args.list:
        print(*(a.name for a in chosen), sep="\n")
        return
    torch.set_num_threads(1)  # before the fork, which threads do not survive
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.resume and args.out.exists() else []
    done = {r["name"] for r in rows}
    for which in chosen:
        if which.name in done:
            continue
        compiles = bool(args.compile) and fnmatch.fnmatch(which.name, args.compile)
        row = supervised(which, structures, compiles, not args.float32, args.limit)
        rows.append(row)
        said = {s: "ok" if not failed(c) else f"{failed(c)[0]}: {c[failed(c)[0]]['note']}" for s, c in row["structures"].items()}
        print(f"{row['seconds']:6.1f} s  {which.name}  {said if row['plain']['ok'] else row['plain']['note']}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "batch": BATCH,
            "classes": CLASSES,
            "noise_std": STD,
            "seed": SEED,
            "rules": {s: repr(r()) for s, r in STRUCTURES.items()},
        }
        args.out.write_text(json.dumps({"torch": torch.__version__, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(report(rows, structures))


if __name__ == "__main__":
    main()
