"""The two streams of a training forward: the clean one is the plain network, the perturbed one is SPEC 1."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fbkernels as fb
from fbkernels import ops, reference
from fbkernels.training.direct import Direct
from fbkernels.training.layerwise import Layerwise

STD = 0.3
RULES = {"ridge": fb.Ridge(), "fixed": fb.Fixed()}


def conv_block(i: int, o: int, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, padding=1, **options), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]


class Residual(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.fc, self.in_place = nn.ReLU(inplace=True), nn.Linear(4, 5), in_place

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(identity)))))
        if self.in_place:
            out += identity
        else:
            out = out + identity
        return self.fc(self.relu(out).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4)
        self.fc1, self.fc2, self.ln = nn.Linear(4, 6), nn.Linear(6, 5), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = torch.tanh(self.norm(self.conv2(h)))
        h = F.dropout(h.view(h.size(0), -1), 0.3, self.training)
        return F.log_softmax(self.fc2(F.gelu(self.ln(self.fc1(h)))), -1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(12, 6), nn.Tanh()
        self.mix, self.out = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.act(self.a(x)).chunk(2, 1)
        first, _ = torch.split(right, 2, dim=1)
        h = torch.cat((left, self.act(self.b(left)), first, right[:, 2:]), 1)
        h = torch.einsum("ni,ij->nj", self.act(self.c(h)), self.mix) @ self.mix / 6
        return self.out(torch.where(h > 0, h, 0.5 * h) + h.softmax(-1))


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.norm, self.up, self.down, self.out = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.out(torch.flatten(x.mean(1), 1))


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 5)

    def forward(self, x: Any, y: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x, y = x if y is None else (x, y)
        return self.out(scale * torch.cat((self.left(x).relu(), self.right(y).relu()), 1))


class Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv1d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(F.relu(self.conv(x)).max(dim=-1).values).tanh())


def images() -> tuple[Any, ...]:
    return (torch.randn(6, 3, 7, 7),)


def sequential() -> nn.Module:
    head = [nn.Flatten(), nn.Linear(4 * 9, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5)]
    return nn.Sequential(*conv_block(3, 6), nn.MaxPool2d(2), *conv_block(6, 4, groups=2), *head)


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(8, 5))


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.InstanceNorm3d(3), nn.ELU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(3, 5))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "sequential": (sequential, images),
    "residual": (lambda: Residual(False), images),
    "residual +=": (lambda: Residual(True), images),
    "functional": (Functional, images),
    "branches": (Branches, lambda: (torch.randn(6, 6),)),
    "transformer": (Transformer, lambda: (torch.randint(11, (6, 4)),)),
    "two inputs": (Inputs, lambda: (torch.randn(6, 3), torch.randn(6, 2))),
    "keyword input": (lambda: Inputs(), lambda: (torch.randn(6, 3), {"y": torch.randn(6, 2), "scale": 0.5})),
    "tuple input": (lambda: Inputs(), lambda: ((torch.randn(6, 3), torch.randn(6, 2)),)),
    "values": (Values, lambda: (torch.randn(6, 3, 6),)),
    "conv1d": (conv1d, lambda: (torch.randn(6, 3, 6),)),
    "conv3d": (conv3d, lambda: (torch.randn(6, 2, 3, 3, 3),)),
    "leading dimensions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Flatten(), nn.Linear(8, 5)),
        lambda: (torch.randn(6, 2, 3),),
    ),
}


def call(net: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    keywords = inputs[-1] if isinstance(inputs[-1], dict) else {}
    out: Tensor = net(*(i for i in inputs if not isinstance(i, dict)), **keywords)
    return out


def double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {k: double(v) for k, v in inputs.items()}
    return tuple(map(double, inputs)) if isinstance(inputs, tuple) else inputs


def close(a: Tensor, b: Tensor, roundings: int = 200) -> None:
    """Equal but for some hundred roundings of the largest element (the sums here have up to 54 terms, the nets up to 5 layers)."""
    torch.testing.assert_close(a, b, rtol=0, atol=roundings * torch.finfo(a.dtype).eps * float(b.abs().max()))


@pytest.mark.parametrize("name", NETS)
def test_eval_is_bitwise_the_plain_model(name: str) -> None:
    make, data = NETS[name]
    model, inputs = make(), data()
    call(model, inputs)  # statistics that are not those of a fresh network
    net = fb.convert(model)
    expected = call(model.eval(), inputs)
    assert torch.equal(call(net.eval(), inputs), expected)
    with torch.no_grad():
        assert torch.equal(call(net, inputs), call(model, inputs))


def test_eval_of_a_fused_transformer_layer_is_bitwise_the_plain_model() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 5)).eval()
    x = torch.randn(6, 4, 8)
    with torch.no_grad():
        assert torch.equal(fb.convert(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_clean_stream_is_the_plain_model(name: str, dtype: torch.dtype) -> None:
    make, data = NETS[name]
    model = make().to(dtype)
    net = fb.convert(copy.deepcopy(model), noise_std=STD, fraction=0.5)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for step in range(3):
        inputs, y = data(), torch.randint(5, (6,))
        inputs = double(inputs) if dtype == torch.float64 else inputs
        torch.manual_seed(step)
        expected = call(model, inputs)
        state = torch.get_rng_state()
        torch.manual_seed(step)
        out = call(net, inputs)
        assert type(out) is Tensor
        close(out.detach(), expected.detach())
        assert torch.equal(torch.get_rng_state(), state)
        criterion(out, y).backward()
    plain = dict(model.named_buffers())
    for key, value in net.named_buffers():
        if ".feedback." in key:
            continue
        if value.is_floating_point():
            close(value, plain[key])
        else:
            assert torch.equal(value, plain[key])
    assert int(net.state_dict()[f"{next(iter(fb.points(net)))}.feedback.shared.step"]) == 3


@pytest.mark.parametrize("name", NETS)
def test_the_streams_differ_by_the_noise_alone(name: str) -> None:
    """sigma -> 0: whatever else is random or a statistic of the batch is shared (SPEC 1)."""
    make, data = NETS[name]
    clean, perturbed = streams_of(make().double(), double(data()), noise_std=1e-9)
    # float64 activities of order 1 and slopes of at most some tens
    assert 1e-13 < float((perturbed - clean).abs().max()) < 1e-6


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"antithetic": True}, {"fraction": 0.7, "antithetic": True}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_other_numbers_of_perturbed_rows(name: str, options: dict[str, Any]) -> None:
    make, data = NETS[name]
    clean, perturbed = streams_of(make().double(), double(data()), noise_std=1e-9, **options)
    rows = {0.5: 3, 0.7: 5, 1.0: 6}[options.get("fraction", 1.0)]
    expected = clean[:rows]
    expected = torch.cat((expected, expected)) if options.get("antithetic") else expected
    assert perturbed.shape == expected.shape
    assert 1e-13 < float((perturbed - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("module", ["attention", "scaled_dot_product_attention"])
def test_attention_dropout_is_shared(module: str) -> None:
    class Scaled(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.down(F.gelu(self.up(self.embed(tokens))))
            return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).mean(1))

    model = Transformer(0.5) if module == "attention" else Scaled()
    clean, perturbed = streams_of(model.double(), (torch.randint(11, (6, 4)),), noise_std=1e-9)
    assert float((perturbed - clean).abs().max()) < 1e-6


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.out, self.function = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(self.function(torch.tanh(self.up(x))))))


DRAWS: list[Callable[[Tensor], Tensor]] = [
    lambda h: F.gumbel_softmax(h),
    lambda h: torch.normal(h, h.exp()),
    lambda h: h * torch.bernoulli(h.sigmoid()),
    lambda h: F.scaled_dot_product_attention(*[h.view(-1, 4, 2)] * 3, dropout_p=0.5).flatten(1),
]


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"antithetic": True}, {"fraction": 0.5, "antithetic": True}], ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_random_functions_draw_alike_for_other_numbers_of_rows(draw: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    clean, perturbed = streams_of(Between(draw).double(), (torch.randn(6, 4).double(),), noise_std=1e-9, **options)
    clean = clean[: 3 if "fraction" in options else 6].repeat(1 + ("antithetic" in options), 1)
    assert 1e-13 < float((perturbed - clean).abs().max()) < 1e-6


@pytest.mark.parametrize("choose", [lambda h: h.gather(1, h.sort(1)[1]), lambda h: h.gather(1, h.argsort(1))])
def test_the_noisy_stream_sorts_by_its_own_values(choose: Callable[[Tensor], Tensor]) -> None:
    seen: list[Tensor] = []

    def function(h: Tensor) -> Tensor:
        seen[:] = [h, choose(h)]
        return seen[1]

    fb.convert(Between(function).double(), rule=fb.Joint(), noise_std=1.0)(torch.randn(6, 4).double())
    h, out = ((t + t._fb[1]).detach() for t in seen)  # type: ignore[attr-defined]
    torch.testing.assert_close(out, h.sort(1)[0])


def test_a_bernoulli_mask_follows_the_noise() -> None:
    seen: list[Tensor] = []

    def function(h: Tensor) -> Tensor:
        seen[:] = [torch.bernoulli(h.sigmoid())]
        return h * seen[0]

    fb.convert(Between(function).double(), rule=fb.Joint(), noise_std=1.0)(torch.randn(6, 4).double())
    assert {*seen[0]._fb[1].unique().tolist()} == {-1.0, 0.0, 1.0}  # type: ignore[attr-defined]


def test_rows_that_fraction_cannot_follow() -> None:
    with pytest.raises(ValueError, match="which fraction and antithetic cannot follow: use fraction=1 and antithetic=False"):
        fb.convert(Between(lambda h: torch.stack(list(h))), rule=fb.Joint(), fraction=0.5)(torch.randn(6, 4))


CELL = nn.GRUCell(8, 8).double()


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"antithetic": True}, {"fraction": 0.5, "antithetic": True}], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda h: CELL(h, h.new_zeros(len(h), 8)),
        lambda h: h.masked_fill(torch.arange(8) < torch.arange(len(h))[:, None], 0.0),
        lambda h: h.clone().masked_fill_(torch.arange(8) < torch.arange(len(h))[:, None], 0.0),
        lambda h: torch.bmm(torch.arange(1.0, len(h) + 1, dtype=h.dtype)[:, None, None].expand(-1, 4, 4), h.view(len(h), 4, 2)).flatten(1),
        lambda h: h.index_put((torch.arange(len(h)), torch.arange(len(h))), torch.arange(len(h), dtype=h.dtype)),
    ],
)
def test_a_tensor_that_is_made_for_each_sample(function: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    clean, perturbed = streams_of(Between(function).double(), (torch.randn(6, 4).double(),), noise_std=1e-9, **options)
    clean = clean[: 3 if "fraction" in options else 6].repeat(1 + ("antithetic" in options), 1)
    assert 1e-13 < float((perturbed - clean).abs().max()) < 1e-6


def test_a_class_token_is_repeated_for_the_perturbed_rows() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.up, self.out = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).tanh()
            return self.out(torch.cat((self.token.expand(len(x), -1, -1), h), 1).mean(1))

    clean, perturbed = streams_of(Token().double(), (torch.randn(6, 2, 3).double(),), noise_std=1e-9, antithetic=True)
    assert float((perturbed - torch.cat((clean, clean))).abs().max()) < 1e-6


def test_a_gate_on_the_layer_itself() -> None:
    """x * sigmoid(x): two read the layer's output, so the noise goes in right behind it."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.out(h * torch.sigmoid(h))

    model, x = Gate().double(), torch.randn(6, 3).double()
    _, perturbed = streams_of(model, (x,), noise_std=STD, seed=11)
    h = model.fc(x) + ops.noise(torch.tensor(0), 11, 0, 6, 4, STD, "gaussian", dtype=torch.float64)
    close(perturbed, model.out(h * torch.sigmoid(h)).detach())


def streams_of(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """Clean and perturbed logits of one step, as the criterion sees them."""
    seen: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # a list would forget all but the clean call's

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        seen.put(out.detach().clone())
        return F.cross_entropy(out, target, reduction="none")

    net = fb.convert(model, **options)
    fb.PerturbedLoss(criterion, net)(call(net, inputs), torch.zeros(6, dtype=torch.int64))
    return seen.get(), seen.get()


def channels_last_noise(step: int, point: int, h: Tensor, kind: str = "gaussian", seed: int = 11) -> Tensor:
    n, c, *size = h.shape
    xi = fb.functional.noise(seed, step, point, n, h[0].numel(), STD, kind).view(n, *size, c)
    return xi.movedim(-1, 1)


def batch_norm(x: Tensor, clean: Tensor) -> Tensor:
    d = [i for i in range(x.ndim) if i != 1]
    keep = [1, -1] + [1] * (x.ndim - 2)
    var, mean = torch.var_mean(clean, d, correction=0)
    return (x - mean.view(keep)) / (var.view(keep) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_the_perturbed_stream_is_two_passes_by_hand(kind: str) -> None:
    model, (x,) = sequential(), images()
    conv1, conv2, fc1, fc2 = (m for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    torch.manual_seed(5)
    clean, perturbed = streams_of(model, (x,), noise_std=STD, noise=kind, seed=11)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(6, 8), 0.5)

    z = conv1(x)
    h = F.max_pool2d(batch_norm(z, z).relu(), 2)
    p = h + channels_last_noise(0, 0, h, kind)
    z, q = conv2(h), conv2(p)
    h, p = batch_norm(z, z).relu(), batch_norm(q, z).relu()
    p = p + channels_last_noise(0, 1, h, kind)
    h, p = (fc1(t.flatten(1)).tanh() * mask for t in (h, p))
    p = p + fb.functional.noise(11, 0, 2, 6, 8, STD, kind)
    close(clean.float(), fc2(h).detach())
    close(perturbed.float(), fc2(p).detach())


def test_antithetic_and_fraction_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(6, 3)
    _, perturbed = streams_of(model, (x,), noise_std=STD, seed=11, antithetic=True, fraction=0.6)
    h, xi = model[0](x[:4]).tanh(), fb.functional.noise(11, 0, 0, 4, 4, STD)  # ceil(0.6 * 6) = 4
    close(perturbed.float(), model[2](torch.cat((h + xi, h - xi))).detach())


@pytest.mark.parametrize("d", [1, 2, 3])
def test_convolutions_number_their_units_channels_last(d: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    model, x = nn.Sequential(conv(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 2**d, 5)), torch.randn(6, 2, *[3] * d)
    _, perturbed = streams_of(model, (x,), noise_std=STD, seed=11)
    h = model[0](x).tanh()
    close(perturbed.float(), model[3]((h + channels_last_noise(0, 0, h)).flatten(1)).detach())


def test_noise_is_fresh_in_each_step_and_each_point() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    net, x = fb.convert(model, noise_std=STD, seed=11), torch.randn(6, 3)
    seen: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
    criterion = fb.PerturbedLoss(lambda out, y: seen.put(out.detach().float()) or out.square().sum(1), net)
    for step in range(3):
        criterion(net(x), torch.zeros(6))
        p = model[0](x) + fb.functional.noise(11, step, 0, 6, 4, STD)
        p = model[1](p) + fb.functional.noise(11, step, 1, 6, 4, STD)
        seen.get()
        close(seen.get(), model[2](p).detach())


class Count(TorchDispatchMode):
    """Linear maps and convolutions that run, by the storage of the weight they use."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution):
            weight = args[2 if func.overloadpacket == torch.ops.aten.addmm else 1].data_ptr()
            self.calls[weight] = self.calls.get(weight, 0) + 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("rule", "expected"), [("ridge", [1, 2, 2, 2]), ("fixed", [1, 1, 1, 1])])
def test_the_first_layer_runs_once(rule: str, expected: list[int]) -> None:
    model = sequential().to(memory_format=torch.channels_last)  # which a block runs without a copy of the weight
    net = fb.convert(model, rule=RULES[rule])
    net(*images())  # the first forward records
    with Count() as count:
        net(*images())
    weights = [m.weight for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [count.calls[w.data_ptr()] for w in weights] == expected


def test_every_other_step_costs_one_forward() -> None:
    model = sequential()
    net = fb.convert(model, every=2)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    net(*images())  # the first forward records
    calls = []
    for _ in range(4):
        with Count() as count:
            out = net(*images())
        criterion(out, torch.zeros(6, dtype=torch.int64))
        calls.append(count.calls[model[-1].weight.data_ptr()])
    assert calls == [2, 1, 2, 1]


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_the_perturbed_stream_is_not_saved_for_backward(feedback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = sequential(), images()
    net = fb.convert(model, feedback=feedback)
    net(x)  # the first forward records
    seen: list[Tensor] = []
    # where the noise goes in: at the point, or in layerwise in the layer that reads it
    place, name = (Layerwise, "read") if feedback == "layerwise" else (Direct, "point")
    run = getattr(place, name)

    def keep(*args: Any) -> Any:
        result = run(*args)
        seen.append(result[-1])
        return result

    monkeypatch.setattr(place, name, keep)

    def saved(run: Callable[[], Any]) -> list[Tensor]:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            out = run()
        del out
        return tensors

    plain, ours = saved(lambda: model(x)), saved(lambda: net(x))
    assert len(seen) == 3
    assert not any(p.requires_grad for p in seen)
    assert not {p.untyped_storage().data_ptr() for p in seen} & {t.untyped_storage().data_ptr() for t in ours}
    # layerwise keeps B beside W (to be used in its place) for the three layers that read a point
    extra = 3 if feedback == "layerwise" else 0
    assert len(ours) <= len(plain) + extra
    size = lambda tensors: sum(t.numel() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())  # noqa: E731
    B = sum(p.B.numel() for p in fb.points(net).values() if p.B is not None)
    # a dropout mask is one factor here and one bit in torch
    assert size(ours) <= size(plain) + B + 6 * 8


def test_no_grad_between_points_in_direct() -> None:
    """No gradient with respect to an activation crosses a point: W_1 is not saved by layer 2's backward."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(6, 3)
    net = fb.convert(model)
    weights = {m.weight.data_ptr() for m in model if isinstance(m, nn.Linear)}
    saved: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        out = net(x)
    assert not saved & weights
    assert out.requires_grad


@given(
    samples=st.integers(1, 9),
    units=st.integers(1, 300),
    cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    kind=st.sampled_from(["gaussian", "rademacher"]),
    backend=st.sampled_from(["reference", "cpp"]),
)
@settings(max_examples=30, deadline=None)
def test_noise_of_a_part_of_the_batch(samples: int, units: int, cuts: tuple[int, int], kind: str, backend: str) -> None:
    a, b = sorted(min(c, samples) for c in cuts)
    whole = ops.noise(torch.tensor(3), 5, 1, samples, units, STD, kind, backend=backend)
    part = ops.noise(torch.tensor(3), 5, 1, b - a, units, STD, kind, offset=a, backend=backend)
    assert torch.equal(part, whole[a:b])


@given(n=st.integers(1, 4), c=st.integers(1, 6), size=st.lists(st.integers(1, 4), min_size=1, max_size=3), last=st.booleans())
@settings(max_examples=30, deadline=None)
def test_units_and_layout_are_inverses_in_any_memory_format(n: int, c: int, size: list[int], last: bool) -> None:
    h = torch.randn(n, c, *size)
    if last and len(size) == 2:
        h = h.contiguous(memory_format=torch.channels_last)
    assert torch.equal(reference.layout(reference.units(h), h.shape), h)


def perturbed_activities(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    net = fb.convert(model, noise_std=STD)
    seen: list[Tensor] = []
    run = Direct.point

    def keep(*args: Any) -> Any:
        result = run(*args)
        seen.append(result[-1])
        return result

    Direct.point = keep  # type: ignore[method-assign]
    try:
        return _steps(net, x, seen)
    finally:
        Direct.point = run  # type: ignore[method-assign]


def _steps(net: nn.Module, x: Tensor, seen: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(3):
        criterion(net(x), torch.arange(6) % 5)
    return seen, torch.cat([p.B for p in fb.points(net).values()])


def test_memory_format_changes_no_noise() -> None:
    """Small integers keep the first convolution exact in any order of summation, so its point sees the same bits in both formats; what
    follows, and so B, agrees to rounding, because torch's convolutions sum in another order."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 5)
    ).requires_grad_(False)
    for p in model[0].parameters():
        p.copy_(torch.randint(-3, 4, p.shape))
    x = torch.randint(-3, 4, (6, 3, 6, 6)).float()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for p in (*model.parameters(), *last.parameters()):
        p.requires_grad_()
    (noise, B), (noise_last, B_last) = perturbed_activities(model, x), perturbed_activities(last, x.to(memory_format=torch.channels_last))
    for step in range(3):
        assert torch.equal(noise[2 * step], noise_last[2 * step])
    # dL is a difference of float64 losses of float32 logits: relative error eps |logits| / |dL|, with |dL| of order STD; then w = dL/STD^2
    torch.testing.assert_close(B_last, B, rtol=0, atol=2000 * 2.0**-23 * float(B.abs().max()))
